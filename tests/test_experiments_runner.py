"Faults of a grid: cells that are killed, a parent that is killed or interrupted, two grids in one folder."

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from glsd.experiments import cells, run_grid, runner, workers
from glsd.training import Recipe

CROPS = dict(n_images=64, image_size=32, global_size=32, local_size=16, n_local=0)
HEADS = dict(out_dim=64, head_hidden=32, head_bottleneck=16)
TINY = Recipe('dino', backbone='vit_mini', batch_size=8, steps=3, **CROPS, **HEADS)
LABELLED = Recipe(
    'supervised',
    backbone='vit_mini',
    n_images=64,
    n_test=32,
    image_size=32,
    global_size=32,
    batch_size=8,
    steps=3,
)


def rude(run):
    import os

    if run.recipe.seed == 1:
        os.kill(os.getpid(), 9)
    if run.recipe.seed == 2:
        raise KeyError('no such thing')
    return {'steps': len(run.metrics)}


def count(run):
    return {'steps': len(run.metrics)}


def wait_for(what, seconds=300):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_cell_and_a_raising_one_do_not_stop_the_others(tmp_path):
    grid = {
        'killed': TINY.replace(seed=1),
        'raises': TINY.replace(seed=2),
        'fine': TINY,
        'also fine': TINY.replace(seed=3),
    }
    killed, raises, fine, also = run_grid(grid, tmp_path, rude, jobs=1, progress=False)
    assert 'SIGKILL' in killed['error'] and Path(killed['log']).is_file()
    assert raises['error'] == "KeyError: 'no such thing'" and 'Traceback' in Path(raises['log']).read_text()
    assert fine['metrics'] == also['metrics'] == {'steps': 3}
    assert not [p for p in psutil.Process().children() if 'experiments.workers' in ' '.join(p.cmdline())]
    assert {p.parent.name.rsplit('-', 1)[0] for p in tmp_path.glob('*/result.json')} == {'fine', 'also_fine'}


PARENT = """
import sys, inspect
sys.path.insert(0, {tests!r})
from test_experiments_runner import LONG, count
from glsd.experiments import run_grid
run_grid({{'long': LONG}}, {out!r}, count, jobs=1, progress=False)
"""
LONG = TINY.replace(steps=40, checkpoint_every=4)


@pytest.mark.slow
def test_a_killed_grid_leaves_no_process_and_goes_on(tmp_path):
    folder = cells.cell_folder(tmp_path, 'long', LONG)
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT.format(tests=str(Path(__file__).parent), out=str(tmp_path))]
    )
    wait_for(lambda: cells.steps_done(folder) >= 10)
    with pytest.raises(runner.OthersAtWork, match='1 of 1 cells still run in other processes'):
        run_grid({'long': LONG}, tmp_path, count)

    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    parent.kill()
    parent.wait()
    psutil.wait_procs(workers, timeout=10)
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]

    done = cells.steps_done(folder)
    assert 8 <= done < 40, 'killed too late to show anything'
    before = (folder / 'metrics.jsonl').read_bytes().splitlines()[:8]
    [result] = run_grid({'long': LONG}, tmp_path, count, jobs=1, progress=False)
    assert result['metrics'] == {'steps': 40}
    # the log has wall-clock times in it: the first steps were not made again
    assert (folder / 'metrics.jsonl').read_bytes().splitlines()[:8] == before


def test_an_interrupt_ends_the_workers(tmp_path):
    # a job in the background of a shell starts with this signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
    seen = []
    with pytest.raises(KeyboardInterrupt):
        start = runner.Grid.start_worker

        def noticed(grid, slot):
            start(grid, slot)
            seen.append(grid.workers[-1].process)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.Grid, 'start_worker', noticed)
            run_grid({'one': TINY, 'two': TINY.replace(seed=5)}, tmp_path, count, jobs=2, progress=False)
    assert len(seen) == 2 and all(p.poll() is not None for p in seen)


def test_a_worker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.sys, 'executable', '/bin/false')
    with pytest.raises(RuntimeError, match='did not start.*exit code 1.*worker0.log'):
        run_grid({'one': TINY}, tmp_path, count, progress=False)


def test_a_worker_of_an_earlier_round_that_exits_late_is_not_heard(tmp_path):
    grid = runner.Grid({'a': TINY}, tmp_path, count, {}, 1, 1)
    late = workers.Worker.__new__(workers.Worker)
    grid.handle(late, None)
    assert not grid.workers and not grid.results and list(grid.waiting) == ['a']


def test_another_measurement_does_not_train_again(tmp_path):
    folder = cells.cell_folder(tmp_path, 'one', TINY)
    cells.run_cell(folder, TINY.to_dict(), cells.source_of(count), {})
    written = (folder / 'metrics.jsonl').stat().st_mtime_ns
    result = json.loads((folder / 'result.json').read_text())
    assert cells.read_result(folder, cells.fingerprint(cells.source_of(count), {'k': 1})) is None

    def steps_twice(run):
        return {'twice': 2 * len(run.metrics)}

    cells.run_cell(folder, TINY.to_dict(), cells.source_of(steps_twice), {})
    assert result['metrics'] == {'steps': 3}
    assert json.loads((folder / 'result.json').read_text())['metrics'] == {'twice': 6}
    assert (folder / 'metrics.jsonl').stat().st_mtime_ns == written


def first_loss(result):
    return json.loads((Path(result['folder']) / 'metrics.jsonl').read_text().splitlines()[0])['loss']


@pytest.mark.slow
def test_a_run_of_a_grid_may_have_several_processes(tmp_path):
    still = TINY.replace(drop_path=0.0)  # each process would drop other paths
    grid = {'shared': still, 'labelled': LABELLED, 'too many': TINY.replace(batch_size=9)}
    shared, labelled, refused = run_grid(grid, tmp_path, count, jobs=1, nproc=2, progress=False)
    assert shared['metrics'] == labelled['metrics'] == {'steps': 3}
    assert (
        0
        <= json.loads((Path(labelled['folder']) / 'metrics.jsonl').read_text().splitlines()[-1])['test/top1']
    )
    expected = 'batch_size=9 cannot be shared equally by 2 processes: choose a multiple of 2'
    assert refused['error'] == f'ValueError: {expected}'
    (single,) = run_grid({'single': still}, tmp_path / 'single', count, jobs=1, progress=False)
    assert abs(first_loss(shared) - first_loss(single)) < 1e-4


def test_a_folder_stands_for_what_changes_the_result():
    folder = cells.cell_folder('out', 'a b', TINY)
    assert folder == cells.cell_folder(
        'out', 'a b', TINY.replace(device='cpu', checkpoint_minutes=3, monitor_every=2)
    )
    others = [TINY.replace(lr=1e-3), TINY.replace(method='geometric'), LABELLED]
    assert len({cells.cell_folder('out', 'a b', r) for r in [TINY, *others]}) == 4
    again = Recipe.from_dict(json.loads(json.dumps(TINY.to_dict())))
    assert again == TINY and cells.cell_folder('out', 'a b', again) == folder


def test_half_of_a_grid_may_have_been_run_on_another_machine(tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    for root in here, there:
        (root / 'train/cats').mkdir(parents=True)
        for k in range(4):
            Image.new('RGB', (32, 32), (60 * k,) * 3).save(root / f'train/cats/{k}.png')
    grids = {w: {'one': TINY.replace(data=str(w / 'train'), batch_size=4)} for w in (here, there)}
    (ran,) = run_grid(grids[there], there / 'cells', count, jobs=1, progress=False)
    small = Path(ran['folder']).relative_to(there) / 'result.json'
    assert str(tmp_path) not in (there / small).read_text()
    (here / small).parent.mkdir(parents=True)
    shutil.copy(there / small, here / small)
    (read,) = run_grid(grids[here], here / 'cells', count, jobs=1, progress=False)
    assert read['metrics'] == ran['metrics']
    assert not (here / small).with_name('metrics.jsonl').exists()  # nothing was trained again


@pytest.mark.parametrize(
    'change', [dict(jobs=0), dict(nproc=0), dict(evaluate=len), dict(cells={'a b': TINY, 'a?b': TINY})]
)
def test_what_cannot_run_is_one_line(tmp_path, change):
    with pytest.raises(ValueError) as e:
        run_grid(**{'cells': {'one': TINY}, 'out': tmp_path, 'evaluate': count, **change})
    assert '\n' not in str(e.value) and not list(tmp_path.glob('*/result.json'))


NODE = """
import json, sys
sys.path.insert(0, {tests!r})
from test_experiments_runner import SHARED, first_and_last
from glsd.experiments import run_grid
from glsd.experiments.compare import markdown
from glsd.experiments.runner import OthersAtWork

try:
    results = run_grid(SHARED, {out!r}, first_and_last, jobs=1, nproc={nproc}, progress=False)
except OthersAtWork as e:
    print('others at work:', e)
else:
    rows = [[r['name'], *r['metrics'].values()] for r in results]
    print(markdown(['', 'first', 'last'], rows))
"""
STILL = TINY.replace(drop_path=0.0, steps=24, checkpoint_every=4)
SHARED = {m: STILL.replace(method=m) for m in ('vanilla', 'geometric')}


def first_and_last(run):
    return {'first': run.metrics[0]['loss'], 'last': run.metrics[-1]['loss']}


def node(out, nproc=2):
    "A machine of a cluster, as far as the runner can tell: a process with the grid's folder in common."
    command = [sys.executable, '-c', NODE.format(tests=str(Path(__file__).parent), out=str(out), nproc=nproc)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def claimed(out):
    return {p.parent.name for p in Path(out).glob('*/claim')}


@pytest.mark.slow
def test_two_nodes_share_a_grid_and_one_is_killed(tmp_path):
    "Cells of two gloo processes each; the table is that of a grid which nobody disturbed."
    undisturbed, _ = node(tmp_path / 'one').communicate(timeout=600)
    out = tmp_path / 'two'
    folders = [cells.cell_folder(out, name, r) for name, r in SHARED.items()]
    nodes = [node(out), node(out)]
    wait_for(lambda: len(claimed(out)) == 2)
    wait_for(lambda: all(8 <= cells.steps_done(f) for f in folders if f.name in claimed(out)))
    held = claimed(out)
    begun = {name: (out / name / 'metrics.jsonl').read_bytes().splitlines()[:4] for name in held}
    workers = psutil.Process(nodes[0].pid).children(recursive=True)
    nodes[0].kill()
    nodes[0].wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert workers and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    nodes[0] = node(out)  # back from the queue
    said = [n.communicate(timeout=600)[0] for n in nodes]
    tables = [s for s in said if s.startswith('|')]
    assert tables and all(t == undisturbed for t in tables), said
    assert all(s.startswith(('|', 'others at work: ')) for s in said)
    assert not claimed(out)
    # no cell began again: the log has wall-clock times in it
    assert len(begun) == 2
    assert begun == {name: (out / name / 'metrics.jsonl').read_bytes().splitlines()[:4] for name in held}
    for folder in folders:
        steps = [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        assert steps == list(range(1, 25))
