"""DeiT equals the authors' released code (golden/deit.npz); students listen, are cut and go on; refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from training_runs import SUPERVISED, deit_teacher, finite, interrupt_at, one_line, same

from glsd.backbones import create_backbone
from glsd.data.loading import make_loader
from glsd.data.toyworld import ToyWorld
from glsd.training import Recipe, Trainer, export_backbone, load_method, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint
from glsd.training.deit import (
    RepeatedAugmentation,
    distillation_terms,
    open_teacher,
    repeated_indices,
    soft_distillation,
)

Z = np.load(Path(__file__).parent / 'golden/deit.npz')
META = json.loads(str(Z['meta']))
WORLD = ToyWorld(24, 32)
SMALL = dict(
    SUPERVISED, drloc_weight=0.0, lr=1e-3, lr_batch=8, backbone='deit_mini', n_global=2, batch_size=4
)


def case_terms(case, dtype):
    "Loss and gradients of a case, with inputs of a type."
    outputs, outputs_kd = (
        torch.tensor(Z[k], dtype=dtype, requires_grad=True) for k in ('outputs', 'outputs_kd')
    )
    targets = torch.tensor(Z['soft_labels'], dtype=dtype)
    if case['base'] == 'smooth':
        labels = torch.tensor(Z['labels']).long()
        targets = mixup_target(labels, outputs.shape[1], 1.0, 0.1).to(dtype)
    terms = distillation_terms(
        outputs, outputs_kd, torch.tensor(Z['teacher'], dtype=dtype), targets, case['distillation'],
        case['alpha'], case['tau'],
    )  # fmt: skip
    loss = sum(terms.values())
    loss.backward()
    return loss.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in (outputs, outputs_kd)]


@pytest.mark.parametrize('case', META['loss'], ids=lambda case: f'{case["base"]}-{case["distillation"]}')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_losses_and_gradients(case, dtype):
    loss, grads = case_terms(case, dtype)
    name, exact = f'case{case["case"]}', dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), Z[f'{name}_loss'], rtol=1e-6 if exact else 1e-5)
    for grad, key in zip(grads, ('outputs', 'outputs_kd')):
        wanted = Z[f'{name}_grad_{key}']
        tolerance = (1e-6 if exact else 1e-4) * max(np.abs(wanted).max(), 1e-9)
        np.testing.assert_allclose(grad.numpy(), wanted, rtol=0, atol=tolerance)


def test_the_teacher_decides_by_the_largest_logit():
    assert (Z['teacher'].argmax(1) == Z['teacher_argmax']).all()


@pytest.mark.parametrize('case', META['sampler'], ids=lambda case: str(case['case']))
def test_index_lists_are_the_samplers(case):
    j, n = case['case'], case['length']
    order = Z[f'sampler{j}_permutation'] if case['shuffle'] else np.arange(n)
    for rank in range(case['ranks']):
        wanted = Z[f'sampler{j}_rank{rank}'].tolist()
        assert repeated_indices(order, rank, case['ranks'], case['repeats']) == wanted
        sampler = RepeatedAugmentation(n, rank, case['ranks'], case['repeats'])
        sampler.set_epoch(case['epoch'])
        assert len(sampler) == len(wanted) == case['per_rank']
        if case['shuffle']:
            assert list(sampler) == wanted  # torch's own permutation of that epoch


def test_small_data_sets_are_refused_and_not_empty():
    assert repeated_indices(range(255)) == []
    with pytest.raises(ValueError, match='255 images are fewer than 256: an epoch would be empty') as error:
        RepeatedAugmentation(255)
    assert one_line(error) and len(RepeatedAugmentation(255, multiple=1)) == 255


def test_the_papers_mean_is_over_images():
    student, teacher = torch.randn(2, 6, 10)
    ratio = soft_distillation(student, teacher, 3.0, per_image=True) / soft_distillation(
        student, teacher, 3.0
    )
    assert abs(ratio - 10) < 1e-4


@pytest.mark.parametrize(
    'backbone, changes',
    [
        ('deit_mini', {}),
        ('deit_mini', dict(ema=0.9, distillation='soft', tau=3.0, alpha=0.1)),
        ('swin_mini', dict(token=False)),
        ('resnet_mini', dict(token=False, distillation='none')),
    ],
)
def test_a_student_is_cut_and_gone_on_with(tmp_path, backbone, changes):
    own = dict(backbone=backbone, steps=4, teacher=deit_teacher(), **changes)
    recipe = Recipe('deit', **{**SMALL, **own})
    run = pretrain(recipe, tmp_path / 'a', progress=False)
    kinds = {'ce'} if recipe.distillation == 'none' else {'ce', 'distillation'}
    assert kinds <= run.metrics[-1].keys() and 'test/top1' in run.metrics[-1]
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'b', {'i': interrupt_at(3)}, progress=False)
    pretrain(recipe, tmp_path / 'b', progress=False)
    a, b = last_checkpoint(tmp_path / 'a'), last_checkpoint(tmp_path / 'b')
    assert finite(a['method']) and same(a['method'], b['method']) and same(a['optimizer'], b['optimizer'])
    assert not any('teacher' in key for key in a['method'])
    x = torch.randn(2, 3, 32, 32)
    method, backbone = load_method(run.path), load_run(run.path).backbone
    assert torch.equal(method.backbone(x).pooled, backbone(x).pooled)
    export_backbone(run.path, tmp_path / 'x.safetensors')


def test_it_learns_what_the_teacher_says():
    plain = dict(mixup=0, cutmix=0, erase=0, randaugment='', warmup=0.0, drop_path=0.0)
    recipe = Recipe('deit', **{**SMALL, **plain, 'alpha': 1.0, 'lr': 3e-3, 'teacher': deit_teacher()})
    trainer = Trainer(recipe, 12, classes=WORLD.classes)
    views = next(iter(make_loader(WORLD, trainer.method.views, 4)))
    lines = [trainer.step(views) for _ in range(12)]
    assert lines[-1]['distillation'] < 0.8 * lines[0]['distillation'] and lines[0]['ce'] == 0


def test_both_heads_are_averaged_and_the_token_has_its_own():
    method = Recipe('deit', **SMALL).create_method(WORLD.classes).eval()
    x = torch.randn(3, 3, 32, 32)
    outputs, outputs_kd = method.both(x)
    assert torch.equal(method.logits(x), (outputs + outputs_kd) / 2)
    registers = method.backbone(x).extra['registers']
    assert registers.shape == (3, 1, 96) and torch.equal(outputs_kd, method.head_kd(registers[:, 0]))
    with torch.device('meta'):
        small = create_backbone('deit_small_p16')
    assert small.model.pos_embed.shape == (1, 198, 384)  # CLS and the token have positions, as in DeiT


@pytest.mark.parametrize(
    'changes, error',
    [
        ({'backbone': 'vit_mini'}, 'vit_mini has no distillation token: choose one such as deit_mini'),
        ({'teacher': ''}, 'deit needs a teacher'),
        ({'teacher': '/no/such'}, 'no checkpoint in /no/such'),
        ({'distillation': 'warm'}, "no distillation 'warm'; choose from: none, soft, hard"),
        ({'distillation': 'none'}, 'set token=False'),
        ({'alpha': 1.5}, 'alpha must be a share'),
        ({'tau': 0}, 'tau must be greater than 0'),
        ({'n_local': 2}, 'neither DrLoc nor local views'),
        ({'drloc_weight': 0.1}, 'neither DrLoc nor local views'),
        ({'batch_size': 3, 'n_global': 1}, 'must be even to mix pairs'),
    ],
)
def test_faults_are_one_line(tmp_path, changes, error):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        pretrain(Recipe('deit', **{**SMALL, 'teacher': deit_teacher(), **changes}), tmp_path, progress=False)
    assert error in str(e.value) and one_line(e)


def test_teachers_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match='knows other classes; the first is') as error:
        open_teacher(deit_teacher(), [*WORLD.classes[:-1], 'rose'])
    assert one_line(error)
    mae = dict(
        n_images=24, image_size=32, global_size=32, backbone='vit_mini_p4', decoder_dim=32, decoder_depth=1
    )
    pretrain(
        Recipe('mae', **mae, decoder_heads=2, batch_size=8, steps=1), tmp_path / 'mae', {}, progress=False
    )
    with pytest.raises(ValueError, match='learned without labels') as error:
        open_teacher(str(tmp_path / 'mae'), WORLD.classes)
    assert one_line(error)
