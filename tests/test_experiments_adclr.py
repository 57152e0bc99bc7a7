"The ADCLR notebook from end to end, in miniature."

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/adclr.ipynb'
SMALL = {'steps': 2, 'batch_size': 8, 'out_dim': 16, 'head_hidden': 16, 'head_bottleneck': 8}


@pytest.mark.parametrize(
    'parameters, message',
    [
        ({'scale': 'huge'}, "no scale 'huge'; choose from: ci, gpu, paper"),
        ({'queries': [0, 5]}, r'queries=\[0, 5\]: ADCLR needs at least one'),
    ],
)
def test_wrong_parameters_are_one_line(run_notebook, tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        run_notebook(NOTEBOOK, {'out': str(tmp_path / 'out'), **parameters})


@pytest.mark.slow
def test_miniature(run_notebook, tmp_path):
    small = dict(
        lambdas=[0.5],
        queries=[2],
        ratios=[0.15],
        local_views=[0],
        seeds=1,
        images=40,
        probe_epochs=1,
        recipe=SMALL,
        jobs=2,
    )
    run_notebook(NOTEBOOK, {'out': str(tmp_path / 'out'), **small})
    record = json.loads((tmp_path / 'out/results.json').read_text())
    memory = {r['name']: r['metrics']['memory'] for r in record['runs']}
    # DINO; Q = 10, the point that panels share; Q = 2, one way and both
    assert len(memory) == 4 and all(0 <= r['metrics']['linear'] <= 100 for r in record['runs'])
    assert memory['dino v0 s0'] < memory['q2 l0.5 r0.15 v0 s0'] < memory['q10 l0.5 r0.15 v0 s0']
    table = (tmp_path / 'out/table.md').read_text()
    assert (
        '69.1' in table
        and 'both ways' in table
        and (tmp_path / 'out/figure.png').read_bytes()[:4] == b'\x89PNG'
    )
