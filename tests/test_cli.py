"""Whole commands, one after the other, as a user gives them; and wrong input, which costs one line and never a traceback."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from glsd.cli import main

TINY = ('--image-size 32 --n-images 64 --global-size 32 --local-size 16 --n-local 1 --backbone vit_mini --out-dim 32 --head-hidden 16 '
        '--head-bottleneck 8 --batch-size 16 --steps 2 --device cpu').split()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The folder of a run of two steps."
    out = tmp_path_factory.mktemp('cli') / 'run'
    assert main(['pretrain', 'toyworld', '--out', str(out), '--objective', 'geometric', *TINY]) == 0
    return out


def wrong(capsys, *argv):
    "Exit code 2 and exactly one line, which is returned."
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('glsd: '), lines
    return lines[0]


def test_evaluate_knn(run, tmp_path, capsys):
    assert main(['evaluate', 'knn', str(run), '--k', '10', '20', '--out', str(tmp_path / 'knn.json')]) == 0
    assert 'k = 10' in capsys.readouterr().out
    assert set(json.loads((tmp_path / 'knn.json').read_text())['knn']) == {'10', '20'}


def test_export_gives_a_file_and_the_line_that_loads_it(run, tmp_path, capsys):
    file = tmp_path / 'b.safetensors'
    assert main(['export', str(run), '--out', str(file)]) == 0
    assert 'timm.create_model' in capsys.readouterr().out
    from glsd.training import load_run
    backbone = load_run(run).backbone
    model = timm.create_model(backbone.timm_name, num_classes=0, checkpoint_path=str(file), **backbone.timm_kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(model(x), backbone(x).pooled, rtol=1e-4, atol=1e-5)


def test_a_second_call_goes_on_and_another_architecture_is_refused(run, capsys):
    assert main(['pretrain', 'toyworld', '--out', str(run), '--objective', 'geometric', *TINY]) == 0
    capsys.readouterr()
    line = wrong(capsys, 'pretrain', 'toyworld', '--out', run, '--objective', 'geometric', *TINY, '--head-hidden', '24')
    assert 'head_hidden' in line


def test_folder_problems(tmp_path, capsys):
    assert '/no/such' in wrong(capsys, 'pretrain', '/no/such', '--out', tmp_path / 'a', *TINY)
    (tmp_path / 'empty').mkdir()
    assert 'empty' in wrong(capsys, 'pretrain', tmp_path / 'empty', '--out', tmp_path / 'b', *TINY)
    (tmp_path / 'one').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'one/a.png')
    assert 'batch' in wrong(capsys, 'pretrain', tmp_path / 'one', '--out', tmp_path / 'c', *TINY)


@pytest.mark.parametrize('argv, word', [
    (['pretrain', '--out', 'x', '--objective', 'geometrik'], 'geometric'),
    (['pretrain', '--out', 'x', '--objectve', 'geometric'], '--objective'),
    (['pretrain', '--out', 'x', '--steps', 'many'], 'steps'),
    (['pretrain', '--out', 'x', '--recipe', '/no/recipe.yaml'], '/no/recipe.yaml'),
    (['pretrain', '--out', 'x', '--backbone', 'swin_tini_w7'], 'swin_tiny_w7'),
    (['evaluate', 'knn', '/no/run'], '/no/run'), (['export', '/no/run'], '/no/run'),
    (['reproduce', 'low_data', '-p', 'sedes=3'], 'seeds'), (['reproduce', 'high_data'], 'low_data'),
    (['data', 'get', 'cifar11', '--root', 'x'], 'cifar10'), (['pretrian'], 'pretrain'), ([], 'COMMAND')])
def test_wrong_input_is_one_line(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert word in wrong(capsys, *(str(tmp_path / a) if a == 'x' else a for a in argv))


def test_the_installed_command_has_no_traceback():
    done = subprocess.run([sys.executable, '-c', 'import sys; from glsd.cli import main; sys.exit(main())', 'evaluate', 'knn', '/no/run'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr and '/no/run' in done.stderr
