"""Runs every chapter, two at a time, each in a process of its own.

nbdev_test runs many chapters in one process, where one's registered methods and backbones reach the next."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST = Path(sys.executable).parent / 'nbdev_test'


def run(path):
    "(exit code, seconds) of a chapter."
    began = time.time()
    code = subprocess.run([TEST, '--path', path], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    return code, time.time() - began


paths = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
with ThreadPoolExecutor(2) as pool:
    ended = dict(zip(paths, pool.map(run, paths)))
for path, (code, seconds) in sorted(ended.items(), key=lambda item: -item[1][1]):
    if code or seconds > 10:
        print(f'{seconds:4.0f} s  {path.relative_to(ROOT)}{"  FAILED" if code else ""}')
sys.exit(any(code for code, _ in ended.values()))
