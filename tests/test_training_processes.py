"Several processes compute what one does; and what happens to them costs minutes, not the run."

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from training_runs import METHODS, apart, in_processes, plain_backbone, small_recipe

from glsd.evaluation import collapse_monitor
from glsd.objectives.method import find_method
from glsd.training import Recipe, Trainer, pretrain
from glsd.training import processes as glsd_processes
from glsd.training.checkpoint import last_checkpoint, list_checkpoints
from glsd.training.loop import batches, class_names
from glsd.training.metrics import read_metrics
from glsd.training.processes import (
    DistributedWorld,
    all_gather_outputs,
    all_gather_rows,
    process_group,
    rank_indices,
)
from glsd.training.sharding import ShardedWorld, join_world
from glsd.training.trainer import build_dataset

RECIPE = Recipe(
    'geometric', n_images=48, image_size=32, global_size=32, local_size=16, n_local=2, local_scale=(0.3, 0.6),
    backbone='vit_mini', drop_path=0.0, out_dim=32, head_hidden=32, head_bottleneck=16, head_batchnorm=True,
    batch_size=16, steps=20, lr=0.016, momentum=0.9, teacher_temp=0.04, freeze_last=0.1, checkpoint_every=4,
    device='cpu',
)  # fmt: skip
MASKED = ['mae', 'maskfeat']  # with a mask that is not drawn: each process would draw others
COMPARED = dict(  # the losses know nothing of how weights are kept
    copies=['similarity', 'geometric', 'supervised', *MASKED], fsdp=['geometric', 'supervised']
)
TESTS = Path(__file__).parent
GLSD = [sys.executable, '-c', 'import sys; from glsd.cli import main; sys.exit(main())']
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))


def compared_recipe(method: str, how: str) -> Recipe:
    if method == 'supervised':  # mixed by each process for itself: other images than one process mixes
        return small_recipe(
            method, backbone='vit_mini', drop_path=0.0, batch_size=16, steps=20, lr=0.05, mixup=0, cutmix=0,
            erase=0, drloc_weight=0, device='cpu', fsdp=how == 'fsdp',
        )  # fmt: skip
    if method in MASKED:
        return small_recipe(
            method, mask='grid', mask_ratio=0.75, batch_size=16, steps=20, device='cpu', fsdp=how == 'fsdp'
        )
    return RECIPE.replace(method=method, fsdp=how == 'fsdp')


def double(views):
    views.crops = [c.double() for c in views.crops]
    return views


def follow(out, how, start=None):
    """In each process: trains the methods for 8 steps, in double precision, so that what is left of a
    difference is no rounding. Process 0 writes losses and weights, after 4 steps and at the end."""
    torch.set_default_dtype(torch.float64)
    with join_world(compared_recipe('geometric', how)) as world:
        for method in COMPARED[how]:
            recipe, losses = compared_recipe(method, how), []
            dataset = build_dataset(recipe)
            trainer = Trainer(recipe, 8, world, class_names(recipe, dataset))
            if start:
                trainer.load_state_dict(torch.load(start / f'{method}_4.pt'))
            for views in batches(recipe, dataset, trainer.done, 8, trainer.method.views, world):
                losses.append(trainer.step(double(views))['loss'])
                if trainer.done in (4, 8):
                    state = trainer.state_dict()  # of sharded weights: all must ask
                    if world.rank == 0:
                        torch.save(state, out / f'{method}_{trainer.done}.pt')
            if world.rank == 0:
                torch.save(losses, out / f'{method}_losses.pt')


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "What one process made."
    out = tmp_path_factory.mktemp('one')
    in_processes(1, follow, out, 'copies')
    return out


@pytest.mark.slow
@pytest.mark.parametrize('how', COMPARED)
def test_n_processes_follow_one_and_go_on_as_m(tmp_path, one, how):
    folders = {1: one, 2: tmp_path / '2', 4: tmp_path / '4'}
    for n in 2, 4:
        folders[n].mkdir()
    in_processes(2, follow, folders[2], how)
    in_processes(4, follow, folders[4], how, folders[2])  # from the checkpoint of two, after four steps

    def read(n, name):
        return torch.load(folders[n] / f'{name}.pt')

    for method in COMPARED[how]:
        losses = read(1, f'{method}_losses')
        assert len(losses) == 8 and apart(losses, read(2, f'{method}_losses')) < 1e-6, method
        assert apart(losses[4:], read(4, f'{method}_losses')) < 1e-6, method
        weights = {n: read(n, f'{method}_8')['method'] for n in (1, 2, 4)}
        assert apart(weights[1], weights[2]) < 1e-6 and apart(weights[1], weights[4]) < 1e-6, method
        moved = apart(weights[1], read(1, f'{method}_4')['method'])
        assert moved > 1e-3, method  # or the comparison would prove nothing


def words(out, recipe=RECIPE, **flags):
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / 'mine.yaml')
    given = [word for k, v in flags.items() for word in (f'--{k}', str(v))]
    return ['pretrain', '--recipe', str(out / 'mine.yaml'), '--out', str(out), *given]


def start(out, **flags):
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(GLSD + words(out, **flags), env=ENV, **streams)


def wait_for(what, seconds=300):
    end = time.time() + seconds
    while not (found := what()):
        assert time.time() < end, 'it did not happen'
        time.sleep(0.02)
    return found


def processes_of(out, rank=None):
    "Processes whose environment names the folder: those of a run, not its agent."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            env = (p / 'environ').read_text(errors='replace').split('\0')
        except OSError:
            continue
        ours = any(word.startswith('GLSD_ARGV=') and str(out) in word for word in env)
        if ours and (rank is None or f'RANK={rank}' in env):
            found.append(int(p.name))
    return found


linux = pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds processes in /proc')
LONG = RECIPE.replace(steps=32)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'undisturbed'
    run = start(out, recipe=LONG, nproc=2)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return last_checkpoint(out)


@linux
@pytest.mark.slow
def test_one_process_is_killed_and_the_weights_are_the_same(tmp_path, undisturbed):
    run = start(tmp_path / 'run', recipe=LONG, nproc=2)
    wait_for(lambda: list_checkpoints(tmp_path / 'run'))
    os.kill(processes_of(tmp_path / 'run', rank=1)[0], signal.SIGKILL)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert apart(undisturbed, last_checkpoint(tmp_path / 'run')) == 0
    assert [line['step'] for line in read_metrics(tmp_path / 'run')] == list(range(1, 33))


@linux
@pytest.mark.slow
def test_sigterm_is_a_checkpoint_and_an_exit(tmp_path, undisturbed):
    out = tmp_path / 'run'
    run = start(out, recipe=LONG.replace(checkpoint_every=1000), nproc=2)
    wait_for(lambda: len(read_metrics(out)) >= 3)
    run.terminate()
    _, errors = run.communicate(timeout=200)
    reached = last_checkpoint(out)['step']
    assert run.returncode == 143 and f'asked to end after step {reached}' in errors, errors
    assert 3 <= reached < 32 and not processes_of(out)
    # one process goes on with what two began
    assert subprocess.run(GLSD + words(out, recipe=LONG), env=ENV, capture_output=True).returncode == 0
    state = last_checkpoint(out)
    teacher = [k for k in state['method'] if k.startswith('teacher.')]  # the student's last step is too fresh
    assert state['step'] == 32
    assert max(apart(undisturbed['method'][k], state['method'][k]) for k in teacher) < 1e-2


@pytest.mark.slow
def test_sigterm_to_one_process(tmp_path):
    run = start(tmp_path / 'run', recipe=LONG.replace(checkpoint_every=1000))
    wait_for(lambda: read_metrics(tmp_path / 'run'))
    run.terminate()
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 143 and 'the same call resumes' in errors
    assert last_checkpoint(tmp_path / 'run')['step'] >= 1


@linux
@pytest.mark.slow
@pytest.mark.parametrize('how', ['SIGKILL', 'SIGINT'])
def test_a_notebook_that_ends_leaves_no_process(tmp_path, how):
    out, script = tmp_path / 'run', tmp_path / 'cell.py'
    script.write_text(f"""
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from glsd.training.launching import launch
from test_training_processes import LONG
launch(LONG.replace(steps=100000), {str(out)!r}, nproc=2, progress=False)""")
    env = dict(ENV, PYTHONPATH=os.pathsep.join([str(TESTS), ENV['PYTHONPATH']]))
    cell = subprocess.Popen([sys.executable, str(script)], env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: list_checkpoints(out))
    assert len(processes_of(out)) >= 2
    cell.send_signal(getattr(signal, how))
    cell.wait()
    wait_for(lambda: not processes_of(out), 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags, line',
    [
        (dict(nproc=3), 'batch_size=16 cannot be shared equally by 3 processes'),
        (dict(nproc=0), '--nproc and --nnodes must be 1 or more'),
        (dict(nnodes=2), 'several nodes need --rdzv HOST:PORT'),
    ],
)
def test_bad_input_is_one_line_and_not_tried_again(tmp_path, flags, line):
    command = GLSD + words(tmp_path / 'run', **flags)
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and line in done.stderr, done.stderr
    assert not list_checkpoints(tmp_path / 'run')


@pytest.mark.parametrize('code, requeued', [(143, True), (1, False), (0, False)])
def test_slurm_script_goes_back_into_the_queue_only_if_asked_to_end(tmp_path, code, requeued):
    "With stand-ins for Slurm's commands: what the script calls, and when."
    stand_ins = dict(
        srun=f'echo "srun $@"; exit {code}',
        scontrol='[ $1 = show ] && echo node7 && echo node8 || echo "scontrol $@"',
    )
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    slurm = dict(JOB_ID='40123', JOB_NODELIST='node[7-8]', NNODES='2', GPUS_ON_NODE='8')
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', **{f'SLURM_{k}': v for k, v in slurm.items()})
    script = str(TESTS.parent / 'examples/slurm.sh')
    command = ['bash', script, 'pretrain', 'images', '--out', 'a run']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    wanted = 'glsd pretrain images --out a run --nproc 8 --nnodes 2 --rdzv node7:20123'
    assert wanted in done.stdout, done.stderr
    assert ('scontrol requeue 40123' in done.stdout) == requeued
    assert done.returncode == (0 if requeued else code)


def test_an_array_of_slurm_jobs_runs_a_table_from_a_bare_clone(tmp_path):
    "Without glsd on the path the script installs it, once, and each task makes the same call."
    glsd = tmp_path / 'clone/.venv/bin/glsd'
    installs = [f'mkdir -p {glsd.parent}', f'echo \'echo "glsd $@"\' > {glsd}', f'chmod +x {glsd}']
    stand_ins = dict(srun='shift; "$@"', scontrol='echo node7', make='; '.join(['echo "make $@"', *installs]))
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    glsd.parents[2].mkdir()
    slurm = dict(JOB_ID='7', JOB_NODELIST='node7', NNODES='1', GPUS_ON_NODE='8', ARRAY_TASK_ID='2')
    env = dict(PATH=f'{tmp_path}:/usr/bin:/bin', **{f'SLURM_{k}': v for k, v in slurm.items()})
    command = ['bash', str(TESTS.parent / 'examples/slurm.sh'), 'reproduce', 'table_2', '--scale', 'paper']
    command += ['-p', 'data=/data/image net']
    for first in True, False:
        done = subprocess.run(command, env=env, cwd=glsd.parents[2], capture_output=True, text=True)
        wanted = 'glsd reproduce table_2 --scale paper -p data=/data/image net -p jobs=1 -p nproc=8\n'
        assert (done.returncode, done.stdout) == (0, 'make install\n' * first + wanted), done.stderr


@pytest.fixture
def group_of_one():
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('size', [1, 2, 3, 5])
@pytest.mark.parametrize('n', [0, 1, 2, 7, 9, 10])
def test_every_process_makes_the_same_number_of_calls(monkeypatch, n, size):
    "A9: with unequal numbers one process leaves while the others wait for it."
    monkeypatch.setattr(glsd_processes, 'world_size', lambda: size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        parts.append(rank_indices(n))
    assert len({len(part) for part in parts}) == 1
    assert sorted({i for part in parts for i in part}) == list(range(n))
    # what `all_gather_rows` makes of them: one after the other from each, the repeats left out
    rows = torch.stack([torch.tensor(part, dtype=torch.long) for part in parts], 1).flatten()[:n]
    assert rows.tolist() == list(range(n))


@pytest.mark.parametrize(
    'device, gpus, backend',
    [('cpu', 2, 'gloo'), ('auto', 2, 'nccl'), ('cuda', 2, 'nccl'), ('auto', 1, 'gloo'), ('auto', 0, 'gloo')],
)
def test_nccl_only_where_each_process_has_a_gpu_and_the_recipe_wants_it(monkeypatch, device, gpus, backend):
    "A10: device=cpu on a machine with GPUs talks over gloo."
    calls = []
    for name, value in dict(RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(dist, 'is_nccl_available', lambda: True)
    monkeypatch.setattr(
        dist, 'init_process_group', lambda name, device_id=None: calls.append((name, device_id))
    )
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: None)
    monkeypatch.setattr(glsd_processes, 'die_with_parent', lambda: None)
    with process_group(device) as several:
        assert several
    assert calls == [(backend, torch.device('cuda', 1) if backend == 'nccl' else None)]


@pytest.mark.parametrize('fused', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('method', [m for m in METHODS if hasattr(find_method(m.values[0]), 'terms')])
def test_outputs_gathered_in_a_group_of_one_are_the_outputs(group_of_one, monkeypatch, method, fused):
    recipe = small_recipe(method, fused=fused, batch_size=5, drop_path=0.0)
    trainer = Trainer(recipe, 10)
    views = next(iter(batches(recipe, build_dataset(recipe), 0, 1, trainer.method.views)))
    outputs = trainer.method.outputs(views)
    sizes = []  # 2 for the first question, so that the one process does not return at once; 1 for the others
    monkeypatch.setattr(glsd_processes, 'world_size', lambda: sizes.pop() if sizes else 1)

    def gathered(out):
        sizes.append(2)
        return all_gather_outputs(out)

    def terms(pair):
        torch.manual_seed(0)  # some deal matches at random
        with torch.no_grad():
            return trainer.method.objective.eval()(*pair, 0.04, views)

    assert apart(terms(outputs), terms([gathered(out) for out in outputs])) == 0


@linux
@pytest.mark.slow
def test_two_nodes_meet_and_start_again_together(tmp_path, undisturbed):
    """Two agents with one process each, here on one machine; a process of the second is killed, and both
    begin again from the checkpoint."""
    out = tmp_path / 'run'
    with socket.socket() as held:  # the port stays ours, and may be listened at all the same
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(('localhost', 0))
        rdzv = f'localhost:{held.getsockname()[1]}'
        nodes = [start(out, recipe=LONG, nproc=1, nnodes=2, rdzv=rdzv) for _ in range(2)]
        wait_for(lambda: list_checkpoints(out))
        os.kill(processes_of(out, rank=1)[0], signal.SIGKILL)
        ended = [(node.communicate(timeout=300)[1], node.returncode) for node in nodes]
    assert [code for _, code in ended] == [0, 0], ended
    assert apart(undisturbed, last_checkpoint(out)) == 0
    assert [line['step'] for line in read_metrics(out)] == list(range(1, 33))


def two_steps(recipe, world):
    data = build_dataset(recipe)
    trainer = Trainer(recipe, 2, world, class_names(recipe, data))
    for views in batches(recipe, data, 0, 2, trainer.method.views):
        trainer.step(views)
    return trainer


BACKBONES = [
    pytest.param('dino', name, marks=pytest.mark.slow)
    for name in ('swin_mini', 'resnet_mini', 'cvt_mini', 't2t_mini')
]
ON_VIT = [pytest.param(*m.values, plain_backbone(m.values[0]), marks=m.marks) for m in METHODS]


@pytest.mark.parametrize('method, backbone', ON_VIT + BACKBONES)
def test_every_method_and_backbone_with_fsdp(group_of_one, method, backbone):
    """Two steps with sharded weights, in a group of one process, are two steps with copies; and a state goes
    there and back."""
    recipe = small_recipe(method, backbone=backbone, batch_size=4, drop_path=0.0, clip=0.5)
    copies = two_steps(recipe, DistributedWorld()).state_dict()
    sharded = two_steps(recipe.replace(fsdp=True), ShardedWorld())
    assert apart(copies['method'], sharded.state_dict()['method']) < 1e-5
    sharded.load_state_dict(copies)
    state = sharded.state_dict()
    assert all(apart(copies[part], state[part]) == 0 for part in ('method', 'optimizer', 'step'))


def watch(out, method):
    "In each process: a sharded run with monitors that run the networks."

    def features(method, step, views):
        x = torch.randn(7, 3, 32, 32)  # an odd number, for two processes
        rows = torch.cat([method.backbone(x[i : i + 1]).pooled for i in rank_indices(len(x))])
        return {'std': all_gather_rows(rows, len(x)).std()}

    def outputs(method, step, views):
        return {'mean': sum(out.pooled.mean() for out in method.outputs(views))}

    frozen = {} if method == 'supervised' else {'freeze_last': 0}
    recipe = small_recipe(method, fsdp=True, warmup=0, monitor_every=2, steps=8, device='cpu', **frozen)
    with join_world(recipe) as world:
        monitors = dict(features=features, outputs=outputs, collapse=collapse_monitor())
        if method == 'supervised':  # one network, no heads to ask: its own monitor, the accuracy
            monitors = {'features': features, **find_method(method).monitors(recipe)}
        run = pretrain(recipe, out / method, monitors, progress=False, world=world)
        if world.rank == 0:
            assert len(run.metrics) == 8 and 'features/std' in run.metrics[1], run.metrics[1]
            assert method != 'supervised' or 'test/top1' in run.metrics[1], run.metrics[1]
        world.any(False)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['drloc', 'selfpatch_moby', 'supervised'])
def test_sharded_runs_are_watched(tmp_path, method):
    "A1: the stuck check and monitors run the sharded networks, the teacher's too, in both processes."
    in_processes(2, watch, tmp_path, method)
