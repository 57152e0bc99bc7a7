"""The benchmarks run from another folder, agree with their plain rivals (run.py checks that), and write what they print."""
import json, subprocess, sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent.parent / 'benchmarks' / 'run.py'

def test_quick_run_prints_and_writes(tmp_path):
    done = subprocess.run([sys.executable, str(RUN), '--quick', '--out', str(tmp_path / 'new')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'new/benchmarks.json').read_text())
    assert found['quick'] and found['machine']['torch']
    assert found['views']['glsd'] > 0 and found['loss']['glsd']['seconds'] > 0 and found['knn']['product'] > 0
    for extra in found['local'].values(): assert extra['seconds'][extra['with_']] > 0 and extra['more_operations'] > 0
    assert set(found['step']['split']) == {'views', 'student', 'teacher', 'loss', 'backward', 'optimiser'}
    report = (tmp_path / 'new/benchmarks.md').read_text()
    assert 'dual loss' in report and "ADCLR's queries" in report and 'dual loss' in done.stdout
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == ['benchmarks.json', 'benchmarks.md']

def test_contestants_that_disagree_are_refused():
    sys.path.insert(0, str(RUN.parent))
    try: from run import same
    finally: sys.path.remove(str(RUN.parent))
    same('loss', 1., 1.00001, 1e-4)
    with pytest.raises(SystemExit, match='they should agree'): same('loss', 1., 1.1, 1e-4)
