"What the papers say, what is done, and whether it comes out again, on records that were spoilt."

import copy
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glsd.cli import main
from glsd.experiments.published import all_tables, published, table
from glsd.experiments.records import compare_results, deviations, figures_of

ROOT = Path(__file__).parents[1]
KEPT = sorted(ROOT.glob('results/*/ci/results.json'))


def loaded(path):
    return json.loads(path.read_text())


@pytest.fixture
def fresh(tmp_path):
    "A folder as `make reproduce` leaves it, with the kept records themselves."
    for path in KEPT:
        place = tmp_path / 'ci' / path.parent.parent.name
        place.mkdir(parents=True)
        shutil.copy(path, place)
    return tmp_path / 'ci'


def spoil(fresh, name, change):
    path = fresh / name / 'results.json'
    record = loaded(path)
    change(record['runs'])
    path.write_text(json.dumps(record))


def test_the_kept_records_agree_with_themselves(fresh, capsys):
    assert main(['reproduce', '--compare', str(fresh)]) == 0
    assert f'{len(KEPT)} experiments compared' in capsys.readouterr().out


@pytest.mark.parametrize('path', KEPT, ids=lambda p: p.parent.parent.name)
def test_every_kept_record_has_rows_with_numbers(path):
    rows = figures_of(loaded(path))
    assert rows and all(math.isfinite(x) for row in rows.values() for m in row.values() for x in m.values())
    assert not any(m.split('.')[-1] in ('seconds', 'step') for row in rows.values() for m in row)


def value_changed(runs):
    for run in runs:
        if run['name'].startswith('vit_mini vanilla'):
            run['metrics']['knn'] += 30


def row_lost(runs):
    runs[:] = [r for r in runs if not r['name'].startswith('vit_mini vanilla')]


def failed(runs):
    run = next(r for r in runs if r['name'] == 'vit_mini vanilla s0')
    del run['metrics']
    run['error'] = 'RuntimeError: no memory'


def not_finite(runs):
    next(r for r in runs if r['name'] == 'vit_mini vanilla s0')['metrics']['knn'] = math.nan


@pytest.mark.parametrize(
    'change, said',
    [
        (
            value_changed,
            r'^local_losses: vit_mini vanilla, knn: [\d.]+, kept [\d.]+: 30 apart, [\d.]+ allowed$',
        ),
        (row_lost, r'^local_losses: vit_mini vanilla: missing$'),
        (failed, r'^local_losses: vit_mini vanilla, knn: no figure for seed 0$'),
        (not_finite, r'^local_losses: vit_mini vanilla, knn: nan for seed 0, a number in the kept record$'),
    ],
)
def test_a_record_that_was_spoilt_is_noticed(fresh, capsys, change, said):
    spoil(fresh, 'local_losses', change)
    assert main(['reproduce', '--compare', str(fresh)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(said, line) for line in lines), lines
    assert all(line.startswith('local_losses: vit_mini vanilla') for line in lines[:-1])


def test_files_that_are_missing_or_cut_are_a_line_each(fresh, capsys):
    (fresh / 'adclr/results.json').unlink()
    text = (fresh / 'drloc/results.json').read_text()
    (fresh / 'drloc/results.json').write_text(text[: len(text) // 2])
    (fresh / 'selfpatch/results.json').write_text('{"runs": []}')
    assert main(['reproduce', '--compare', str(fresh)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith('adclr: no results.json in ')
    assert 'is not JSON' in lines[1] and lines[2].endswith('has no runs')


def test_a_change_within_the_spread_is_none(fresh):
    def other_seeds(runs):
        for run in runs:
            if 'metrics' in run:
                run['metrics']['knn'] += 0.2
            run['seconds'] = 1e4

    spoil(fresh, 'local_losses', other_seeds)
    assert compare_results(fresh, ROOT / 'results')[0] == []


def test_one_seed_has_no_spread_and_a_quarter_is_allowed():
    one = dict(runs=[dict(name='a s0', metrics=dict(knn=40.0))])
    other = copy.deepcopy(one)
    other['runs'][0]['metrics']['knn'] = 49.9
    assert deviations(other, one) == []
    other['runs'][0]['metrics']['knn'] = 50.1
    assert len(deviations(other, one)) == 1


def test_nothing_to_compare_with_is_one_line(tmp_path, capsys):
    assert main(['reproduce', '--compare', str(tmp_path / 'nowhere')]) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(KEPT) + 1
    with pytest.raises(FileNotFoundError, match='no record at scale ci in '):
        compare_results(tmp_path, tmp_path)


def test_the_list_has_every_experiment_with_scales_and_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / 'mine/table_2'
    place.mkdir(parents=True)
    (place / 'results.json').write_text(json.dumps(dict(scale='gpu', runs=[dict(name='vanilla s0')])))
    assert main(['reproduce', '--list', '--out', 'mine']) == 0
    said = capsys.readouterr().out
    names = [p.stem for p in (ROOT / 'nbs/9_experiments').glob('[a-z]*.ipynb') if p.stem != 'index']
    parts = dict(re.findall(r'^(\w+): (.+\n    scales: .+\n    done: .+)$', said, re.M))
    assert set(parts) == set(names)
    assert all(part.splitlines()[1].startswith('    scales: ci') for part in parts.values())
    assert 'gpu (mine/table_2)' in parts['table_2'] and 'results/local_losses/ci)' in parts['local_losses']


def test_reproduce_without_an_experiment_names_them(capsys):
    assert main(['reproduce']) == 2
    assert 'low_data' in capsys.readouterr().err


def test_no_kept_record_holds_a_path_of_a_machine():
    kept = [*(ROOT / 'results').rglob('*.json'), *(ROOT / 'results').rglob('*.md')]
    assert kept and not [p for p in kept if re.search(r'["\s](/[\w.-]+){2,}', p.read_text())]


def test_every_published_table_says_where_it_is_from():
    for (paper, where), t in all_tables().tables.items():
        assert paper in all_tables().papers
        assert re.match(r'(Table|Figure|Section) [\d.]+[a-f]?(, \w+)?$|lightly, CIFAR-10', where)
        assert t.rows and all(row for row in t.rows.values())
        holes = [x for row in t.rows.values() for x in row.values() if math.isnan(x)]
        assert not holes or t.why, f'{t.source}: a number is missing and nothing says why'


def test_published_tables_agree_where_they_share_a_row():
    both = [table('selfpatch', f'Table {n}').rows for n in (4, 5, 6)]
    for row in 'DINO', 'SelfPatch':
        assert len({rows[row]['J&F'] for rows in both}) == 1
    swin = table('drloc', 'Table 4').rows
    assert published('drloc', 'Table 2a', 'Swin-T', '0') == swin['Swin-T']['cifar100']
    assert published('drloc', 'Table 16', 'Swin-T', '512') == swin['Swin-T + DrLoc']['cifar100']
    esvit, own = (published('glsd', 'Table 2', f'{m}, Swin-T/7x7', 'linear') for m in ('EsViT', 'Similarity'))
    assert esvit - own == pytest.approx(0.1)


@pytest.mark.parametrize(
    'names, said',
    [
        (('gsld', 'Table 2', 'x', 'y'), "no paper 'gsld'; did you mean 'glsd'?"),
        (('glsd', 'Table 1', 'x', 'y'), "no 'Table 1' of GLSD is kept here; did you mean"),
        (('glsd', 'Table 2', 'DINO, ViT-S', 'knn'), "GLSD, Table 2 has no row 'DINO, ViT-S'"),
        (('glsd', 'Table 2', 'DINO, ViT-S/16', 'k-NN'), "GLSD, Table 2 has no column 'k-NN'"),
    ],
)
def test_an_unknown_name_is_one_line(names, said):
    with pytest.raises(ValueError) as e:
        published(*names)
    assert str(e.value).startswith(said) and '\n' not in str(e.value)


@pytest.fixture
def clone(tmp_path):
    "As much of a clone as `make reproduce` looks at, with a stand-in for glsd that writes down its calls."
    for name in 'low_data', 'figure_5', 'adclr', 'index', '1_cells':
        (tmp_path / 'nbs/9_experiments').mkdir(parents=True, exist_ok=True)
        (tmp_path / f'nbs/9_experiments/{name}.ipynb').touch()
    shutil.copy(ROOT / 'Makefile', tmp_path)
    for name in '.ci/requirements.txt', '.ci/install', 'settings.ini', 'setup.py', '.venv/.installed':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    glsd = tmp_path / '.venv/bin/glsd'
    glsd.parent.mkdir()
    body = 'echo "$@" >> calls; mkdir -p runs/ci/$2; if [ "$2" = "$(cat fails)" ]; then exit 1; fi'
    glsd.write_text(f'#!/bin/bash\n{body}\n')
    glsd.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_reproduce_goes_on_where_it_was_cut(clone):
    def made(fails):
        (clone / 'calls').write_text('')
        (clone / 'fails').write_text(fails)
        code = subprocess.run(['make', 'reproduce'], cwd=clone, capture_output=True).returncode
        return code, (clone / 'calls').read_text().splitlines()

    low_data, adclr = (f'reproduce {name} --out runs/ci/{name}' for name in ('low_data', 'adclr'))
    asked = f'reproduce figure_5 --out runs/ci/figure_5 -p runs={clone}/runs/ci/low_data'
    compared = 'reproduce --compare runs/ci'
    assert made('low_data') == (2, [adclr, low_data, compared])  # the others ran, and are compared
    assert made('nothing') == (0, [low_data, asked, compared])
    assert made('nothing') == (0, [compared])
    (clone / 'nbs/9_experiments/adclr.ipynb').touch()
    assert made('--compare') == (2, [adclr, compared])
