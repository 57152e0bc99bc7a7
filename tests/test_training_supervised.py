"""Supervised training is a method under the one trainer: without DrLoc it is plain supervised training;
faults are one line. (Cut and gone on, NaN, replay and processes: with all other methods, elsewhere.)"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from training_runs import SUPERVISED, finite, one_line, same

from glsd.data.folders import Subset
from glsd.data.loading import make_loader
from glsd.data.toyworld import ToyWorld
from glsd.objectives.method import decay_groups
from glsd.objectives.schedules import cosine_schedule
from glsd.training import Recipe, Trainer, export_backbone, fine_tuning, load_method, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint
from glsd.training.labelled import mix
from glsd.training.metrics import read_metrics
from glsd.training.supervised import test_set as images_to_test_on
from glsd.training.supervised import top1
from glsd.training.trainer import build_dataset
from glsd.training.weights import load_start
from glsd.training.world import seeded

SMALL = Recipe('supervised', **SUPERVISED)
WORLD = ToyWorld(24, 32)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'straight'
    pretrain(SMALL, out, progress=False)
    return out


def test_what_other_code_draws_has_no_part_in_a_run(tmp_path, straight):
    np.random.rand(7)
    torch.rand(7)
    pretrain(SMALL.replace(monitor_every=1), tmp_path, progress=False)
    a, b = last_checkpoint(straight), last_checkpoint(tmp_path)
    assert all(same(a[k], b[k]) for k in a if k != 'recipe')
    assert sum('test/top1' in line for line in read_metrics(tmp_path)) == 6


def test_a_finished_run_is_read(straight):
    before = (straight / 'metrics.jsonl').read_bytes()
    run = pretrain(SMALL, straight, progress=False)
    assert (straight / 'metrics.jsonl').read_bytes() == before
    method = load_method(straight)
    assert method.classes == WORLD.classes and same(method.state_dict(), last_checkpoint(straight)['method'])
    test = images_to_test_on(SMALL)
    assert top1(method, test, 32) == run.metrics[-1]['test/top1'] and not method.training


def test_without_drloc_it_is_plain_supervised_training():
    "Three steps written out, with no word of DrLoc in them."
    r = SMALL.replace(drloc_weight=0.0, steps=3)
    train = build_dataset(r)
    trainer = Trainer(r, 3, classes=train.classes)
    batches = list(make_loader(train, trainer.method.views, 8))[:3]
    lines = [trainer.step(views) for views in batches]

    with seeded(0, 0):
        model = r.create_method(train.classes)
    assert model.localize is None
    groups = decay_groups(model.named_parameters())
    optimizer = torch.optim.AdamW(groups, weight_decay=r.weight_decay, fused=True)
    rates = cosine_schedule(r.lr * 8 / 1024, r.lr_final, 3, 1)
    losses = []
    for step, (views, lr) in enumerate(zip(batches, rates), 1):
        for group in optimizer.param_groups:
            group['lr'] = float(lr)
        with seeded(0, step):
            x, target = mix(views.crops[0][0], views.label, r.options, 12)
            loss = SoftTargetCrossEntropy()(model.head(model.backbone(x).pooled), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == [line['loss'] for line in lines] and 'drloc' not in lines[0]
    assert same(model.state_dict(), trainer.method.state_dict())


def test_with_and_without_are_a_pair():
    "The same weights at the start, and the same images, mixed in the same way: the first ce is equal."
    pair = [Trainer(SMALL.replace(drloc_weight=w), 3, classes=WORLD.classes) for w in (0.0, 0.5)]
    views = next(iter(make_loader(WORLD, pair[0].method.views, 8)))
    a, b = [trainer.step(views)['ce'] for trainer in pair]
    assert a == b


def test_weights_from_a_folder_and_a_file(tmp_path, straight):
    export_backbone(straight, tmp_path / 'a.safetensors')
    wanted = load_run(straight).backbone.state_dict()
    for weights in straight, tmp_path / 'a.safetensors':
        method = SMALL.create_method(WORLD.classes)
        load_start(method.backbone, str(weights))
        assert same(method.backbone.state_dict(), wanted)
    tuned = fine_tuning(straight, **SUPERVISED).replace(steps=1)
    assert tuned.warmup == 0.1 and tuned.weights == str(straight)
    assert finite(last_checkpoint(pretrain(tuned, tmp_path / 'tuned', {}, progress=False).path)['method'])


class Bare:
    classes, labels = [], np.full(8, -1)

    def __len__(self):
        return 8


ONE = Subset(WORLD, [0, 12] * 4)
ONE.classes = ['disc bars']


@pytest.mark.parametrize(
    'changes, dataset, error',
    [
        ({}, Bare(), '8 of 8 images have no class'),
        ({}, ONE, "all images are of one class, 'disc bars'"),
        ({'batch_size': 64}, None, '48 images are fewer than a batch of 64'),
        ({'backbone': 'swin_minni'}, None, "unknown backbone 'swin_minni'; the closest: swin_mini"),
        (
            {'weights': '/no/such'},
            None,
            'weights=/no/such: neither the folder of a run nor a .safetensors file',
        ),
        ({'data': '/no/such'}, None, '/no/such'),
        ({'drloc_m': 1000}, None, 'm=1000 pairs on a grid of 4 x 4'),
        ({'drloc_divisor': '7'}, None, "divisor '7' of DrLoc is unknown: choose one of k, none, k-1"),
        ({'drloc_rise': 1.0, 'drloc_fall': True}, None, 'drloc_rise=1 leaves no steps for drloc_fall'),
        (
            {'lr': 1e30, 'clip': 0, 'warmup': 0},
            None,
            "step 2: 'ce' is nan; the weights are those from before this step",
        ),
    ],
)
def test_faults_are_one_line(tmp_path, changes, dataset, error):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        pretrain(SMALL.replace(**changes), tmp_path, progress=False, dataset=dataset)
    assert error in str(e.value) and one_line(e)


def test_a_folder_with_train_and_val(tmp_path):
    for part, n in ('train', 16), ('val', 4):
        for i in range(n):
            place = tmp_path / 'data' / part / ('rose' if i % 2 else 'tulip')
            place.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 50).convert('RGB').save(place / f'{i}.png')
    recipe = SMALL.replace(data=tmp_path / 'data', steps=1)
    run = pretrain(recipe, tmp_path / 'run', progress=False)
    assert load_method(run.path).classes == ['rose', 'tulip'] and 'test/top1' in run.metrics[-1]
    (tmp_path / 'data/val/rose').rename(tmp_path / 'data/val/daisy')
    with pytest.raises(ValueError, match="different classes; the first is 'daisy'") as error:
        pretrain(recipe, tmp_path / 'other', progress=False)
    assert one_line(error)
    with pytest.raises(FileNotFoundError, match='has no folder train/'):
        images_to_test_on(recipe.replace(data=tmp_path / 'data/val'))


def test_weights_of_another_architecture_and_another_recipe(tmp_path, straight):
    with pytest.raises(ValueError, match='has another architecture; missing: ') as e:
        pretrain(SMALL.replace(backbone='vit_mini', weights=str(straight)), tmp_path, progress=False)
    assert one_line(e)
    with pytest.raises(ValueError, match='has another recipe: seed is 0 there, 1 here'):
        pretrain(SMALL.replace(seed=1), straight, progress=False)


def test_a_run_with_other_classes_is_not_gone_on_with(tmp_path, straight):
    data = Subset(WORLD, range(24))
    data.classes = [f'class {i}' for i in range(12)]
    with pytest.raises(ValueError, match='was trained on other classes') as error:
        pretrain(SMALL, straight, progress=False, dataset=data)
    assert one_line(error)


def test_the_file_holds_the_weights_once(straight):
    state = last_checkpoint(straight)
    tensors = [v.data_ptr() for v in state['method'].values() if v.numel()]
    assert len(tensors) == len(set(tensors)) and state['backbone']['prefix'] == 'backbone.'
    json.dumps(state['recipe'])
