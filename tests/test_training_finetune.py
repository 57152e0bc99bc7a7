"""Fine-tuning: rates by layer, blocks that are frozen, averages that are kept; beside training from scratch;
cut and gone on; and what is refused."""

import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import SUPERVISED, finite, interrupt_at, one_line, same

from glsd.backbones import create_backbone
from glsd.cli import main
from glsd.data.loading import make_loader, sample_rng
from glsd.data.toyworld import ToyWorld
from glsd.training import Recipe, Trainer, finetune_recipe, load_method, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint
from glsd.training.finetune import finetune, start_of
from glsd.training.labelled import AugmentedCrop
from glsd.training.layers import layer_decay_groups, layer_numbers
from glsd.views.multicrop import one_view_colours

TUNED = dict(SUPERVISED, drloc_weight=0.0, lr=1e-3, lr_batch=8, drop_path=0.1, backbone='vit_mini')
WORLD = ToyWorld(24, 32)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp('start') / 'run'
    pretrain(Recipe('supervised', **TUNED).replace(steps=2), out, {}, progress=False)
    return out


DEPTHS = [
    *[
        ('vit_base_p16', 12),
        ('vit_mini_p4', 4),
        ('swin_tiny_w7', 12),
        ('swin_mini', None),
        ('resnet_mini', 4),
    ],
    ('resnet50', 16),
]


@pytest.mark.parametrize('name, depth', DEPTHS)
def test_rates_are_the_closed_form(name, depth):
    with torch.device('meta'):
        backbone = create_backbone(name)
        head = nn.Linear(backbone.dim, 10)
    numbers, found = layer_numbers(backbone)
    assert found == depth or depth is None
    groups = layer_decay_groups(backbone, head, 0.65)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    parameters = dict(backbone.model.named_parameters())
    assert len(scale) == len(parameters) + 2 and set(numbers) == set(parameters)
    for n, p in parameters.items():
        assert scale[id(p)] == 0.65 ** (found + 1 - numbers[n])
    assert scale[id(head.weight)] == scale[id(head.bias)] == 1
    assert set(numbers.values()) - {found + 1} == set(range(found + 1))  # no block without a layer of its own


def test_blocks_are_numbered_by_their_names():
    "By the names, with a rule written here: blocks of a ViT; blocks of a Swin through its stages."
    with torch.device('meta'):
        vit, swin = create_backbone('vit_base_p16'), create_backbone('swin_tiny_w7')
    for name, number in layer_numbers(vit)[0].items():
        block = re.match(r'blocks\.(\d+)', name)
        wanted = int(block[1]) + 1 if block else 13 if name.startswith('norm') else 0
        assert number == wanted, name
    first = [1, 3, 5, 11]  # of each stage; depths 2, 2, 6, 2
    for name, number in layer_numbers(swin)[0].items():
        block = re.match(r'layers\.(\d)\.(?:blocks\.(\d)|downsample)', name)
        wanted = first[int(block[1])] + int(block[2] or 0) if block else 13 if name.startswith('norm') else 0
        assert number == wanted, name


def test_one_rate_for_all_is_plain_supervised_training():
    more = dict(randaugment='', layer_decay=1.0, lr_batch=8, jitter=0.4)
    changes = {k: v for k, v in Recipe('supervised', **SUPERVISED).to_dict().items() if k != 'method'}
    pair = [
        Trainer(Recipe('supervised', **changes), 3, classes=WORLD.classes),
        Trainer(
            Recipe('finetune', **{**changes, **more, 'lr_batch': changes['lr_batch']}),
            3,
            classes=WORLD.classes,
        ),
    ]
    views = next(iter(make_loader(WORLD, pair[0].method.views, 8)))
    lines = [[trainer.step(views)['loss'] for _ in range(3)] for trainer in pair]
    assert np.allclose(*lines, rtol=1e-5)


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini', 'resnet_mini'])
@pytest.mark.parametrize('n', [0, 1])
def test_what_is_frozen_does_not_move(backbone, n):
    recipe = Recipe('finetune', **{**TUNED, 'backbone': backbone}, last_blocks=n, warmup=0.0)
    trainer = Trainer(recipe, 3, classes=WORLD.classes)
    before = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    views = next(iter(make_loader(WORLD, trainer.method.views, 8)))
    for _ in range(2):
        trainer.step(views)
    numbers, depth = layer_numbers(trainer.method.backbone)
    state = trainer.method.state_dict()
    moved = {k for k, v in state.items() if not torch.equal(v, before[k])}
    free = {f'backbone.model.{k}' for k, number in numbers.items() if n and number > depth - n}
    assert {'head.weight', 'head.bias'} <= moved
    parameters = {name for name, _ in trainer.method.named_parameters()}
    assert moved & parameters <= free | {'head.weight', 'head.bias'} and (not n or moved & free)
    if not n:
        assert not any(k.startswith('backbone') for k in moved)  # BatchNorm's averages neither


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini', 'resnet_mini'])
def test_averages_are_tested_kept_and_resumed(tmp_path, start, backbone):
    weights = {'weights': str(start)} if backbone == 'vit_mini' else {}
    recipe = Recipe('finetune', **{**TUNED, 'backbone': backbone}, ema=0.9, **weights)
    run = pretrain(recipe, tmp_path / 'a', progress=False)
    assert finite(last_checkpoint(run.path)['method']) and 'test/top1' in run.metrics[-1]
    method = load_method(run.path)
    assert same(load_run(run.path).backbone.state_dict(), method.backbone.state_dict())
    x = torch.randn(2, 3, 32, 32)
    kept = method.logits(x)
    assert torch.equal(kept, method.head(method.backbone(x).pooled))
    assert not torch.equal(kept, method.trained['head'](method.trained['backbone'](x).pooled))
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'b', {'i': interrupt_at(3)}, progress=False)
    pretrain(recipe, tmp_path / 'b', progress=False)
    a, b = last_checkpoint(tmp_path / 'a'), last_checkpoint(tmp_path / 'b')
    assert same(a['method'], b['method']) and same(a['optimizer'], b['optimizer'])


def test_a_measurement_is_gone_on_with_and_read(tmp_path, start, monkeypatch):
    recipe = finetune_recipe(start, **{k: v for k, v in TUNED.items() if k != 'backbone'})
    assert (recipe.backbone, recipe.global_size, recipe.data) == ('vit_mini', 32, 'toyworld')
    found = finetune(recipe, tmp_path, lrs=(1e-3, 3e-3), progress=False)
    assert json.loads((tmp_path / 'finetune.json').read_text()) == found
    assert [len(found[k]['grid']) for k in ('tuned', 'scratch')] == [2, 2] and found['n_test'] == 12
    assert found['tuned']['top1'] == max(row['top1'] for row in found['tuned']['grid'])
    scratch = load_run(tmp_path / 'scratch_lr0.001').recipe
    assert (scratch.weights, scratch.layer_decay, scratch.steps) == ('', 1.0, recipe.steps)
    first = [
        json.loads((tmp_path / f'{k}_lr0.001/metrics.jsonl').read_text().splitlines()[0])
        for k in ('tuned', 'scratch')
    ]
    assert first[0]['loss'] != first[1]['loss']  # other weights at the start
    monkeypatch.setattr('glsd.training.loop.train', None)  # what is finished is not trained again
    assert finetune(recipe, tmp_path, lrs=(1e-3, 3e-3), progress=False) == found


def test_a_rate_at_which_it_diverges_is_a_row_without_accuracy(tmp_path, start):
    recipe = finetune_recipe(
        start, **{k: v for k, v in TUNED.items() if k not in ('backbone', 'steps')}, warmup=0.0, steps=4
    )
    found = finetune(recipe, tmp_path, lrs=(1e30, 1e-3), scratch=False, progress=False)
    assert found['tuned']['lr'] == 1e-3 and found['tuned']['grid'][0]['top1'] is None and not found['scratch']
    with pytest.raises(ValueError, match='not finite at any learning rate') as error:
        finetune(recipe, tmp_path, lrs=(1e30,), scratch=False, progress=False)
    assert one_line(error)


def test_randaugment_depends_on_seed_epoch_and_index_alone():
    crop = AugmentedCrop(
        global_size=32,
        n_global=1,
        n_local=0,
        photometric=[one_view_colours(0)],
        randaugment='rand-m9-mstd0.5-inc1',
    )
    images = [WORLD[i][0] for i in range(6)]
    rngs = lambda: [sample_rng(0, 1, i) for i in range(6)]  # noqa: E731
    first = crop(images, rngs()).crops[0]
    random.random(), np.random.rand()
    states = random.getstate(), np.random.get_state()[1].copy()
    assert torch.equal(crop(images, rngs()).crops[0], first)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    for seed in range(60):  # every change at every strength
        crop(images[:2], [sample_rng(seed, 1, i) for i in range(2)])
    plain = AugmentedCrop(global_size=32, n_global=1, n_local=0, photometric=[one_view_colours(0)])
    assert not torch.equal(plain(images, rngs()).crops[0], first)


@pytest.mark.parametrize(
    'changes, error',
    [
        ({'layer_decay': 1.5}, 'layer_decay must be a share'),
        ({'layer_decay': 0}, 'set last_blocks=0 instead'),
        ({'ema': 1}, 'ema=1 keeps the weights of the start'),
        ({'last_blocks': -2}, 'last_blocks must be at least -1'),
        ({'last_blocks': 3}, 'last_blocks=3, but vit_mini_patch8_32 has 2 blocks'),
        ({'randaugment': 'auto'}, "a word like rand-m9-mstd0.5-inc1, not 'auto'"),
        ({'backbone': 'cvt_mini', 'weights': ''}, 'set layer_decay=1 and last_blocks=-1'),
        ({'weights': '/no/such'}, 'neither the folder of a run nor'),
        ({'batch_size': 7}, 'batch_size must be even'),
    ],
)
def test_faults_are_one_line(tmp_path, start, changes, error):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        recipe = Recipe('finetune', **{**TUNED, 'weights': str(start), **changes})
        pretrain(recipe, tmp_path, progress=False)
    assert error in str(e.value) and one_line(e)


def test_what_finetune_refuses(tmp_path, start):
    recipe = Recipe('finetune', **TUNED)
    for wrong, lrs, words in (
        (recipe, (), 'finetune needs weights'),
        (recipe.replace(weights=str(start)), (0.0,), 'lrs must be positive'),
        (recipe.replace(weights=str(start)), (1e-3, 1e-3), 'all different'),
        (Recipe('mae', weights=str(start)), (), 'mae learns without labels'),
    ):
        with pytest.raises(ValueError, match=words) as error:
            finetune(wrong, tmp_path / 'x', lrs, progress=False)
        assert one_line(error) and not (tmp_path / 'x').exists()
    with pytest.raises(FileNotFoundError, match='no checkpoint in this folder'):
        start_of(tmp_path)


def flowers(folder, names, n=8):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.effect_noise((32, 32), 50).convert('RGB').save(folder / name / f'{i}.png')
    return folder


FLAGS = '--batch-size 8 --steps 2 --lr 1e-3 --lr-batch 8 --device cpu'.split()


def test_the_command_with_folders(tmp_path, start, capsys):
    train, test = flowers(tmp_path / 'a', ('rose', 'tulip')), flowers(tmp_path / 'b', ('rose', 'tulip'), 3)
    words = ['finetune', start, '--anchors', train, '--test', test, '--out', tmp_path / 'out', *FLAGS]
    assert main([*map(str, words), '--lrs', '1e-3,2e-3']) == 0
    line = capsys.readouterr().out
    assert (
        'fine-tuned' in line
        and 'from scratch' in line
        and '6 test images' in line
        and 'chance 50.0 %' in line
    )
    assert len(list((tmp_path / 'out').glob('*_lr*'))) == 4
    assert main([*map(str, words[: -len(FLAGS)]), '--no-scratch', *FLAGS, '--lrs', '1e-3']) == 0
    assert 'from scratch' not in capsys.readouterr().out
    for more, words in (
        (['--anchors', train], '--anchors and --test'),
        ([train, '--weights', start], 'has no folder train/'),
        (['--anchors', train, '--test', flowers(tmp_path / 'c', ('daisy',))], "the first is 'daisy'"),
    ):
        first = [] if '--weights' in more else [start]
        argv = ['finetune', *first, *more, '--out', tmp_path / 'no', *FLAGS]
        assert main([str(a) for a in argv]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path, start):
    argv = [
        'finetune',
        start,
        '--out',
        tmp_path / 'out',
        *FLAGS,
        '--n-images',
        32,
        '--n-test',
        12,
        '--nproc',
        2,
    ]
    assert main([str(a) for a in argv]) == 0
    found = json.loads((tmp_path / 'out/finetune.json').read_text())
    assert found['tuned']['top1'] is not None and found['scratch']['steps'] == 2
