"The SelfPatch notebook from end to end, in miniature."

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/selfpatch.ipynb'
SMALL = dict(steps=2, n_local=1, batch_size=8, out_dim=16, head_hidden=16, head_bottleneck=8)


@pytest.mark.slow
def test_miniature(tmp_path, run_notebook):
    rows = ['lambda=1', 'MoBY + SelfPatch, negatives']
    run_notebook(
        NOTEBOOK, dict(out=str(tmp_path), rows=rows, seeds=1, jobs=1, k=5, images=32, queries=8, recipe=SMALL)
    )
    record = json.loads((tmp_path / 'results.json').read_text())
    # each row brings its baseline along, and every run has all the figures
    found = {r['name']: r['metrics'] for r in record['runs']}
    assert set(found) == {
        f'{name} s0' for name in ('DINO', 'lambda=1', 'MoBY', 'MoBY + SelfPatch, negatives', 'random')
    }
    assert all(0 <= m[what] <= 100 for m in found.values() for what in ('dense', 'correspondence', 'knn'))
    difference = found['lambda=1 s0']['dense'] - found['DINO s0']['dense']
    assert record['differences']['lambda=1']['dense'] == [
        pytest.approx(difference, abs=1e-3),
        None,
    ]  # one pair: no interval
    assert record['paper'] == {
        'DINO': 55.1,
        'lambda=1': 56.4,
        'MoBY': 54.1,
        'MoBY + SelfPatch, negatives': 58.9,
    }
    table = (tmp_path / 'table.md').read_text()
    assert (
        'Table 4' in table
        and '56.4 (+1.3)' in table
        and '58.9 (+4.8)' in table
        and 'random initialisation' in table
    )
    assert (tmp_path / 'figure.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize(
    'parameters, message',
    [
        ({'scale': 'huge'}, "no scale 'huge'; choose from: ci, gpu, paper"),
        ({'scale': 'paper'}, 'scale=paper needs images: data=FOLDER with train/ and val/ in it'),
        ({'data': '/no/such'}, 'data=/no/such has no folder train/'),
        ({'rows': ['k=3']}, "no row 'k=3' at scale=ci; choose from: DINO, SelfPatch, "),
    ],
)
def test_wrong_parameters_are_one_line(tmp_path, run_notebook, parameters, message):
    with pytest.raises(ValueError) as e:
        run_notebook(NOTEBOOK, dict(out=str(tmp_path), **parameters))
    assert str(e.value).startswith(message)
