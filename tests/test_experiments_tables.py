"The notebooks of GLSD's Tables 2 and 3 and Figures 3 and 5, in miniature, as papermill runs them."

import json
from pathlib import Path

import pytest
from PIL import Image

from glsd.cli import main
from glsd.data.files import file_lock
from glsd.data.toyworld import ToyWorld
from glsd.experiments.cells import cell_folder, run_cell
from glsd.experiments.plan import RECIPES
from glsd.training import Recipe

NBS = Path(__file__).parents[1] / 'nbs/9_experiments'
SMALL = dict(
    steps=3, n_local=1, batch_size=16, out_dim=32, head_hidden=32, head_bottleneck=16, checkpoint_every=2
)
FOLDERS = 'images: data=FOLDER with train/ and val/ in it'
VANILLA = 'Vanilla is what the others are compared with'
SEVERAL = 'images: data=["FOLDER", ...] with train/ and val/ in each'
NO_RUN = 'no folder /no/such: run names what glsd pretrain or a grid has written'


@pytest.mark.parametrize(
    'name, parameters, message',
    [
        ('table_2', {'scale': 'huge'}, "no scale 'huge'; choose from: ci, laptop, gpu, paper"),
        ('table_2', {'scale': 'paper'}, f'scale=paper needs {FOLDERS}'),
        ('table_2', {'data': '/no/such'}, 'data=/no/such has no folder train/'),
        ('table_2', {'settings': ['geometric']}, f"settings=['geometric']: {VANILLA}"),
        ('table_3', {'scale': 'gpu'}, f'scale=gpu needs {SEVERAL}'),
        ('table_3', {'data': 'imagenet'}, "data is a list of folders, not 'imagenet'"),
        ('table_3', {'data': ['/no/such']}, 'data=/no/such has no folder train/'),
        (
            'table_3',
            {'backbones': ['vit_mini']},
            "no backbone 'vit_mini' at scale=ci; choose from: swin_mini, swin_mini_w8, swin_mini_deep",
        ),
        ('figure_3', {'run': '/no/such'}, NO_RUN),
        (
            'figure_3',
            {'scale': 'paper'},
            'scale=paper needs images (data=FOLDER with train/ and val/ in it) or a run (run=FOLDER)',
        ),
        ('figure_5', {'scale': 'laptop'}, f'scale=laptop needs {FOLDERS}'),
        ('figure_5', {'images': 1}, 'images=1 must be at least 2, columns=3 at least 1'),
    ],
)  # fmt: skip
def test_wrong_parameters_are_one_line(tmp_path, run_notebook, name, parameters, message):
    with pytest.raises(ValueError) as e:
        run_notebook(NBS / f'{name}.ipynb', {'out': str(tmp_path), **parameters})
    assert str(e.value) == message


def record_of(out):
    for name in 'table.md', 'figure.png':
        assert (out / name).stat().st_size > 0
    return json.loads((out / 'results.json').read_text())


@pytest.mark.slow
def test_table_2(tmp_path, run_notebook, capsys):
    out = tmp_path / 'out'
    given = dict(out=str(out), seeds=2, k=5, images=96, queries=60, probe_epochs=2, recipe=SMALL, jobs=1)
    run_notebook(NBS / 'table_2.ipynb', given)
    said = capsys.readouterr().out
    assert '8 runs, 0 of them done' in said and 'core-minutes' in said and 'GB of disk' in said
    record = record_of(out)
    runs = {r['name']: r['metrics'] for r in record['runs']}
    assert len(runs) == 2 * 4 and all(set(m) == {'knn', 'linear', 'linear4'} for m in runs.values())
    mean = sum(runs[f'geometric s{s}']['knn'] - runs[f'vanilla s{s}']['knn'] for s in range(2)) / 2
    assert record['differences']['geometric knn'][0] == pytest.approx(mean, abs=1e-3)
    text = (out / 'table.md').read_text()
    assert '| EsViT | Swin-T/7x7 | 28 | 4.5 | 300 | 78 | 75.7 |' in text and '75.4' in text
    run_notebook(NBS / 'table_2.ipynb', given)
    assert '8 runs, 8 of them done' in capsys.readouterr().out


@pytest.mark.slow
def test_table_3_with_backbones_that_table_2_left(tmp_path, run_notebook, capsys):
    left = Recipe(
        'vanilla', backbone='swin_mini', image_size=32, global_size=32, local_size=16, n_images=64, **SMALL
    )
    for s in 'vanilla', 'geometric':
        r = left.replace(method=s)
        run_cell(cell_folder(tmp_path / 'runs/cells', f'{s} s0', r), r.to_dict(), 'def f(run): return {}', {})
    kept = {p: p.read_bytes() for p in (tmp_path / 'runs').rglob('*') if p.is_file()}
    out, settings = tmp_path / 'out', ['vanilla', 'geometric']
    given = dict(
        out=str(out), settings=settings, backbones=['swin_mini_w8'], runs=str(tmp_path / 'runs'), k=5
    )
    given |= dict(images=64, queries=36, probe_epochs=2, recipe=SMALL, jobs=1)
    run_notebook(NBS / 'table_3.ipynb', given)
    runs = {r['name']: r['metrics'] for r in record_of(out)['runs']}
    assert len(runs) == 3 * 2 + 2
    assert set(runs['swin_mini_w8 toy world 2 geometric s0']) == {
        f'toy world 2 {m}' for m in ('knn', 'linear', 'linear4')
    }
    assert len(runs['transfer geometric s0']) == 9  # three sets, three measures
    assert kept == {p: p.read_bytes() for p in (tmp_path / 'runs').rglob('*') if p.is_file()}


@pytest.mark.slow
def test_figure_3_of_a_run_and_of_its_own(tmp_path, run_notebook):
    out = tmp_path / 'out'
    run_notebook(NBS / 'figure_3.ipynb', dict(out=str(out), images=20, recipe={**SMALL, 'n_images': 64}))
    rows = {r['name']: r['metrics'] for r in record_of(out)['runs']}
    assert rows['geometric s0']['agree'] == 100 and len(rows) == 3
    (run,) = (out / 'cells').glob('similarity_s0-*')
    again = tmp_path / 'again'
    run_notebook(NBS / 'figure_3.ipynb', dict(out=str(again), run=str(run), images=20))
    assert {r['name']: r['metrics'] for r in record_of(again)['runs']} == rows and not (
        again / 'cells'
    ).exists()


@pytest.mark.slow
def test_figure_5_of_its_own_runs_and_of_those_of_low_data(tmp_path, run_notebook):
    out, settings = tmp_path / 'out', ['vanilla', 'geometric']
    given = dict(settings=settings, images=40, columns=2)
    own = dict(sizes=[2, 3], recipe={**SMALL, 'n_images': 60}, jobs=1)
    run_notebook(NBS / 'figure_5.ipynb', dict(given, **own, out=str(out)))
    record = record_of(out)
    assert [r['name'] for r in record['runs']] == [f'{s} n{n} s0' for n in (2, 3) for s in settings]
    again = tmp_path / 'again'
    run_notebook(NBS / 'figure_5.ipynb', dict(given, out=str(again), runs=str(out)))
    found, before = ({r['name']: r['metrics'] for r in x['runs']} for x in (record_of(again), record))
    assert found == before


@pytest.mark.slow
def test_the_command_ends_early_while_others_are_at_work_and_collects_afterwards(tmp_path, capsys):
    steps = {'steps': 2, 'n_images': 64, **{k: v for k, v in SMALL.items() if k != 'steps'}}
    command = ['reproduce', 'figure_3', '--out', str(tmp_path), '-p', 'images=8', '-p', f'recipe={steps}']
    values = RECIPES['ci'] | dict(n_images=3600) | steps
    cell = cell_folder(tmp_path / 'cells', 'similarity s0', Recipe('similarity', **values))
    with file_lock(cell / 'claim'):
        assert main(command) == 0
    said = capsys.readouterr().out
    assert 'figure_3: 1 of 1 cells still run in other processes' in said
    assert not list(tmp_path.glob('*.ipynb')) and not list(tmp_path.glob('.*.ipynb'))
    assert main(command) == 0 and (tmp_path / 'figure_3.ipynb').exists()
    assert len(record_of(tmp_path)['runs']) == 3 and not list(tmp_path.glob('.*.ipynb'))


@pytest.fixture
def folders(tmp_path):
    "Two data sets of a user, of four classes; one has a name that Table 3 knows."
    for name in 'imagenet-100', 'others':
        for part, n in ('train', 6), ('val', 3):
            for i, (image, label) in enumerate(ToyWorld(4 * n, size=40, split=part, seed=len(name))):
                place = tmp_path / name / part / f'class{label % 4}'
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f'{i}.png')
    return [str(tmp_path / name) for name in ('imagenet-100', 'others')]


@pytest.mark.slow
def test_folders_of_a_user(tmp_path, folders, run_notebook):
    "Scale laptop: the data set's name picks the paper's row, the other folder's backbone is transferred."
    known, other = folders
    few = dict(settings=['vanilla', 'similarity'], jobs=1, recipe=SMALL)
    out = tmp_path / 'table_3'
    given = dict(few, scale='laptop', data=[known], source=other, backbones=['swin_mini'], seeds=1, k=3)
    run_notebook(NBS / 'table_3.ipynb', dict(given, out=str(out), probe_epochs=1))
    runs = {r['name']: r['metrics'] for r in record_of(out)['runs']}
    assert set(runs) == {
        f'{x} s0' for s in few['settings'] for x in (f'swin_mini imagenet-100 {s}', f'transfer {s}')
    }
    assert all(
        set(m) == {f'imagenet-100 {kind}' for kind in ('knn', 'linear', 'linear4')} for m in runs.values()
    )
    k_nn = (out / 'table.md').read_text().split('\n\n')[1]
    assert '| 76.5 | 76.2 |' in k_nn and '| 86.2 | 87.0 |' in k_nn and 'paper: Similarity' in k_nn

    out = tmp_path / 'figure_5'
    given = dict(few, scale='laptop', data=other, sizes=[4], images=6, columns=2)
    run_notebook(NBS / 'figure_5.ipynb', dict(given, out=str(out)))
    assert [r['name'] for r in record_of(out)['runs']] == ['vanilla n4 s0', 'similarity n4 s0']
    (run,) = (out / 'cells').glob('similarity_n4_s0-*')
    out = tmp_path / 'figure_3'
    run_notebook(
        NBS / 'figure_3.ipynb', dict(scale='laptop', run=str(run), out=str(out), images=6, columns=2)
    )
    assert record_of(out)['data'] == 'others'
