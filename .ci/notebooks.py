"""Runs every chapter, two at a time, each in a process of its own.

nbdev_test runs many chapters in one process, where one's registered methods and backbones reach the next.
Here each is forked from a process that has imported torch and nothing else of note."""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdev.test import test_nb

ROOT = Path(__file__).resolve().parent.parent


def run_here(path, start_method):
    multiprocessing.set_start_method(start_method, force=True)  # what a chapter starts is started as always
    passed, _ = test_nb(path, skip_flags=['notest'], basepath=ROOT)
    sys.exit(not passed)


def main():
    os.chdir(ROOT / 'nbs')
    start_method, context = multiprocessing.get_start_method(), multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'timm', 'matplotlib.pyplot', 'nbdev.test'])

    def run(path):
        "(exit code, seconds) of a chapter."
        began, process = time.time(), context.Process(target=run_here, args=[path, start_method])
        process.start()
        process.join()
        return process.exitcode, time.time() - began

    paths = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(paths, pool.map(run, paths)))
    for path, (code, seconds) in sorted(ended.items(), key=lambda item: -item[1][1]):
        if code or seconds > 10:
            print(f'{seconds:4.0f} s  {path.relative_to(ROOT)}{"  FAILED" if code else ""}')
    sys.exit(any(code for code, _ in ended.values()))


if __name__ == '__main__':
    main()
