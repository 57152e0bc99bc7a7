#!/usr/bin/env python3
"""Measures glsd on this machine, one core, beside plain implementations of the same thing, and prints a
table.

Each measurement has a process of its own. Writes benchmarks.json and benchmarks.md into --out (default
results/; with
--quick nothing is written unless --out says where)."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def measure(name, quick, **env):
    "Runs bench_<name>.py in its own process -> its figures."
    print(f'measuring {" ".join([name, *env.values()])} ...', file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f'bench_{name}.py')] + ['--quick'] * quick
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **env},
    )
    if done.returncode:
        raise SystemExit(f'bench_{name}.py failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


LOSSES = 'glsd', 'plain', 'fused', 'stored', 'plain_z'  # the last three begin before the last layer


def same(what, a, b, tolerance):
    "A benchmark of two things that compute something else would be worthless."
    if abs(a - b) > tolerance * max(abs(a), abs(b)):
        sys.exit(f'{what}: glsd gives {a}, the plain way {b}; they should agree')


def measure_all(quick):
    with ThreadPoolExecutor(2 if quick else 1) as pool:  # one after the other, but where figures mean little
        jobs = {c: pool.submit(measure, 'loss', quick, CONTESTANT=c) for c in LOSSES}
        jobs |= {
            name: pool.submit(measure, name, quick)
            for name in ('views', 'step', 'train', 'knn', 'local', 'masked', 'contrastive')
        }
        results = {name: job.result() for name, job in jobs.items()}
    results['loss'] = {c: results.pop(c) for c in LOSSES}
    for a, b in ('glsd', 'plain'), ('fused', 'plain_z'), ('stored', 'plain_z'):
        for k in 'view', 'region', 'gradient':
            same(f'loss, {a}, {k}', results['loss'][a][k], results['loss'][b][k], 1e-5)
    for a, b in zip(results['knn']['accuracy'], results['knn']['accuracy_plain']):
        same('k-NN accuracy', a, b, 2e-3)
    if isinstance(results['masked']['hog'], dict):
        same('HOG, share of numbers that agree', results['masked']['hog']['agree'], 1.0, 2e-3)
    check_contrastive(results['contrastive'])
    for name, t in whole_steps(results):
        same(f'whole step, {name}, loss', t['loss'], t['loss_plain'], 1e-4)
    return results


def check_contrastive(c):
    values = c['infonce']['values']
    same('InfoNCE, loop', *values['loop'], 1e-5)
    same("InfoNCE, lightly's", values['glsd'], values.get('lightly', values['glsd']), 1e-5)
    if not c['queue']['same'] or max(c['sinkhorn']['apart'], c['rbd']['apart']) > 1e-4:
        sys.exit('neighbours, Sinkhorn-Knopp or saliency: glsd and the plain way disagree')


def whole_steps(results):
    return [(name, t) for name, t in results['train'].items() if name != 'gpu']


def views_rows(v):
    blur = "- beside plain with Pillow's approximate blur"
    yield 'decode + views 2 x 224 + 8 x 96', 'images/s', v['glsd'], v['plain'], v['glsd'] / v['plain']
    yield blur, 'images/s', v['glsd'], v['plain_pil_blur'], v['glsd'] / v['plain_pil_blur']
    yield '- decode alone', 'images/s', v['decode'], None, None


def less_rows(what, peak, ours, plain):
    "Seconds and peak megabytes: how many times less."
    for text, unit, key in (what, 's', 'seconds'), (peak, 'MB', 'megabytes'):
        yield text, unit, ours[key], plain[key], plain[key] / ours[key]


def loss_rows(loss):
    size = f'batch {loss["glsd"]["batch"]}, {loss["glsd"]["prototypes"]:,} prototypes'
    peak = '- its peak beyond the inputs'
    yield from less_rows(f'dual loss, {size}', peak, loss['glsd'], loss['plain'])
    peak += ', gradients included'
    fused = 'dual loss and last layer, logits not stored'
    yield from less_rows(fused, peak, loss['fused'], loss['plain_z'])
    yield from less_rows('- with stored logits', peak, loss['stored'], loss['plain_z'])


def knn_rows(k):
    size = f"k-NN {k['queries']:,} x {k['bank']:,} x {k['dim']}, 4 k's"
    yield size, 's', k['glsd'], k['plain'], k['plain'] / k['glsd']
    times = f'k-NN is {k["glsd"] / k["product"]:.2f} times it'
    yield f'- one matrix product of that size ({times})', 's', k['product'], None, None


def step_rows(s):
    name = f'training step, {s["recipe"]["backbone"]}, batch {s["recipe"]["batch_size"]}'
    yield name, 's', s['seconds'], None, None
    for part, t in s['split'].items():
        yield f'- {part}', 's', t, None, None


def train_rows(r):
    for _, t in whole_steps(r):
        n = t['recipe']
        size = f'{n["backbone"]}, batch {n["batch_size"]}, {n["out_dim"]:,} prototypes'
        yield f'whole step from JPEG files, {size}', 's', t['glsd'], t['plain'], t['plain'] / t['glsd']


def gpu_rows(gpu):
    if isinstance(gpu, str):
        yield f'whole step on a GPU: {gpu}', '', None, None, None
        return
    for backbone, g in gpu.items():
        if isinstance(g, dict):
            rate = f'{g["share_of_matmul_rate"]:.0%} of {gpu["matmul_tflops"]:.0f} TFLOP/s'
            what = f'batch {g["batch"]}, bf16, {gpu["name"]} ({g["peak_gb"]:.0f} GB, {rate})'
            yield f'whole step, {backbone}, {what}', 'images/s', g['images_per_second'], None, None


def local_rows(what, pronoun, local):
    n, seconds = local['recipe'], local['seconds']
    size = f'{n["backbone"]}, batch {n["batch_size"]}'
    yield f'step without {what}, {size}', 's', seconds[local['without']], None, None
    more = f'{local["more_seconds"]:+.1%} of the time, {local["more_operations"]:+.1%} of the operations'
    yield f'- with {pronoun} ({more})', 's', seconds[local['with_']], None, None


def masked_rows(m):
    size = f'{m["mae"]["backbone"]}, batch {m["mae"]["batch"]}, three quarters hidden'
    (ours, plain), (kept, kept_plain) = (m['mae'][what].values() for what in ('seconds', 'bytes'))
    yield f'MAE step, {size} (plain: with mask tokens)', 's', ours, plain, plain / ours
    yield '- kept for the backward pass', 'MB', kept / 1e6, kept_plain / 1e6, kept_plain / kept
    if isinstance(m['hog'], str):
        yield f"HOG beside scikit-image's: {m['hog']}", '', None, None, None
    else:
        what = f'HOG, 224 pixels, batch {m["hog"]["batch"]} (plain: scikit-image)'
        yield what, 'images/s', m['hog']['glsd'], m['hog']['plain'], m['hog']['glsd'] / m['hog']['plain']


def more_masked_rows(m):
    size = f'{m["images"]} images of {m["size"]} pixels'
    yield f"step of the dVAE's tokenizer, {size}", 's', m['seconds']['tokenizer'], None, None
    size = f'{m["backbone"]}, {m["clips"]} clips of {m["global_size"]} pixels'
    yield f'MaskFeat step on video, {size}', 's', m['seconds']['video'], None, None


def contrastive_rows(c):
    n, loop = c['infonce'], c['infonce']['loop']
    size = f'InfoNCE, batch {n["batch"]:,}, queue {n["queue"]:,}'
    theirs = [n[what].get('lightly') for what in ('seconds', 'kept')]
    said = "lightly's" if theirs[0] else 'lightly is not installed'
    ratios = [other and other / n[what]['glsd'] for other, what in zip(theirs, ('seconds', 'kept'))]
    yield f'{size} (plain: {said})', 's', n['seconds']['glsd'], theirs[0], ratios[0]
    kept = theirs[1] and theirs[1] / 1e6
    yield '- kept for the backward pass', 'MB', n['kept']['glsd'] / 1e6, kept, ratios[1]
    few = f'- of {n["few"]} queries (plain: a loop)'
    yield few, 's', loop['glsd'], loop['plain'], loop['plain'] / loop['glsd']
    q, s, b = c['queue'], c['sinkhorn'], c['rbd']
    size = f'nearest of {q["size"]:,} x {q["dim"]} for {q["batch"]}'
    for what, t in (
        (size, q),
        (f'Sinkhorn-Knopp, {s["batch"]} x {s["prototypes"]:,}', s),
        (f'saliency (RBD) of {b["superpixels"]} superpixels', b),
    ):
        ours, plain = t['seconds']['glsd'], t['seconds']['plain']
        yield what, 's', ours, plain, plain / ours


def rows(r):
    "(what, unit, glsd, plain, how many times better)."
    yield from views_rows(r['views'])
    yield from loss_rows(r['loss'])
    yield from knn_rows(r['knn'])
    yield from step_rows(r['step'])
    yield from train_rows(r)
    yield from gpu_rows(r['train']['gpu'])
    yield from local_rows("ADCLR's queries", 'them', r['local']['adclr'])
    yield from local_rows('DrLoc', 'it', r['local']['drloc'])
    yield from masked_rows(r['masked'])
    yield from more_masked_rows(r['masked']['more'])
    yield from contrastive_rows(r['contrastive'])


def figure(x):
    if x is None:
        return ''
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def table(r):
    lines = ['| what | unit | glsd | plain | ratio |', '|---|---|--:|--:|--:|']
    for what, unit, ours, plain, ratio in rows(r):
        times = f'{ratio:.1f}x' if ratio else ''
        lines.append(f'| {what} | {unit} | {figure(ours)} | {figure(plain)} | {times} |')
    return '\n'.join(lines)


def cpu_name():
    try:
        return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine():
    return dict(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        torch=version('torch'),
        python=platform.python_version(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    )


def describe(here):
    load = here['load']
    busy = f', {load:.1f} other processes running' if load and load > 0.5 else ''
    versions = f'torch {here["torch"]}, Python {here["python"]}'
    return f'{here["cpu"]} ({here["isa"]}), one of {here["cores"]} cores{busy}; {versions}'


HOW = (
    'Made by `python benchmarks/run.py`. "Plain" is the same computation written the usual way '
    '(`benchmarks/plain_*.py`). Seconds are processor seconds of one core.'
)


def write(path, text):
    beside = path.with_name(path.name + '.part')
    beside.write_text(text)
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--quick', action='store_true', help='under a minute, to see that it runs; its figures mean little'
    )
    parser.add_argument('--out', type=Path, help='folder for benchmarks.json and benchmarks.md')
    args = parser.parse_args()
    out = args.out or (None if args.quick else HERE.parent / 'results')
    began, here = time.perf_counter(), machine()
    results = measure_all(args.quick)
    here['isa'] = results['views'].pop('isa')
    text = f'{describe(here)}\n\n{table(results)}\n'
    print(text + f'\n{time.perf_counter() - began:.0f} s')
    if out:
        out.mkdir(parents=True, exist_ok=True)
        record = dict(machine=here, quick=args.quick, **results)
        write(out / 'benchmarks.json', json.dumps(record, indent=1) + '\n')
        write(out / 'benchmarks.md', f'# Benchmarks\n\n{text}\n{HOW}\n')
        print(f'written to {out}')


if __name__ == '__main__':
    main()
