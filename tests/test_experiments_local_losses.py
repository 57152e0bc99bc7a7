"The head-to-head notebook from end to end, in miniature: what does not fit a backbone is left out."

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/local_losses.ipynb'
SMALL = dict(steps=2, n_local=1, n_query=2, batch_size=16, out_dim=32, head_hidden=32, head_bottleneck=16)


@pytest.mark.parametrize(
    'parameters, message',
    [
        ({'scale': 'huge'}, "no scale 'huge'; choose from: ci, laptop, gpu, paper"),
        ({'scale': 'gpu'}, 'scale=gpu needs images: data=FOLDER with train/ and val/ in it'),
        ({'data': '/no/such'}, 'data=/no/such has no folder train/'),
    ],
)
def test_wrong_parameters_are_one_line(tmp_path, run_notebook, parameters, message):
    with pytest.raises(ValueError) as e:
        run_notebook(NOTEBOOK, {'out': str(tmp_path), **parameters})
    assert str(e.value) == message


@pytest.mark.slow
def test_miniature(tmp_path, run_notebook, capsys):
    out = tmp_path / 'out'
    given = dict(
        out=str(out),
        methods=['vanilla', 'adclr'],
        tuning={'steps': 2, 'batch_size': 8},
        backbones=['vit_mini', 'swin_mini'],
        seeds=1,
        recipe=SMALL,
        jobs=1,
        images=96,
        queries=40,
    )
    run_notebook(NOTEBOOK, given)
    assert 'left out: ADCLR on swin_mini' in capsys.readouterr().out
    record = json.loads((out / 'results.json').read_text())
    names = {r['name'] for r in record['runs']}
    assert len(names) == len(record['runs']) == 2 + 2 + 1 and 'swin_mini adclr s0' not in names
    assert all(
        set(r['metrics']) == {'knn', 'linear', 'finetuned', 'correspondence', 'dense', 'rank', 'state'}
        for r in record['runs']
    )
    knn = {r['name']: r['metrics']['knn'] for r in record['runs']}
    assert record['differences']['vit_mini adclr']['knn'] == [
        pytest.approx(knn['vit_mini adclr s0'] - knn['vit_mini vanilla s0'], abs=1e-3),
        None,
    ]
    assert (
        record['cost']['vit_mini']['adclr']['megabytes']
        > record['cost']['vit_mini']['vanilla']['megabytes']
        > 0
    )
    table = (out / 'table.md').read_text()
    assert (
        table.count('| before training |') == table.count('| raw pixels |') == 2
        and table.count('| ADCLR |') == 2
        and '| swin_mini | ADCLR |' not in table
        and (out / 'figure.png').stat().st_size > 5000
    )
