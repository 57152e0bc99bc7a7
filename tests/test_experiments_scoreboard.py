"The scoreboard on a few tiny runs: every column is filled, nothing is measured twice, what fails is named."

import json
from pathlib import Path

import pytest

from glsd.experiments.cells import cell_folder, run_cell
from glsd.training import Recipe

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/scoreboard.ipynb'
CROPS = dict(n_images=96, image_size=32, global_size=32, local_size=16, n_local=1)
HEADS = dict(out_dim=32, head_hidden=16, head_bottleneck=8)
SMALL = Recipe('dino', backbone='vit_mini', batch_size=8, steps=2, **CROPS, **HEADS)
FEW = dict(
    knn=dict(images=60, k=[5]),
    linear=dict(images=60, epochs=2, cached=True),
    correspondence=dict(images=8),
    collapse=dict(images=16),
    attention=dict(images=4),
    retrieval=dict(images=6),
    **{'dense-nn': dict(images=4)},
)


def smaller(few):
    "For `run_notebook`: options that make the plan smaller."

    def after(source, names):
        if 'PLAN = {' in source:
            for what, options in few.items():
                names['PLAN'][what] |= options

    return after


@pytest.mark.slow
def test_miniature(tmp_path, run_notebook, capsys):
    runs, out = tmp_path / 'runs', tmp_path / 'out'
    cells = {
        f'{s} n2 s{seed}': SMALL.replace(method=s, seed=seed, per_class=2)
        for s in ('vanilla', 'geometric')
        for seed in (0, 1)
    }
    cells['random s0'] = SMALL.replace(per_class=2, steps=1, momentum=1.0, momentum_final=1.0)
    for name, recipe in cells.items():
        folder = cell_folder(runs / 'cells', name, recipe)
        run_cell(folder, recipe.to_dict(), 'def nothing(run): return {}', {})
    given = dict(runs=str(runs), out=str(out), jobs=0)
    run_notebook(NOTEBOOK, given, smaller(FEW))

    record = json.loads((out / 'results.json').read_text())
    assert len(record['runs']) == 5 and all(set(FEW) <= set(r) for r in record['runs'])
    head, _, *rows = [
        line.split('|')[1:-1] for line in (out / 'table.md').read_text().splitlines() if line.startswith('|')
    ][:6]
    assert len(head) == 10 and [r[0].strip() for r in rows] == [
        'Vanilla',
        'Geometric',
        'before training',
        'no network*',
    ]
    assert (
        all('±' in cell for row in rows[:2] for cell in row[2:])
        and (out / 'figure.png').stat().st_size > 5000
    )
    assert any(c.startswith('The paper: Geometric helps') for c in record['conclusions'])

    kept = {f: f.stat().st_mtime_ns for f in (out / 'measured').glob('*.json')}
    assert len(kept) == 35
    lost = next(f for f in kept if f.name.startswith('vanilla_n2_s1-knn'))
    lost.unlink()
    run_notebook(NOTEBOOK, given, smaller(FEW))
    assert [f for f in kept if f.stat().st_mtime_ns != kept[f]] == [lost]

    with pytest.raises(RuntimeError, match='5 answers are missing; the first: ValueError: k = 100000'):
        run_notebook(NOTEBOOK, given, smaller({**FEW, 'knn': dict(images=60, k=[100_000])}))
    assert 'FAILED knn of vanilla_n2_s0' in capsys.readouterr().out


def test_no_runs_is_one_line(tmp_path, run_notebook):
    with pytest.raises(FileNotFoundError, match='make them with "glsd reproduce low_data"'):
        run_notebook(NOTEBOOK, dict(runs=str(tmp_path), out=str(tmp_path)))
