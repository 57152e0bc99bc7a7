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

from glsd.training import Recipe
from glsd.training.checkpoint import last_checkpoint, list_checkpoints, read_metrics

RECIPE = Recipe(
    n_images=48,
    image_size=32,
    global_size=32,
    local_size=16,
    n_local=2,
    local_scale=(0.3, 0.6),
    backbone='vit_mini',
    drop_path=0.0,
    out_dim=32,
    head_hidden=32,
    head_bottleneck=16,
    head_batchnorm=True,
    batch_size=16,
    steps=20,
    lr=0.016,
    momentum=0.9,
    teacher_temp=0.04,
    freeze_last=0.1,
    checkpoint_every=4,
    device='cpu',
)
SETTINGS = dict(
    copies=['vanilla', 'similarity', 'geometric'], fsdp=['geometric']
)  # the losses know nothing of how weights are kept
GLSD = [sys.executable, '-c', 'import sys; from glsd.cli import main; sys.exit(main())']
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))

# each process trains the settings in double precision, so that what is left of a difference is no rounding;
# process 0 writes losses and weights; the second half of the run starts from the first half of another number of processes
TRAIN = """
import sys, torch
from pathlib import Path
from glsd.training.loop import Trainer, batches, build_dataset
from glsd.training.processes import joined
from glsd.training import Recipe
from test_training_processes import RECIPE, SETTINGS

def double(views):
    views.crops = [c.double() for c in views.crops]
    return views

def follow(out, world, fsdp, start=None):
    torch.set_default_dtype(torch.float64); torch.set_num_threads(1)
    for setting in SETTINGS[fsdp]:
        recipe, losses = RECIPE.replace(objective=setting, fsdp=fsdp == 'fsdp'), []
        dataset, trainer = build_dataset(recipe), Trainer(recipe, 20, world)
        if start:
            trainer.load_state_dict(torch.load(Path(start)/f'{setting}_10.pt'))
        for views in batches(recipe, dataset, trainer.done, 20, world=world):
            losses.append(trainer.step(double(views))['loss'])
            if trainer.done not in (10, 20): continue
            state = trainer.state_dict()                        # of sharded weights: all must ask
            if world.rank == 0: torch.save(state, Path(out)/f'{setting}_{trainer.done}.pt')
        if world.rank == 0: torch.save(losses, Path(out)/f'{setting}_losses.pt')

if __name__ == '__main__':
    with joined() as world: follow(sys.argv[1], world, *sys.argv[2:])
"""


def torchrun(n, script, *args):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            str(n),
            str(script),
            *map(str, args),
        ],
        env=dict(ENV, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), ENV['PYTHONPATH']])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def apart(a, b):
    "The largest difference between two nested states."
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, dict):
        return max([apart(a[k], b[k]) for k in a], default=0.0)
    if isinstance(a, (list, tuple)):
        return max([apart(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    return 0.0 if a == b else float(abs(a - b)) if isinstance(a, float) else float('inf')


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "The script, and what one process made with it."
    out = tmp_path_factory.mktemp('one')
    script = out / 'train.py'
    script.write_text(TRAIN)
    torchrun(1, script, out, 'copies')
    return script, out


@pytest.mark.parametrize('how', SETTINGS)
def test_n_processes_follow_one_and_go_on_as_m(tmp_path, one, how):
    script, folders = one[0], {1: one[1], 2: tmp_path / '2', 4: tmp_path / '4'}
    for n in 2, 4:
        folders[n].mkdir()
    torchrun(2, script, folders[2], how)
    torchrun(4, script, folders[4], how, folders[2])  # from the checkpoint of two, after ten steps
    read = lambda n, name: torch.load(folders[n] / f'{name}.pt')
    for setting in SETTINGS[how]:
        alone = read(1, f'{setting}_losses')
        assert len(alone) == 20 and apart(alone, read(2, f'{setting}_losses')) < 1e-6
        assert apart(alone[10:], read(4, f'{setting}_losses')) < 1e-6
        for n in 2, 4:
            for part in 'student', 'teacher', 'objective':
                assert apart(read(1, f'{setting}_20')[part], read(n, f'{setting}_20')[part]) < 1e-6, (n, part)
        moved = apart(read(1, f'{setting}_20')['student'], read(1, f'{setting}_10')['student'])
        assert moved > 1e-3  # or the comparison would prove nothing


def words(out, recipe=RECIPE, **flags):
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / 'asked.yaml')
    return ['pretrain', '--recipe', str(out / 'asked.yaml'), '--out', str(out)] + [
        w for k, v in flags.items() for w in (f'--{k}', str(v))
    ]


def start(out, **flags):
    return subprocess.Popen(
        GLSD + words(out, **flags),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


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
        if any(w.startswith('GLSD_ARGV=') and str(out) in w for w in env) and (
            rank is None or f'RANK={rank}' in env
        ):
            found.append(int(p.name))
    return found


linux = pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds processes in /proc')
LONG = RECIPE.replace(steps=48, objective='geometric')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'undisturbed'
    run = start(out, recipe=LONG, nproc=2)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    return last_checkpoint(out)


@linux
def test_one_process_is_killed_and_the_weights_are_the_same(tmp_path, undisturbed):
    run = start(tmp_path / 'run', recipe=LONG, nproc=2)
    wait_for(lambda: list_checkpoints(tmp_path / 'run'))
    os.kill(processes_of(tmp_path / 'run', rank=1)[0], signal.SIGKILL)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert apart(undisturbed, last_checkpoint(tmp_path / 'run')) == 0 and [
        l['step'] for l in read_metrics(tmp_path / 'run')
    ] == list(range(1, 49))


@linux
def test_sigterm_is_a_checkpoint_and_an_exit(tmp_path, undisturbed):
    out = tmp_path / 'run'
    run = start(out, recipe=LONG.replace(checkpoint_every=1000), nproc=2)
    wait_for(lambda: len(read_metrics(out)) >= 3)
    run.terminate()
    _, errors = run.communicate(timeout=200)
    reached = last_checkpoint(out)['step']
    assert run.returncode == 143 and f'asked to end after step {reached}' in errors, errors
    assert 3 <= reached < 48 and not processes_of(out)
    assert (
        subprocess.run(GLSD + words(out, recipe=LONG), env=ENV, capture_output=True).returncode == 0
    )  # one goes on alone
    assert (
        last_checkpoint(out)['step'] == 48
        and apart(undisturbed['teacher'], last_checkpoint(out)['teacher']) < 1e-2
    )


def test_sigterm_alone(tmp_path):
    run = start(tmp_path / 'run', recipe=LONG.replace(checkpoint_every=1000))
    wait_for(lambda: read_metrics(tmp_path / 'run'))
    run.terminate()
    _, errors = run.communicate(timeout=200)
    assert (
        run.returncode == 143
        and 'the same call goes on' in errors
        and last_checkpoint(tmp_path / 'run')['step'] >= 1
    )


@linux
@pytest.mark.parametrize('how', ['SIGKILL', 'SIGINT'])
def test_a_notebook_that_ends_leaves_no_process(tmp_path, how):
    out, script = tmp_path / 'run', tmp_path / 'cell.py'
    script.write_text(f"""
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from glsd.training.processes import launch
from test_training_processes import LONG
launch(LONG.replace(steps=100000), {str(out)!r}, nproc=2, progress=False)""")
    cell = subprocess.Popen(
        [sys.executable, str(script)],
        env=dict(ENV, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), ENV['PYTHONPATH']])),
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: list_checkpoints(out))
    assert len(processes_of(out)) >= 2
    cell.send_signal(getattr(signal, how))
    cell.wait()
    wait_for(lambda: not processes_of(out), 60)


def test_bad_input_is_one_line_and_not_tried_again(tmp_path):
    for flags, line in [
        (dict(nproc=3), 'batch_size=16 cannot be shared equally by 3 processes'),
        (dict(nproc=0), '--nproc and --nnodes must be 1 or more'),
        (dict(nnodes=2), 'several nodes need a place to meet: --rdzv HOST:PORT'),
    ]:
        done = subprocess.run(
            GLSD + words(tmp_path / 'run', **flags), env=ENV, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and line in done.stderr, done.stderr
    assert not list_checkpoints(tmp_path / 'run')


@pytest.mark.parametrize('code, requeued', [(143, True), (1, False), (0, False)])
def test_slurm_script_goes_back_into_the_queue_only_if_asked_to_end(tmp_path, code, requeued):
    "With stand-ins for Slurm's commands: what the script calls, and when."
    for name, body in dict(
        srun=f'echo "srun $@"; exit {code}',
        scontrol='[ $1 = show ] && echo node7 && echo node8 || echo "scontrol $@"',
    ).items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        SLURM_JOB_ID='40123',
        SLURM_JOB_NODELIST='node[7-8]',
        SLURM_NNODES='2',
        SLURM_GPUS_ON_NODE='8',
    )
    done = subprocess.run(
        [
            'bash',
            str(Path(__file__).parent.parent / 'examples/slurm.sh'),
            'pretrain',
            'images',
            '--out',
            'a run',
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert 'glsd pretrain images --out a run --nproc 8 --nnodes 2 --rdzv node7:20123' in done.stdout, (
        done.stderr
    )
    assert ('scontrol requeue 40123' in done.stdout) == requeued and done.returncode == (
        0 if requeued else code
    )


@pytest.mark.parametrize('fused', [False, True])
def test_what_all_have_said_is_what_one_has_said(fused):
    "For every setting: collapse figures of gathered outputs, in a group of one process, are those of the outputs themselves."
    from torch import distributed as dist

    from glsd.evaluation.collapse import collapse_figures
    from glsd.objectives.dino import SETTINGS as ALL
    from glsd.training import Trainer
    from glsd.training.loop import batches, build_dataset
    from glsd.training.processes import everybodys_outputs

    for name in ALL:
        recipe = RECIPE.replace(objective=name, fused=fused, n_query=3, batch_size=5)
        trainer = Trainer(recipe, 10)
        views = next(batches(recipe, build_dataset(recipe), 0, 1, trainer.multicrop))
        student, teacher, _ = trainer.forward(views, 0.04)
        figures = lambda *outputs: (
            torch.manual_seed(0) and collapse_figures(*outputs, trainer.objective, 0.04)
        )  # shuffled deals at random
        alone = figures(student, teacher)
        dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
        try:
            assert figures(everybodys_outputs(student), everybodys_outputs(teacher)) == alone, name
        finally:
            dist.destroy_process_group()


@linux
def test_two_nodes_meet_and_start_again_together(tmp_path, undisturbed):
    "Two agents with one process each, here on one machine; a process of the second dies, and both begin again from the checkpoint."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    out = tmp_path / 'run'
    nodes = [start(out, recipe=LONG, nproc=1, nnodes=2, rdzv=f'localhost:{port}') for _ in range(2)]
    wait_for(lambda: list_checkpoints(out))
    os.kill(processes_of(out, rank=1)[0], signal.SIGKILL)
    ended = [(n.communicate(timeout=300)[1], n.returncode) for n in nodes]
    assert [code for _, code in ended] == [0, 0], ended
    assert apart(undisturbed, last_checkpoint(out)) == 0 and [l['step'] for l in read_metrics(out)] == list(
        range(1, 49)
    )


def test_every_setting_and_backbone_with_fsdp():
    "Two steps of every setting, and of DINO on every kind of backbone, with sharded weights, in a group of one process, are two steps with copies; and a state goes there and back."
    from torch import distributed as dist

    from glsd.objectives import SETTINGS as ALL
    from glsd.training import Trainer
    from glsd.training.loop import batches, build_dataset
    from glsd.training.processes import Group

    def two_steps(recipe):
        trainer = Trainer(recipe, 2, Group())
        for views in batches(recipe, build_dataset(recipe), 0, 2, trainer.multicrop):
            trainer.step(views)
        return trainer

    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    try:
        for name, backbone in [(name, 'vit_mini') for name in ALL] + [
            ('vanilla', b) for b in ('swin_mini', 'resnet_mini', 'cvt_mini', 't2t_mini')
        ]:
            recipe = RECIPE.replace(objective=name, backbone=backbone, n_query=3, batch_size=4, freeze_last=0)
            copies, cut = two_steps(recipe).state_dict(), two_steps(recipe.replace(fsdp=True))
            for part in 'student', 'teacher', 'objective':
                assert apart(copies[part], cut.state_dict()[part]) < 1e-5, (name, part)
            cut.load_state_dict(copies)
            assert all(
                apart(copies[part], cut.state_dict()[part]) == 0 for part in copies if part != 'recipe'
            ), name
    finally:
        dist.destroy_process_group()
