"MoCo's groups for BatchNorm, its queue, and what it refuses."

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from training_runs import one_line, small_recipe

from glsd.backbones import create_backbone
from glsd.contrastive.moco import check_norms, freeze_patches, in_groups, plain_norms
from glsd.training import Recipe, pretrain
from glsd.training.processes import SyncedBatchNorm


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)


def test_groups_have_statistics_of_their_own():
    norm, x = nn.BatchNorm1d(3), torch.randn(12, 3)
    apart = torch.cat([norm(part) for part in x.chunk(3)])
    torch.testing.assert_close(in_groups(norm, x, 3), apart)
    torch.testing.assert_close(in_groups(nn.Identity(), x, 5, shuffle=True), x)
    shuffled = in_groups(norm, x, 3, shuffle=True)
    assert not torch.allclose(shuffled, apart, atol=1e-3)
    torch.testing.assert_close(in_groups(norm, x, 1, shuffle=True), norm(x))


def test_plain_batchnorm_on_several_processes_is_one_line(two_processes):
    resnet = create_backbone('resnet_mini')
    with pytest.raises(
        ValueError, match='mocov2: model.bn1 and .* other BatchNorms see the images of one'
    ) as e:
        check_norms(resnet, 'mocov2')
    assert one_line(e)
    for m in resnet.modules():
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d):
            m.__class__ = SyncedBatchNorm
    check_norms(resnet, 'mocov2')
    check_norms(nn.SyncBatchNorm.convert_sync_batchnorm(create_backbone('resnet_mini')), 'mocov2')
    check_norms(create_backbone('vit_mini_p4'), 'mocov2')


def test_the_number_of_groups_is_that_of_the_whole_batch(two_processes):
    method = small_recipe('mocov2', bn_group=4, backbone='resnet_mini').create_method()
    assert method.groups(8) == 4 and method.groups(2) == 1 and method.groups(3) == 1
    without = small_recipe('mocov2', bn_group=4, backbone='vit_mini_p4').create_method()
    assert without.groups(8) == 1 and plain_norms(without) == []


def test_patches_are_frozen_in_both_encoders():
    method = small_recipe('mocov3', backbone='vit_mini_p4').create_method()
    ours, theirs = (net.backbone.model.patch_embed for net in (method.encoder, method.momentum_encoder))
    assert not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(ours.proj.weight, theirs.proj.weight)
    trained = {id(p) for group in method.parameter_groups() for p in group['params']}
    assert not trained & {id(p) for p in ours.parameters()}
    assert not freeze_patches(create_backbone('swin_mini'))


def test_keys_wait_for_the_end_of_the_step_and_not_at_all_in_eval_mode():
    recipe = small_recipe('mocov2')
    method = recipe.create_method()
    images = [torch.randint(256, (3, 32, 32), dtype=torch.uint8) for _ in range(8)]
    views = method.views(images, [np.random.default_rng(i) for i in range(8)])
    method.training_step(views, {})
    assert method.banks[0].filled == 0
    method.after_step(dict(momentum=0.9))
    assert method.banks[0].filled == 8
    method.eval().training_step(views, {})
    method.after_step(dict(momentum=1.0))
    assert method.banks[0].filled == 8


@pytest.mark.parametrize(
    'method, wrong, message',
    [
        ('mocov2', dict(queue=4), 'queue=4 is smaller than a batch of 8'),
        ('mocov2', dict(n_global=1), 'mocov2 compares two views of an image, not 1 global and 0 local'),
        ('mocov2', dict(bn_group=-1), 'bn_group=-1 must be a number of images'),
        ('mocov3', dict(n_local=2), 'mocov3 compares two views of an image, not 2 global and 2 local'),
        ('mocov3', dict(temperature=0.0), 'temperature must be positive'),
        ('simclr', dict(batch_size=1), 'simclr needs other images in the batch'),
    ],
)
def test_recipes_that_make_no_sense_are_one_line(method, wrong, message):
    with pytest.raises(ValueError, match=message) as e:
        small_recipe(method, **wrong)
    assert one_line(e)


@pytest.mark.parametrize('method', ['mocov2', 'nnclr', 'looc'])
def test_a_queue_larger_than_the_data_is_a_warning_of_the_run(method, tmp_path):
    with pytest.warns(UserWarning, match='queue=64 is larger than the data, 48 images'):
        pretrain(small_recipe(method, queue=64, steps=1), tmp_path / 'large', {}, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'queue=', UserWarning)
        pretrain(small_recipe(method, steps=1), tmp_path / 'small', {}, progress=False)


def test_moco_is_version_2():
    assert Recipe('moco').to_dict() == Recipe('mocov2').to_dict() | dict(method='moco')
