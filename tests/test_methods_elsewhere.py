"""A MAE and a MoCo that the package has never heard of: trained, killed and resumed, shared, evaluated."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import methods_in_40_lines
import pytest
import torch

from glsd.cli import main
from glsd.training import Recipe, load_method, load_run, pretrain, read_metrics
from glsd.training.checkpoint import last_checkpoint

HERE = Path(__file__).parent
SMALL = dict(n_images=64, image_size=32, global_size=32, batch_size=16, steps=12, lr=2e-2, checkpoint_every=3)
NAMES = ['MAE', 'MoCo']


def recipe_of(name, **changes):
    return Recipe(f'methods_in_40_lines:{name}', **SMALL, **changes)


def flags_of(name):
    words = [w for k, v in SMALL.items() for w in (f'--{k.replace("_", "-")}', str(v))]
    return ['--method', f'methods_in_40_lines:{name}', *words]


def command(*words):
    "`glsd WORDS` in a process of its own, which finds the methods by PYTHONPATH."
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    code = 'import sys; from glsd.cli import main; sys.exit(main())'
    env = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', code, *map(str, words)], env=env)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', params=NAMES)
def straight(request, tmp_path_factory):
    "A run that was never cut."
    out = tmp_path_factory.mktemp('elsewhere') / request.param
    run = pretrain(recipe_of(request.param), out, progress=False)
    return request.param, run


def test_each_is_forty_lines():
    for name in NAMES:
        assert len(inspect.getsource(getattr(methods_in_40_lines, name)).splitlines()) <= 40


def test_it_learns(straight, tmp_path):
    name, run = straight
    longer = recipe_of(name).replace(steps=60, data='toyworld-shared')  # crops share much: quickly learned
    losses = [line['loss'] for line in pretrain(longer, tmp_path, progress=False).metrics]
    nothing_learned = {'MAE': losses[0], 'MoCo': math.log(129)}[name]  # MoCo: its key and a queue of 128
    assert losses[-1] < 0.95 * nothing_learned
    assert set(run.metrics[0]) >= {
        'step',
        'loss',
        'grad_norm',
        'lr',
        {'MAE': 'pixels', 'MoCo': 'contrast'}[name],
    }


@pytest.mark.slow
def test_killed_and_gone_on_to_the_same_bits(straight, tmp_path):
    name, run = straight
    process = command('pretrain', '--out', tmp_path, *flags_of(name))
    while process.poll() is None and len(read_metrics(tmp_path)) < 5:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, 'the run was over before it could be killed'
    assert command('pretrain', '--out', tmp_path, *flags_of(name)).wait() == 0
    assert same(last_checkpoint(tmp_path), last_checkpoint(run.path))


@pytest.mark.slow
def test_on_two_processes(straight, tmp_path):
    name, run = straight
    assert command('pretrain', '--out', tmp_path, '--nproc', 2, *flags_of(name)).wait() == 0
    two, one = read_metrics(tmp_path), run.metrics
    assert len(two) == len(one)
    assert all(
        abs(a['loss'] - b['loss']) < 0.3 * b['loss'] for a, b in zip(two, one)
    )  # other masks, the same views
    method = load_method(tmp_path)
    if name == 'MoCo':
        assert int(method.place) == int(
            load_method(run.path).place
        )  # the keys of both processes are in the queue


def test_evaluated_and_exported_by_the_command(straight, tmp_path, capsys):
    name, run = straight
    out = tmp_path / 'knn.json'
    assert main(['evaluate', 'knn', str(run.path), '--images', '60', '--k', '5', '--out', str(out)]) == 0
    assert json.loads(out.read_text())['size'] == 32
    exported = tmp_path / 'mine.safetensors'
    assert main(['export', str(run.path), '--out', str(exported)]) == 0
    assert (
        main(
            [
                'evaluate',
                'knn',
                str(exported),
                '--data',
                'toyworld',
                '--images',
                '60',
                '--k',
                '5',
                '--out',
                str(out),
            ]
        )
        == 0
    )
    assert not load_run(run.path).backbone.training


def test_a_method_that_cannot_be_found_is_one_line(tmp_path, capsys):
    assert main(['pretrain', '--out', str(tmp_path), '--method', 'methods_in_40_lines:MAEE']) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and 'MAEE' in line
