"Supervised runs: cut and resumed they end the same, bit for bit; without DrLoc they are plain supervised training; faults are one line."

import json

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from glsd.data.folders import Subset
from glsd.data.loading import make_loader
from glsd.data.toyworld import ToyWorld
from glsd.objectives.schedules import cosine_schedule
from glsd.training.checkpoint import export_backbone, last_checkpoint, read_metrics
from glsd.training.labelled import SupervisedRecipe, build_sets, mix, one_view, seeded
from glsd.training.loop import batches, decay_groups, seed_step
from glsd.training.supervised import (
    Classifier,
    SupervisedTrainer,
    load_start,
    load_supervised,
    train_supervised,
)

SMALL = SupervisedRecipe(
    n_images=24,
    n_test=12,
    image_size=32,
    size=32,
    backbone='swin_mini',
    drop_path=0.2,
    batch_size=4,
    steps=8,
    lr=0.1,
    drloc=0.5,
    drloc_pairs=16,
    drloc_hidden=16,
    test_every=0,
    checkpoint_every=3,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'straight'
    train_supervised(SMALL, out, progress=False)
    return out


@pytest.mark.parametrize('cut', [2, 7])  # before the first checkpoint; in the middle of an epoch, after one
def test_a_cut_run_ends_bit_equal(tmp_path, straight, monkeypatch, cut):
    step = SupervisedTrainer.step

    def breaks(trainer, views):
        if trainer.done == cut:
            raise KeyboardInterrupt
        return step(trainer, views)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SupervisedTrainer, 'step', breaks)
        train_supervised(SMALL, tmp_path / 'run', progress=False)
    np.random.rand(7)  # what other code draws in between has no part in it
    train_supervised(SMALL.replace(test_every=1), tmp_path / 'run', progress=False)
    a, b = last_checkpoint(straight), last_checkpoint(tmp_path / 'run')
    assert {k: same(a[k], b[k]) for k in a if k != 'recipe'} == dict.fromkeys(set(a) - {'recipe'}, True)
    assert [m['loss'] for m in read_metrics(straight)] == [m['loss'] for m in read_metrics(tmp_path / 'run')]


def test_a_finished_run_is_read(straight):
    before = (straight / 'metrics.jsonl').read_bytes()
    run = train_supervised(SMALL, straight, progress=False)
    assert (straight / 'metrics.jsonl').read_bytes() == before and 0 <= run.accuracy <= 100
    assert same(dict(load_supervised(straight).model.state_dict()), dict(run.model.state_dict()))


def test_without_drloc_it_is_plain_supervised_training():
    "Three steps written out, with no word of DrLoc in them."
    r = SMALL.replace(drloc=0.0, steps=3)
    train, _ = build_sets(r)
    batches = list(make_loader(train, one_view(r), 4))[:3]
    trainer = SupervisedTrainer(r, 3, train.classes)
    lines = [trainer.step(views) for views in batches]

    seed_step(0, 0)
    model = Classifier(r, 12)
    assert model.localize is None
    optimizer = torch.optim.AdamW(
        decay_groups(model.named_parameters()), weight_decay=r.weight_decay, fused=True
    )
    losses = []
    for step, (views, lr) in enumerate(zip(batches, cosine_schedule(r.lr * 4 / 1024, r.lr_final, 3, 1)), 1):
        for group in optimizer.param_groups:
            group['lr'] = float(lr)
        with seeded(0, step):
            x, target = mix(views.crops[0][0], views.label, r, 12)
            loss = SoftTargetCrossEntropy()(model.head(model.backbone(x).pooled), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == [line['loss'] for line in lines] and 'drloc' not in lines[0]
    assert same(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_with_and_without_are_a_pair():
    "The same weights at the start, and the same images, mixed in the same way: the first cross-entropy is equal."
    train, _ = build_sets(SMALL)
    views = next(iter(make_loader(train, one_view(SMALL), 4)))
    pair = [SupervisedTrainer(SMALL.replace(drloc=lam), 3, train.classes) for lam in (0.0, 0.5)]
    a, b = [t.step(views)['ce'] for t in pair]
    assert a == b


def test_weights_from_a_folder_and_a_file(tmp_path, straight):
    export_backbone(straight, tmp_path / 'a.safetensors')
    wanted = load_supervised(straight).backbone.state_dict()
    for weights in straight, tmp_path / 'a.safetensors':
        model = Classifier(SMALL, 12)
        load_start(model.backbone, str(weights))
        assert same(dict(model.backbone.state_dict()), dict(wanted))


class Bare:
    classes, labels = [], np.full(8, -1)

    def __len__(self):
        return 8


WORLD = ToyWorld(24, 32)
ONE = Subset(WORLD, [0, 12, 0, 12])
ONE.classes = ['disc bars']


@pytest.mark.parametrize(
    'changes, sets, error',
    [
        ({}, dict(train=Bare(), test=WORLD), '8 of 8 training images have no class'),
        ({}, dict(train=ONE, test=ONE), "all images are of one class, 'disc bars'"),
        ({'batch_size': 64}, {}, '24 images are fewer than a batch of 64'),
        ({'backbone': 'swin_minni'}, {}, "no backbone is called 'swin_minni'; the nearest: swin_mini"),
        (
            {'weights': '/no/such'},
            {},
            'weights=/no/such: neither the folder of a run nor a .safetensors file',
        ),
        ({'data': '/no/such'}, {}, 'data=/no/such has no folder train/'),
        ({'drloc_pairs': 1000}, {}, 'm=1000 pairs of a grid of 4 x 4'),
        (
            {'lr': 1e30, 'clip': 0, 'warmup': 0},
            {},
            "step 2: 'ce' is nan; the weights are those from before it",
        ),
    ],
)
def test_faults_are_one_line(tmp_path, changes, sets, error):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        train_supervised(SMALL.replace(**changes), tmp_path, progress=False, **sets)
    assert error in str(e.value) and '\n' not in str(e.value)


def test_weights_of_another_architecture_and_another_recipe(tmp_path, straight):
    with pytest.raises(ValueError, match='is of another architecture; missing: ') as e:
        train_supervised(SMALL.replace(backbone='vit_mini', weights=str(straight)), tmp_path, progress=False)
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='has another recipe: seed is 0 there, 1 here'):
        train_supervised(SMALL.replace(seed=1), straight, progress=False)


def test_the_file_holds_the_weights_once(straight):
    state = last_checkpoint(straight)
    assert state['teacher'].keys() < state['student'].keys()
    assert all(v.data_ptr() == state['student'][k].data_ptr() for k, v in state['teacher'].items())
    json.dumps(state['recipe'])


def test_a_step_that_is_not_finite_leaves_the_weights():
    trainer = SupervisedTrainer(SMALL, 2, WORLD.classes)
    before = [p.clone() for p in trainer.model.parameters()]
    views = next(batches(SMALL, WORLD, 0, 1, one_view(SMALL)))
    views.crops[0][0][0] = float('nan')
    with pytest.raises(ValueError, match='those from before it'):
        trainer.step(views)
    assert trainer.done == 0 and all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
