"The DrLoc notebook from end to end, in miniature, and what it says to wrong parameters."

import json
from pathlib import Path

import pytest

from glsd.training import Recipe, pretrain

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/drloc.ipynb'


@pytest.mark.parametrize(
    'parameters, message',
    [
        ({'scale': 'huge'}, "no scale 'huge'; choose from: ci, gpu, paper"),
        ({'scale': 'paper'}, 'scale=paper needs images: data=["FOLDER", ...] with train/ and val/ in each'),
        (
            {'backbones': ['swin_tiny_w7']},
            "no backbone 'swin_tiny_w7' at scale=ci; choose from: swin_mini, cvt_mini, t2t_mini, vit_mini, "
            'resnet_mini',
        ),
        ({'data': ['/no/such']}, 'data=/no/such has no folder train/'),
        ({'tables': ['3']}, "no table '3' here; choose from: 2, 4 (with 9), 5, 14, 16"),
    ],
)
def test_wrong_parameters_are_one_line(tmp_path, run_notebook, parameters, message):
    with pytest.raises(ValueError) as e:
        run_notebook(NOTEBOOK, {'out': str(tmp_path), **parameters})
    assert str(e.value) == message


@pytest.mark.slow
def test_miniature(tmp_path, run_notebook):
    small = dict(steps=2, batch_size=8, n_images=24, n_test=24)
    weights = {'swin_mini': str(tmp_path / 'start')}  # given, so that no process is started to make them
    start = Recipe('supervised', backbone='swin_mini', global_size=32, image_size=32, **small)
    pretrain(start, weights['swin_mini'], progress=False)
    few = dict(
        tables=['2', '4', '5', '14', '16'],
        backbones=['swin_mini'],
        weights=weights,
        seeds=1,
        turns=1,
        jobs=1,
        recipe=small,
    )
    run_notebook(NOTEBOOK, dict(out=str(tmp_path), **few))
    record = json.loads((tmp_path / 'results.json').read_text())
    top1 = {r['name']: r['metrics']['top1'] for r in record['runs']}
    # tables share cells: with and without, from scratch and tuned; 3 more m, 2 more lambda, 2 more sizes of f
    assert len(top1) == 2 + 2 + 3 + 2 + 2 and all(0 <= a <= 100 for a in top1.values())
    # a difference in the record is that of its pair; of one pair there is no interval
    pair = top1['swin_mini toyworld lam=0.5 m=64 h=512 s0'] - top1['swin_mini toyworld lam=0 s0']
    assert record['differences']['swin_mini toyworld'] == [pytest.approx(pair, abs=1e-3), None]
    # the share of products at the paper's scale
    assert 0.5 < record['products']['swin_tiny_w7'] < 3
    table = (tmp_path / 'table.md').read_text()
    assert all(number in table for number in ('53.28', '+1.96 to +45.33', '2.36', '64.33'))
    assert (tmp_path / 'figure.png').read_bytes()[:4] == b'\x89PNG' and not list(tmp_path.glob('*.part'))
