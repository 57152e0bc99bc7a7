"""The benchmarks run from another folder, agree with their plain rivals (see run.py) and write results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).resolve().parent.parent / 'benchmarks' / 'run.py'


@pytest.mark.slow
def test_quick_run_prints_and_writes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RUN), '--quick', '--out', str(tmp_path / 'new')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'new/benchmarks.json').read_text())
    assert found['quick'] and found['machine']['torch']
    assert found['views']['glsd'] > 0 and found['loss']['glsd']['seconds'] > 0 and found['knn']['product'] > 0
    for extra in found['local'].values():
        assert extra['seconds'][extra['with_']] > 0 and extra['more_operations'] > 0
    assert found['train']['vit_mini']['plain'] > 0 and found['train']['gpu'].startswith('skipped')
    assert set(found['step']['split']) == {'views', 'student', 'teacher', 'loss', 'backward', 'optimiser'}
    masked = found['masked']['mae']
    assert masked['bytes']['visible_only'] < masked['bytes']['mask_tokens'] and masked['seconds']
    report = (tmp_path / 'new/benchmarks.md').read_text()
    assert 'dual loss' in report and "ADCLR's queries" in report and 'dual loss' in done.stdout
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == ['benchmarks.json', 'benchmarks.md']


def test_contestants_that_disagree_are_refused():
    sys.path.insert(0, str(RUN.parent))
    try:
        from run import same
    finally:
        sys.path.remove(str(RUN.parent))
    same('loss', 1.0, 1.00001, 1e-4)
    with pytest.raises(SystemExit, match='they should agree'):
        same('loss', 1.0, 1.1, 1e-4)


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=generator)


def test_the_plain_step_is_the_same_step():
    "From the same weights and crops: after three steps of both, the same weights."
    sys.path.insert(0, str(RUN.parent))
    try:
        import bench_train as b
    finally:
        sys.path.remove(str(RUN.parent))
    size = dict(global_size=32, local_size=16, n_local=2, strength=0.5, batch_size=4)
    heads = dict(out_dim=64, head_hidden=32, head_bottleneck=16, freeze_last=0.0)
    flat = dict(lr_final=5e-4 * 4 / 256, momentum_final=0.996, teacher_temp=0.04, warmup=0.0)
    still = dict(drop_path=0.0, weight_decay=0.0, weight_decay_final=0.0, steps=5, device='cpu')
    recipe = b.Recipe('geometric', backbone='vit_mini', **size, **heads, **flat, **still)
    trainer = b.Trainer(recipe, 5)
    plain = b.plainly(trainer)
    multicrop = trainer.method.views
    for step in range(3):
        images = [noise(10 * step + i) for i in range(4)]
        views = multicrop(images, [b.np.random.default_rng((step, i)) for i in range(4)])
        loss = plain.step(*b.as_lists(views))
        assert abs(trainer.step(views)['loss'] / loss - 1) < 1e-4
    for (theirs, _), mine in zip(plain.pairs, trainer.method.student.backbone.parameters()):
        assert (theirs - mine).abs().max() < 2e-4 * mine.abs().max() + 2e-5
