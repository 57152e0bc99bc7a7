"""MaskFeat: equal to the authors' values, learning on each kind of backbone, and one line for what cannot be.

Killed and resumed, and on several processes: test_training_resume.py and test_training_processes.py."""

import numpy as np
import pytest
import torch
from golden_values import golden

from glsd.data.loading import sample_rng
from glsd.data.toyworld import ToyWorld
from glsd.masked.maskfeat import MaskFeat, PatchTarget, create_target, masked_mean, repeat_mask
from glsd.objectives.method import create_method


@pytest.fixture(scope='module')
def values():
    return golden('maskfeat_hog')


def batch_of(method, n=16, size=64):
    world = ToyWorld(n, size=size)
    return method.views([world[i][0] for i in range(n)], [sample_rng(0, 0, i) for i in range(n)])


def falls(method, steps=12, lr=3e-3):
    "The loss on one batch, again and again, at first and at the end."
    views, losses = batch_of(method), []
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=lr)
    for step in range(steps):
        torch.manual_seed(step % 2)  # two masks in turn
        loss = sum(method.training_step(views, {}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and all(
        p.grad is not None for p in method.parameters() if p.requires_grad
    )
    return losses[0], losses[-1]


class Options:
    "What a target reads of a method's options."

    target_source = ''

    def __init__(self, cell):
        self.hog_cell = cell


@pytest.mark.parametrize('cell', [4, 8])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float64, 1e-3)])
def test_hog_is_the_authors(values, cell, dtype, tolerance):
    z, _ = values
    theirs = z[f'targets_cell{cell}']
    patch = z['images'].shape[-1] // round(theirs.shape[1] ** 0.5)
    target = create_target('hog', patch, Options(cell))
    ours = target(z['images'].to(dtype)).float()
    assert ours.shape == theirs.shape and ours.shape[-1] == target.numbers
    # a direction on the border of two bins may fall into the other one
    assert ((ours - theirs).abs() < tolerance).float().mean() > 0.99


def test_loss_and_gradient_are_the_authors(values):
    z, _ = values
    predicted = z['pred'].double().requires_grad_()
    errors = PatchTarget().error(predicted, z['targets_cell8'].double())
    loss = masked_mean(errors, z['patch_mask'])
    loss.backward()
    torch.testing.assert_close(loss.float(), z['loss'].float(), rtol=1e-5, atol=0)
    tolerance = 1e-4 * float(z['loss_grad'].abs().max())
    torch.testing.assert_close(predicted.grad.float(), z['loss_grad'], rtol=0, atol=tolerance)


def test_masks_of_units_are_repeated_as_the_authors_do(values):
    z, _ = values
    small, large = z['upsample_mask'], z['upsampled_mask']
    ours = repeat_mask(small.flatten(1), small.shape[1:], large.shape[1:])
    assert torch.equal(ours.view(large.shape), large)


ON = [('vit_mini_p4', 4), ('vit_mini', 8), ('swin_mini', 8), ('resnet_mini', 8)]


@pytest.mark.parametrize('backbone, cell', ON)
def test_the_error_falls(backbone, cell):
    torch.manual_seed(0)
    method = create_method('maskfeat', backbone=backbone, hog_cell=cell, global_size=32)
    first, last = falls(method)
    assert last < 0.8 * first


@pytest.mark.parametrize('target', ['rgb', 'norm_rgb', 'features'])
def test_other_targets(target):
    torch.manual_seed(0)
    named = dict(target=target, target_source='random:vit_mini')
    method = create_method('maskfeat', backbone='swin_mini', global_size=32, mask='random', power=1, **named)
    first, last = falls(method)
    assert last < 0.9 * first
    frozen = [p for p in method.target.parameters()]
    assert not any(p.requires_grad for p in frozen) and not method.target.training


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(backbone='vit_mini_p4'), 'hog_cell=8: cells of that many pixels do not fill a patch of 4'),
        (dict(hog_cell=3), 'hog_cell=3: cells of that many pixels do not fill a patch of 8'),
        (dict(global_size=16), 'mask=block: blocks cannot fill a grid of 2 x 2; choose mask=random'),
        (dict(global_size=36), 'global_size=36: tokens of 8 pixels'),
        (dict(mask_ratio=0.999), 'a mask ratio of 0.999 hides all of 16 patches'),
        (dict(mask='random', mask_unit=32), 'a mask ratio of 0.4 hides all of 1 patches'),
        (dict(mask_unit=12), 'mask_unit=12: units of that many pixels do not fill 4 x 4 tokens of 8'),
        (dict(mask='stripes'), "no mask 'stripes'; choose from: random, block, grid"),
        (dict(target='hogs'), "no target 'hogs'; did you mean 'hog'?"),
        (dict(target='features'), 'target=features needs target_source'),
        (dict(target='features', target_source='nowhere'), 'nowhere: no run folder'),
    ],
)
def test_what_cannot_be_is_one_line(values, message):
    with pytest.raises(ValueError) as e:
        create_method('maskfeat', **dict(backbone='vit_mini', global_size=32) | values)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(target='hogg'), "recipe: no target 'hogg'; did you mean 'hog'?"),
        (dict(power=3), 'recipe: power=3 must be 1'),
        (dict(mask_ratio=1.0), 'recipe: mask_ratio=1 must lie between 0 and 1'),
        (dict(n_local=2), 'recipe: masked prediction sees one crop'),
    ],
)
def test_recipes_that_cannot_be_are_one_line(values, message):
    from glsd.training import Recipe

    with pytest.raises(ValueError) as e:
        Recipe('maskfeat', backbone='vit_mini', global_size=32, **values)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_nothing_hidden_is_one_line():
    with pytest.raises(ValueError, match='no patch is hidden'):
        masked_mean(torch.zeros(1, 4), torch.zeros(1, 4))


def test_the_defaults_of_a_run_are_the_released_ones():
    d = MaskFeat.defaults
    assert (d['clip'], d['global_scale'], d['lr'], d['lr_batch']) == (0.02, (0.5, 1.0), 2e-4, 256)
    assert MaskFeat.default(MaskFeat.Options).mask_ratio == 0.4
