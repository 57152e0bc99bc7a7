"""Whole commands, one after the other, as a user gives them; and wrong input: one line, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from glsd.cli import main
from glsd.data import ToyWorld

TINY = (
    '--image-size 32 --n-images 64 --global-size 32 --local-size 16 --n-local 1 --backbone vit_mini '
    '--out-dim 32 --head-hidden 16 --head-bottleneck 8 --batch-size 16 --steps 2 --device cpu'
).split()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The folder of a run of two steps."
    out = tmp_path_factory.mktemp('cli') / 'run'
    assert main(['pretrain', 'toyworld', '--out', str(out), '--method', 'geometric', *TINY]) == 0
    return out


def wrong(capsys, *argv):
    "Exit code 2 and exactly one line, which is returned."
    capsys.readouterr()  # what came before
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('glsd: '), lines
    return lines[0]


SMALL = {
    'knn': '--images 100 --k 10,20',
    'linear': '--images 60 --epochs 2 --cached',
    'correspondence': '--images 8',
    'collapse': '--images 16',
    'attention': '--images 4',
    'retrieval': '--images 24',
    'dense-nn': '--images 4',
}


@pytest.mark.parametrize('what', SMALL)
def test_evaluate_gives_json_a_picture_and_a_line(what, run, tmp_path, capsys):
    out = tmp_path / f'{what}.json'
    assert main(['evaluate', what, f'mine={run}', *SMALL[what].split(), '--out', str(out)]) == 0
    answer = json.loads(out.read_text())
    assert answer['what'] == what and answer['size'] == 32 and list(answer['backbones']) == ['mine']
    assert Image.open(out.with_suffix('.png')).size[0] > 100
    assert 'mine: ' in capsys.readouterr().out


def test_evaluate_anything_beside_anything(run, tmp_path, capsys):
    "A run, its exported file and networks of timm, on the user's own folders; features are kept."
    exported = tmp_path / 'mine.safetensors'
    main(['export', str(run), '--out', str(exported)])
    world = ToyWorld(24, size=32)
    for i in range(24):
        file = tmp_path / ('train', 'test')[i % 2] / world.classes[(i // 2) % 2] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(world[i][0].permute(1, 2, 0).numpy()).save(file)
    argv = [
        'evaluate',
        'knn',
        str(run),
        str(exported),
        'timm=random:resnet18',
        '--size',
        '32',
        '--anchors',
        str(tmp_path / 'train'),
        '--test',
        str(tmp_path / 'test'),
        '--k',
        '5',
        '--out',
        str(tmp_path / 'knn.json'),
    ]
    assert main(argv) == 0
    found = json.loads((tmp_path / 'knn.json').read_text())['backbones']
    assert found['run']['knn'] == found['mine.safetensors']['knn'] and list(found) == [
        'run',
        'mine.safetensors',
        'timm',
    ]
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / 'features').iterdir()}
    assert (
        main(argv) == 0
        and {f: f.stat().st_mtime_ns for f in (tmp_path / 'features').iterdir()} == kept
        and len(kept) == 4
    )


def test_evaluate_says_what_is_wrong(run, tmp_path, capsys):
    def folder(name, *files):
        for f in files:
            (tmp_path / name / f).parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 40)).save(tmp_path / name / f)
        return tmp_path / name

    two, one, none = (
        folder('two', 'a/1.png', 'a/2.png', 'b/1.png', 'b/2.png'),
        folder('one', 'a/1.png', 'a/2.png'),
        folder('none', '1.png', '2.png'),
    )
    more, small = folder('more', 'a/1.png', 'c/1.png'), folder('small', '1.png')

    def say(*argv):
        return wrong(capsys, 'evaluate', *argv, '--out', tmp_path / 'x.json')

    def sets(a, t):
        return '--anchors', a, '--test', t

    assert 'labels' in say('knn', run, *sets(none, two)) and 'labels' in say('linear', run, *sets(two, none))
    assert 'two classes' in say('knn', run, *sets(one, one)) and 'one class' in say(
        'linear', run, *sets(one, one)
    )
    assert 'differ in their classes (2 and 2): b' in say('knn', run, *sets(two, more))
    assert 'differ in their classes (2 and 2): b' in say('linear', run, *sets(two, more))
    assert 'k = 50' in say('knn', run, *sets(two, two), '--k', '50')
    assert '--anchors' in say('knn', 'random:vit_mini') and '--data' in say(
        'correspondence', 'random:vit_mini'
    )
    assert 'too small' in say('correspondence', run, '--data', none, '--size', '512')
    assert 'at least 2' in say('correspondence', run, '--data', small)
    assert 'attention' in say(
        'attention', 'random:resnet18', '--data', 'toyworld', '--size', '32', '--images', '4'
    )
    assert 'epochs' in say('linear', run, '--epochs', 'many') and 'device' in say(
        'knn', run, '--device', 'abacus'
    )
    assert '--epochs' in say('linear', run, '--epoch', '3') and 'knn' in wrong(capsys, 'evaluate', 'kmm', run)
    assert '--size' in say('collapse', run, 'random:vit_tiny_patch16_224') and 'called' in say(
        'collapse', run, run
    )
    assert not (tmp_path / 'x.json').exists()


def test_export_gives_a_file_and_the_line_that_loads_it(run, tmp_path, capsys):
    file = tmp_path / 'b.safetensors'
    assert main(['export', str(run), '--out', str(file)]) == 0
    assert 'timm.create_model' in capsys.readouterr().out
    from glsd.training import load_run

    backbone = load_run(run).backbone
    model = timm.create_model(
        backbone.timm_name, num_classes=0, checkpoint_path=str(file), **backbone.timm_kwargs
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), backbone(x).pooled, rtol=1e-4, atol=1e-5)


def test_a_second_call_goes_on_and_another_architecture_is_refused(run, capsys):
    assert main(['pretrain', 'toyworld', '--out', str(run), '--method', 'geometric', *TINY]) == 0
    capsys.readouterr()
    line = wrong(
        capsys, 'pretrain', 'toyworld', '--out', run, '--method', 'geometric', *TINY, '--head-hidden', '24'
    )
    assert 'head_hidden' in line


def test_folder_problems(tmp_path, capsys):
    assert '/no/such' in wrong(capsys, 'pretrain', '/no/such', '--out', tmp_path / 'a', *TINY)
    (tmp_path / 'empty').mkdir()
    assert 'empty' in wrong(capsys, 'pretrain', tmp_path / 'empty', '--out', tmp_path / 'b', *TINY)
    (tmp_path / 'one').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'one/a.png')
    assert 'batch' in wrong(capsys, 'pretrain', tmp_path / 'one', '--out', tmp_path / 'c', *TINY)


@pytest.mark.parametrize(
    'argv, word',
    [
        (['pretrain', '--out', 'x', '--method', 'geometrik'], 'geometric'),
        (['pretrain', '--out', 'x', '--methd', 'geometric'], '--method'),
        (['pretrain', '--out', 'x', '--objective', 'geometric'], '--method'),
        (['pretrain', '--out', 'x', '--learning-rate', '1e-3'], '--lr'),
        (['pretrain', '--out', 'x', '--method', 'no_module:MAE'], 'no_module'),
        (['finetune', '--out', 'x'], '--weights'),
        (['evaluate', 'knn', 'random:vit_mini', '--data', 'toyworld', '--k', 'ten'], 'ten'),
        (['pretrain', '--out', 'x', '--steps', 'many'], 'steps'),
        (['pretrain', '--out', 'x', '--recipe', '/no/recipe.yaml'], '/no/recipe.yaml'),
        (['pretrain', '--out', 'x', '--backbone', 'swin_tini_w7'], 'swin_tiny_w7'),
        (['evaluate', 'knn', '/no/run'], '/no/run'),
        (['export', '/no/run'], '/no/run'),
        (['reproduce', 'low_data', '-p', 'sedes=3'], 'seeds'),
        (['reproduce', 'high_data'], 'low_data'),
        (['data', 'get', 'cifar11', '--root', 'x'], 'cifar10'),
        (['pretrian'], 'pretrain'),
        ([], 'COMMAND'),
    ],
)
def test_wrong_input_is_one_line(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert word in wrong(capsys, *(str(tmp_path / a) if a == 'x' else a for a in argv))


def in_a_process_of_its_own(*argv, cwd=None):
    "As the installed command: nothing is imported before it."
    code = 'import sys; from glsd.cli import main; sys.exit(main())'
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, argv)], cwd=cwd, capture_output=True, text=True
    )


def test_the_installed_command_has_no_traceback():
    done = in_a_process_of_its_own('evaluate', 'knn', '/no/run')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and '/no/run' in done.stderr


@pytest.mark.slow
def test_commands_do_not_lean_on_what_others_have_imported(tmp_path):
    a = tmp_path / 'a'
    tiny = '--n-images 32 --image-size 32 --global-size 32 --n-local 0 --backbone swin_mini --steps 2'
    tiny += ' --batch-size 8 --out-dim 16 --head-hidden 16 --head-bottleneck 8 --device cpu'
    sets = ['--anchors', 'toyworld', '--test', 'toyworld', '--images', 60]
    for argv in (
        ['pretrain', '--out', a, *tiny.split()],
        ['export', a],
        ['evaluate', 'knn', a / 'backbone.safetensors', *sets],
        ['finetune', '--weights', a, '--out', tmp_path / 'b', *tiny.split()[:8], '--steps', 2]
        + ['--batch-size', 8, '--backbone', 'swin_mini', '--n-test', 24],
        ['plan', '--recipe', a / 'recipe.yaml'],
    ):
        done = in_a_process_of_its_own(*argv, cwd=tmp_path)  # figures of a file are written where one stands
        assert done.returncode == 0, (argv, done.stderr[-800:])


def test_supervised_with_drloc_and_measured(run, tmp_path, capsys):
    tiny = (
        '--n-images 32 --n-test 16 --image-size 32 --global-size 32 --backbone vit_mini --steps 2 '
        '--batch-size 8 --drloc-weight 0.5 --drloc-hidden 16'
    ).split()
    a = tmp_path / 'a'
    assert main(['pretrain', 'toyworld', '--method', 'supervised', '--out', str(a), *tiny]) == 0
    assert 'test/top1' in capsys.readouterr().out
    assert main(['export', str(a)]) == 0
    both = [str(a), f'b={a}/backbone.safetensors']
    out = ['--out', str(tmp_path / 'knn.json')]
    assert main(['evaluate', 'knn', *both, '--images', '16', '--k', '3', *out]) == 0
    assert main(['finetune', '--weights', str(run), '--out', str(tmp_path / 'c'), *tiny]) == 0
    assert (
        main(['finetune', '--weights', f'{a}/backbone.safetensors', '--out', str(tmp_path / 'd'), *tiny]) == 0
    )
    words = 'no folder train/', 'pretrain', tmp_path, '--method', 'supervised', '--out', tmp_path / 'b', *tiny
    assert words[0] in wrong(capsys, *words[1:])
    assert '--drloc-m' in wrong(capsys, 'finetune', '--out', tmp_path / 'b', '--drlocm', '1')


def test_dino_has_both_of_its_names(run, tmp_path):
    for name in 'dino', 'vanilla':
        assert main(['pretrain', '--method', name, '--out', str(tmp_path / name), *TINY]) == 0


def test_help_imports_no_torch():
    code = (
        'import sys\nfrom glsd.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n'
        "assert 'torch' not in sys.modules"
    )
    for words in ['--help'], ['pretrain', '--help'], ['evaluate', 'knn', '--help'], ['finetune', '--help']:
        done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and 'usage: glsd' in done.stdout, done.stderr


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--method adclr --backbone swin_mini', 'queries'),
        ('--method adclr --n-query 0', 'n_query'),
        ('--method adclr --query-scale 0.5,2', 'query_scale'),
        ('--method selfpatch --patch-k 9', '8 neighbours'),
        ('--method selfpatch --local-size 8', '1x1'),
        ('--method ibot --global-size 8 --n-local 0', 'one token'),
        ('--method drloc --drloc-m 1000', '256'),
        ('--method drloc --drloc-variant l3', 'l1'),
        ('--method moby --n-global 1', 'two global views'),
    ],
)
def test_a_method_that_cannot_be_had_is_one_line(flags, words, capsys, tmp_path):
    assert main(['pretrain', 'toyworld', '--out', str(tmp_path / 'a'), *TINY, *flags.split()]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('glsd: ') and words in last
