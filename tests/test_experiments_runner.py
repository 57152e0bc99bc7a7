"Faults of a grid: cells that are killed, a parent that is killed or interrupted, two grids in one folder."

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from glsd.experiments import run_grid, runner
from glsd.training import Recipe

TINY = Recipe(
    n_images=64,
    image_size=32,
    backbone='vit_mini',
    global_size=32,
    local_size=16,
    n_local=0,
    batch_size=8,
    steps=3,
    out_dim=64,
    head_hidden=32,
    head_bottleneck=16,
    objective='vanilla',
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


def test_a_killed_cell_and_a_raising_one_do_not_stop_the_others(tmp_path):
    cells = {
        'killed': TINY.replace(seed=1),
        'raises': TINY.replace(seed=2),
        'fine': TINY,
        'also fine': TINY.replace(seed=3),
    }
    killed, raises, fine, also = run_grid(cells, tmp_path, rude, jobs=1, progress=False)
    assert 'SIGKILL' in killed['error'] and Path(killed['log']).is_file()
    assert raises['error'] == "KeyError: 'no such thing'" and 'Traceback' in Path(raises['log']).read_text()
    assert fine['metrics'] == also['metrics'] == {'steps': 3}
    assert not [p for p in psutil.Process().children() if 'runner' in ' '.join(p.cmdline())]
    assert {p.parent.name.rsplit('-', 1)[0] for p in tmp_path.glob('*/result.json')} == {'fine', 'also_fine'}


PARENT = """
import sys, inspect
sys.path.insert(0, {tests!r})
from test_experiments_runner import LONG, count
from glsd.experiments import run_grid
run_grid({{'long': LONG}}, {out!r}, count, jobs=1, progress=False)
"""
LONG = TINY.replace(steps=40, checkpoint_every=4)


def test_a_killed_grid_leaves_no_process_and_goes_on(tmp_path):
    folder = runner.cell_folder(tmp_path, 'long', LONG)
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT.format(tests=str(Path(__file__).parent), out=str(tmp_path))]
    )
    wait_for(lambda: runner.steps_done(folder) >= 10)
    with pytest.raises(ValueError, match='in use by process'):
        run_grid({'long': LONG}, tmp_path, count)

    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    parent.kill()
    parent.wait()
    psutil.wait_procs(workers, timeout=10)
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]

    done = runner.steps_done(folder)
    assert 8 <= done < 40, 'killed too late to show anything'
    before = (folder / 'metrics.jsonl').read_bytes().splitlines()[:8]
    [result] = run_grid({'long': LONG}, tmp_path, count, jobs=1, progress=False)
    assert result['metrics'] == {'steps': 40}
    # the log has wall-clock times in it: the first steps were not made again
    assert (folder / 'metrics.jsonl').read_bytes().splitlines()[:8] == before


def test_an_interrupt_ends_the_workers(tmp_path):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in a shell's background is born deaf to it
    threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
    seen = []
    with pytest.raises(KeyboardInterrupt):
        hire = runner.Grid.hire
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                runner.Grid,
                'hire',
                lambda grid, slot: (hire(grid, slot), seen.append(grid.workers[-1].process))[0],
            )
            run_grid({'one': TINY, 'two': TINY.replace(seed=5)}, tmp_path, count, jobs=2, progress=False)
    assert len(seen) == 2 and all(p.poll() is not None for p in seen)


def test_a_worker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.sys, 'executable', '/bin/false')
    with pytest.raises(RuntimeError, match='did not start.*exit code 1.*worker0.log'):
        run_grid({'one': TINY}, tmp_path, count, progress=False)


def test_another_measurement_does_not_train_again(tmp_path):
    folder = runner.cell_folder(tmp_path, 'one', TINY)
    runner.run_cell(folder, TINY.differences(), runner.source_of(count), {})
    written = (folder / 'metrics.jsonl').stat().st_mtime_ns
    result = json.loads((folder / 'result.json').read_text())
    assert runner.read_result(folder, runner.fingerprint(runner.source_of(count), {'k': 1})) is None

    def steps_twice(run):
        return {'twice': 2 * len(run.metrics)}

    runner.run_cell(folder, TINY.differences(), runner.source_of(steps_twice), {})
    assert json.loads((folder / 'result.json').read_text())['metrics'] == {'twice': 6} and result[
        'metrics'
    ] == {'steps': 3}
    assert (folder / 'metrics.jsonl').stat().st_mtime_ns == written


def test_a_run_of_a_grid_may_have_several_processes(tmp_path):
    still = TINY.replace(drop_path=0.0)  # each process would drop other paths
    shared, refused = run_grid(
        {'shared': still, 'too many': TINY.replace(batch_size=9)},
        tmp_path,
        count,
        jobs=1,
        nproc=2,
        progress=False,
    )
    assert (
        shared['metrics'] == {'steps': 3}
        and refused['error']
        == 'ValueError: batch_size=9 cannot be shared equally by 2 processes: choose a multiple of 2'
    )
    (alone,) = run_grid({'alone': still}, tmp_path / 'alone', count, jobs=1, progress=False)
    first = lambda r: json.loads((Path(r['folder']) / 'metrics.jsonl').read_text().splitlines()[0])['loss']
    assert abs(first(shared) - first(alone)) < 1e-4
