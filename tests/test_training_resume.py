"A run is killed with SIGKILL, started again, and must end as if nothing had happened; and what else can befall a run's folder."

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from glsd.training import Recipe, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint, list_checkpoints, read_metrics

SMALL = dict(
    n_images=48,
    image_size=32,
    global_size=32,
    local_size=16,
    n_local=1,
    local_scale=(0.1, 0.4),
    backbone='swin_mini',
    drop_path=0.2,
    out_dim=32,
    head_hidden=32,
    head_bottleneck=16,
    head_batchnorm=True,
    batch_size=8,
    steps=13,
    lr=1e-2,
    momentum=0.9,
    checkpoint_every=4,
)
processes = multiprocessing.get_context(
    'forkserver'
)  # each a real process of its own, without importing torch again
processes.set_forkserver_preload(['glsd.training.loop'])


def train(out, recipe, errors):
    torch.set_num_threads(1)
    try:
        pretrain(Recipe(**recipe), out, progress=False)
    except ValueError as e:
        errors.write_text(str(e))
        raise SystemExit(1)


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


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The same recipe, never cut."
    out, threads = tmp_path_factory.mktemp('runs') / 'straight', torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(Recipe(**SMALL), out, progress=False)
    torch.set_num_threads(threads)
    return out


def test_killed_in_mid_epoch_and_at_random(tmp_path, straight):
    # six batches make an epoch, checkpoints are from steps 4, 8, 12: the first kill is in mid-epoch before and after one
    out, moment = tmp_path / 'run', random.Random()
    seed = moment.randrange(10**6)
    moment.seed(seed)
    for step in 5, moment.randint(6, 12):
        process = start(out)
        kill_at(process, out, step)
    process = start(out)
    process.join()
    assert process.exitcode == 0
    a, b = last_checkpoint(straight), last_checkpoint(out)
    assert {k: same(a[k], b[k]) for k in a} == dict.fromkeys(a, True), f'seed {seed}'
    assert [l['loss'] for l in read_metrics(out)] == [l['loss'] for l in read_metrics(straight)]
    assert [l['step'] for l in read_metrics(out)] == list(range(1, 14))


def test_what_is_exported_is_equal_too(straight, tmp_path):
    from safetensors.torch import load_file

    from glsd.training import export_backbone

    export_backbone(straight, tmp_path / 'a.safetensors')
    weights = load_run(straight).backbone.model.state_dict()
    assert same(dict(load_file(tmp_path / 'a.safetensors')), dict(weights))


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


def test_stale_lock_is_taken_over(tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'lock').write_text(str(os.getpid()))  # a number that lives, and holds no lock
    run = pretrain(Recipe(**SMALL).replace(steps=1), out, progress=False)
    assert len(run.metrics) == 1


def test_damaged_newest_checkpoint(tmp_path, straight):
    out = tmp_path / 'run'
    shutil.copytree(straight, out)
    newest = list_checkpoints(out)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='going back'):
        pretrain(Recipe(**SMALL), out, progress=False)
    assert last_checkpoint(out)['step'] == 13 and len(read_metrics(out)) == 13
