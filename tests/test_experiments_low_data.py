"The low-data notebook from end to end, in miniature, as papermill runs it."

import json
from pathlib import Path

import papermill
import pytest

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/low_data.ipynb'


def execute(tmp_path, **parameters):
    return papermill.execute_notebook(
        str(NOTEBOOK),
        str(tmp_path / 'executed.ipynb'),
        {'out': str(tmp_path / 'out'), **parameters},
        cwd=str(NOTEBOOK.parent),
        kernel_name='python3',
        progress_bar=False,
    )


@pytest.mark.parametrize(
    'parameters, message',
    [
        ({'scale': 'huge'}, "no scale 'huge'; choose from: ci, laptop, gpu, paper"),
        ({'scale': 'paper'}, 'scale=paper needs images: data=FOLDER with train/ and val/ in it'),
        ({'data': '/no/such'}, 'data=/no/such has no folder train/'),
    ],
)
def test_wrong_parameters_are_one_line(tmp_path, parameters, message):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        execute(tmp_path, **parameters)
    assert e.value.evalue == message


@pytest.mark.slow
def test_miniature(tmp_path):
    small = {
        'steps': 4,
        'n_local': 1,
        'batch_size': 16,
        'out_dim': 32,
        'head_hidden': 32,
        'head_bottleneck': 16,
    }
    settings = ['vanilla', 'geometric']
    notebook = execute(
        tmp_path, settings=settings, sizes=[2, 3], seeds=2, k=5, anchors=120, queries=60, recipe=small, jobs=1
    )
    record = json.loads((tmp_path / 'out/results.json').read_text())
    assert len(record['runs']) == 2 * (1 + 2 * 2) and all(
        0 <= r['metrics']['knn'] <= 100 for r in record['runs']
    )
    assert record['scale'] == 'ci' and record['sizes'] == [2, 3] and record['recipe']['steps'] == 4
    # the differences in the record are those of its runs
    knn = {r['name']: r['metrics']['knn'] for r in record['runs']}
    mean = sum(knn[f'geometric n2 s{s}'] - knn[f'vanilla n2 s{s}'] for s in range(2)) / 2
    assert record['differences']['geometric n2 knn'][0] == pytest.approx(mean, abs=1e-3)
    assert {'knn', 'correspondence', 'distance', 'rank', 'distinct'} == set(record['runs'][0]['metrics'])
    table = (tmp_path / 'out/table.md').read_text()
    assert 'Geometric' in table and '±' in table and 'raw pixels' in table
    assert (tmp_path / 'out/figure.png').read_bytes()[:4] == b'\x89PNG'
    assert not list((tmp_path / 'out').glob('*.part'))
    assert any('made at scale ci' in str(c.get('outputs')) for c in notebook.cells)
