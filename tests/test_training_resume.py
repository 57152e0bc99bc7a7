"""A run is killed with SIGKILL, started again, and must end as if nothing had happened; and what else can
befall a run's folder."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training_runs import METHODS, SMALL, interrupt_at, same, small_recipe

from glsd.training import Recipe, export_backbone, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint, list_checkpoints
from glsd.training.metrics import read_metrics

# each a real process of its own, without importing torch again
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['glsd.training.loop'])


def train(out, recipe, errors):
    torch.set_num_threads(1)
    try:
        pretrain(Recipe('geometric', **recipe), out, progress=False)
    except ValueError as e:
        errors.write_text(str(e))
        raise SystemExit(1) from None


def start(out, **changes):
    process = processes.Process(target=train, args=(out, {**SMALL, **changes}, out.with_suffix('.errors')))
    process.start()
    return process


def kill_at(process, out, step):
    while process.is_alive() and len(read_metrics(out)) < step:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, 'the run was over before it could be killed'


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The same recipe, never cut."
    out, threads = tmp_path_factory.mktemp('runs') / 'straight', torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(Recipe('geometric', **SMALL), out, progress=False)
    torch.set_num_threads(threads)
    return out


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_killed_in_mid_epoch_and_at_random(tmp_path, straight, seed):
    # six batches make an epoch, checkpoints are from steps 4, 8, 12: the first kill is in mid-epoch
    out, moment = tmp_path / 'run', random.Random(seed)
    for step in 5, moment.randint(6, 12):
        process = start(out)
        kill_at(process, out, step)
    process = start(out)
    process.join()
    assert process.exitcode == 0
    a, b = last_checkpoint(straight), last_checkpoint(out)
    assert {k: same(a[k], b[k]) for k in a} == dict.fromkeys(a, True)
    losses = [[line['loss'] for line in read_metrics(folder)] for folder in (out, straight)]
    assert losses[0] == losses[1] and [line['step'] for line in read_metrics(out)] == list(range(1, 14))


@pytest.mark.parametrize('method', METHODS)
def test_every_method_goes_on_bit_equal(tmp_path, method):
    "Cut in the middle of an epoch, between two checkpoints."
    recipe = small_recipe(method)
    pretrain(recipe, tmp_path / 'straight', {}, progress=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'cut', {'m': interrupt_at(5)}, progress=False)
    assert last_checkpoint(tmp_path / 'cut')['step'] == 4
    pretrain(recipe, tmp_path / 'cut', {}, progress=False)
    a, b = (last_checkpoint(tmp_path / name) for name in ('straight', 'cut'))
    assert {k: same(a[k], b[k]) for k in a} == dict.fromkeys(a, True)


def test_what_is_exported_is_equal_too(straight, tmp_path):
    export_backbone(straight, tmp_path / 'a.safetensors')
    weights = load_run(straight).backbone.model.state_dict()
    assert same(dict(load_file(tmp_path / 'a.safetensors')), dict(weights))


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path):
    out = tmp_path / 'run'
    first = start(out, steps=10_000)
    try:
        while first.is_alive() and not read_metrics(out):
            time.sleep(0.01)
        second = start(out, steps=10_000)
        second.join()
    finally:
        first.kill()
        first.join()
    error = out.with_suffix('.errors').read_text()
    assert second.exitcode == 1 and f'in use by process {first.pid}' in error and '\n' not in error


def test_a_second_run_in_the_same_folder_of_one_process(tmp_path):
    "A lock that this process holds is refused a second time, and the first one keeps it (A13)."
    messages = []

    def monitor(method, step, views):
        for _ in range(2):
            with pytest.raises(ValueError, match='in use by') as error:
                pretrain(small_recipe('dino', steps=1), tmp_path, {}, progress=False)
            messages.append(str(error.value))
        return {}

    pretrain(small_recipe('dino', steps=1), tmp_path, {'m': monitor}, progress=False)
    assert len(messages) == 2 and messages[0] == messages[1]


def test_stale_lock_is_taken_over(tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'lock').write_text(str(os.getpid()))  # a number that lives, and holds no lock
    run = pretrain(Recipe('geometric', **SMALL).replace(steps=1), out, progress=False)
    assert len(run.metrics) == 1


def test_damaged_newest_checkpoint(tmp_path, straight):
    out = tmp_path / 'run'
    shutil.copytree(straight, out)
    newest = list_checkpoints(out)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='going back'):
        pretrain(Recipe('geometric', **SMALL), out, progress=False)
    assert last_checkpoint(out)['step'] == 13 and len(read_metrics(out)) == 13
