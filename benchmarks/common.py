"""What the benchmarks share: one core, a clock, and a last line of JSON for run.py to read."""

import argparse
import json
import os
import resource
import statistics
import sys
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported


def start(description):
    "-> True for a quick run. One thread, unless OMP_NUM_THREADS says otherwise."
    import torch

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        '--quick', action='store_true', help='a few seconds, to see that it runs; its figures mean little'
    )
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    torch.manual_seed(0)
    return parser.parse_args().quick


# Processor time, not the clock on the wall: with one thread they are the same on an idle machine, and what
# other
# processes do on a busy one is not counted.
now = time.process_time


def seconds(f):
    "Processor seconds of one call."
    began = now()
    f()
    return now() - began


def interleaved(contestants, rounds, warm_up=1):
    """{name: median seconds}: every contestant once a round, so that a slow minute of the machine is shared
    by all."""
    times = {name: [] for name in contestants}
    for _ in range(warm_up + rounds):
        for name, f in contestants.items():
            times[name].append(seconds(f))
    return {name: statistics.median(t[warm_up:]) for name, t in times.items()}


def peak_memory():
    "The most memory this process has held so far, in bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def emit(**figures):
    print(json.dumps(figures))
