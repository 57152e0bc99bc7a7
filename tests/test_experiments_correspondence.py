"The correspondence notebook from end to end, on runs of a few steps."

import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from glsd.experiments.cells import cell_folder, run_cell
from glsd.training import Recipe
from glsd.training.checkpoint import list_checkpoints

NOTEBOOK = Path(__file__).parents[1] / 'nbs/9_experiments/correspondence.ipynb'
CROPS = dict(image_size=32, n_images=64, global_size=32, local_size=16, n_local=1)
HEADS = dict(out_dim=32, head_hidden=32, head_bottleneck=16)
RUN = dict(batch_size=8, steps=4, lr=0.02, checkpoint_every=2)
SMALL = Recipe('dino', backbone='vit_mini', drop_path=0.0, **CROPS, **HEADS, **RUN)


@pytest.mark.parametrize(
    'parameters, message',
    [
        (
            {},
            'no finished run of low_data in {}: make them with "glsd reproduce low_data", or name their '
            'folder with -p runs=FOLDER',
        ),
        ({'data': '/no/such'}, 'no folder /no/such: data names images to compare on'),
    ],
)
def test_bad_input_is_one_line(tmp_path, parameters, message):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(
            str(NOTEBOOK),
            None,
            {'runs': str(tmp_path / 'none'), 'out': str(tmp_path), **parameters},
            cwd=str(NOTEBOOK.parent),
            kernel_name='python3',
            progress_bar=False,
        )
    assert e.value.evalue == message.format(tmp_path / 'none')


def leave(folder, name, recipe):
    "A finished cell, as low_data leaves it."
    path = cell_folder(folder / 'cells', name, recipe)
    run_cell(path, recipe.to_dict(), 'def nothing(run): return {}', {})
    return path


def test_miniature(tmp_path, run_notebook, capsys):
    runs, out, left = tmp_path / 'runs', tmp_path / 'out', {}
    leave(runs, 'vanilla n2 s0', SMALL.replace(method='vanilla', per_class=2, steps=3))  # of another grid
    still = dict(steps=1, momentum=1.0, momentum_final=1.0)
    for s in range(2):
        leave(runs, f'random s{s}', SMALL.replace(seed=s, per_class=2, **still))
        for name in 'vanilla', 'similarity', 'geometric':
            left[name, s] = leave(runs, f'{name} n2 s{s}', SMALL.replace(method=name, seed=s, per_class=2))
    few = dict(runs=str(runs), out=str(out), images=24, training_views=8, columns=1)
    run_notebook(NOTEBOOK, few)

    assert '1 runs are left out, unfinished or of another recipe' in capsys.readouterr().out
    record = json.loads((out / 'results.json').read_text())
    by = {r['name']: r for r in record['runs']}
    assert len(by) == 2 + 3 * 2 and record['sizes'] == [2] and record['images'] == 24
    # the moments that a run keeps
    assert [m['step'] for m in by['similarity n2 s0']['during']] == [2, 4]
    assert [m['step'] for m in by['random s0']['during']] == [0]
    shares = [m.get(f, 0) for r in by.values() for m in r['during'] for f in ('agree', 'stays', 'changed')]
    assert all(0 <= share <= 100 for share in shares)
    # the difference in the record, and its interval, are those of its runs
    found = {name: r['after']['accuracy'] for name, r in by.items()}
    pairs = [found[f'geometric n2 s{s}'] - found[f'vanilla n2 s{s}'] for s in range(2)]
    mean, half = record['differences']['geometric - vanilla, accuracy, n2']
    assert mean == pytest.approx(np.mean(pairs), abs=1e-3)
    assert half == pytest.approx(12.71 * np.std(pairs, ddof=1) / 2**0.5, abs=1e-3)
    assert all((out / f'figure{i}.png').read_bytes()[:4] == b'\x89PNG' for i in (3, 4, 5)) and not list(
        out.rglob('*.part')
    )
    assert 'raw pixels' in (out / 'table.md').read_text()

    # a second call measures nothing again but the run that changed; it has diverged and is named
    path = list_checkpoints(left['geometric', 1])[-1]
    state = torch.load(path, weights_only=True)
    for name, v in state['method'].items():
        if name.startswith('teacher.') and v.is_floating_point():
            v.mul_(torch.nan)
    torch.save(state, path)
    todo = set()
    with pytest.raises(RuntimeError, match='1 of 8 runs could not be measured.*geometric_n2_s1.*not finite'):
        run_notebook(NOTEBOOK, few, after=lambda source, names: todo.update(names.get('todo', ())))
    assert todo == {('geometric', 2, 1)}
    again = {r['name']: r for r in json.loads((out / 'results.json').read_text())['runs']}
    assert 'error' in again.pop('geometric n2 s1') and again == {
        k: v for k, v in by.items() if k != 'geometric n2 s1'
    }
