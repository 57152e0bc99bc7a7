"""What the chapters of floor 3 do not show: backbones into timm through a file, gradients, determinism."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from glsd.backbones import Backbone, create_backbone, features, list_backbones, register_backbone
from glsd.backbones.heads import DINOHead
from glsd.backbones.swin import window_attention
from glsd.objectives.branches import Branch

CLIPS = [n for n, module in features._modules.items() if module.endswith('.mvit')]  # timm has none of these
SMALL = ['swin_mini', 'vit_mini', 'vit_tiny_p16']
SIZES = {'swin_mini': (32, 16), 'vit_mini': (32, 16), 'vit_tiny_p16': (64, 48)}


def on_meta(name, **kwargs):
    with torch.device('meta'):
        return create_backbone(name, **kwargs)


@pytest.mark.parametrize('name', [n for n in list_backbones() if n not in CLIPS])
def test_every_name_has_timms_keys_and_shapes(name):
    ours = on_meta(name, drop_path=0.1)
    kwargs = json.loads(json.dumps(ours.timm_kwargs))  # an exported file carries them as text
    with torch.device('meta'):
        theirs = timm.create_model(ours.timm_name, num_classes=0, **kwargs)
    assert {k: v.shape for k, v in ours.model.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.dim == theirs.num_features


@pytest.mark.parametrize('name', SMALL)
def test_weights_pass_through_a_file_into_timm(name, tmp_path):
    ours = create_backbone(name).eval()
    save_file(ours.model.state_dict(), tmp_path / 'w.safetensors')
    theirs = timm.create_model(ours.timm_name, num_classes=0, **ours.timm_kwargs).eval()
    theirs.load_state_dict(load_file(tmp_path / 'w.safetensors'))
    for module in theirs.modules():  # timm's Swin has 1e-5, which no weight file can say; the chapter does
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    x = torch.randn(2, 3, *[{'vit_tiny_p16': 224}.get(name, 32)] * 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).pooled, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_all_weights_learn_and_forward_is_deterministic(name):
    model = create_backbone(name)
    large, small = SIZES[name]
    f, g = model(torch.randn(2, 3, large, large)), model(torch.randn(2, 3, small, small))
    (f.tokens.sin().sum() + f.pooled.sin().sum() + g.tokens.cos().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    x = torch.randn(3, 3, large, large)
    assert torch.equal(model.eval()(x).tokens, model(x).tokens)
    assert torch.equal(copy.deepcopy(model)(x).tokens, model(x).tokens)


@pytest.mark.parametrize('name', SMALL)
def test_a_crop_does_not_depend_on_the_others_of_its_batch(name):
    model, x = create_backbone(name).eval(), torch.randn(5, 3, SIZES[name][0], SIZES[name][0])
    with torch.no_grad():
        torch.testing.assert_close(model(x).tokens[3:4], model(x[3:4]).tokens, rtol=1e-4, atol=1e-5)


def test_drop_path_is_the_students_only():
    student, teacher = create_backbone('vit_mini', drop_path=0.5), create_backbone('vit_mini')
    assert student.state_dict().keys() == teacher.state_dict().keys()
    teacher.load_state_dict(student.state_dict())
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(student(x).pooled, student(x).pooled)
    assert torch.equal(teacher(x).pooled, teacher(x).pooled)


def test_masks_made_in_inference_mode_serve_training():
    from glsd.backbones.swin import shift_mask

    shift_mask.cache_clear()
    model = create_backbone('swin_mini')
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    model(torch.randn(1, 3, 32, 32)).pooled.sum().backward()
    assert model.model.layers[0].blocks[1].attn.qkv.weight.grad.isfinite().all()


@pytest.mark.parametrize('name', ['swin_tiny_w7', 'swin_tiny_w14'])
def test_swin_top_row_does_not_reach_the_bottom_of_a_local_crop(name):
    model = create_backbone(name).eval().model
    for stage, side in zip(model.layers, (24, 12, 6, 3)):
        block = stage.blocks[1]
        if not any(block.shift_size):
            continue
        x = torch.randn(1, side, side, block.dim)
        y = x.clone()
        y[:, 0] += 1
        with torch.no_grad():
            rows = (
                (window_attention(block, x) - window_attention(block, y))
                .abs()
                .amax((0, 2, 3))
                .nonzero()
                .flatten()
            )
        assert rows.max() == min(block.shift_size[0], side) - 1


def test_sizes_that_do_not_fit():
    for name in SMALL:
        patch = create_backbone(name).patch
        for h, w in ((patch - 1, patch), (patch, patch + 1), (0, patch)):
            with pytest.raises(ValueError, match=f'{h}x{w}.*multiples of {patch}'):
                create_backbone(name)(torch.zeros(1, 3, h, w))


def test_unknown_name_has_neighbours():
    with pytest.raises(ValueError, match='swin_tiny_w7'):
        create_backbone('swin-tiny-w7')
    with pytest.raises(ValueError, match='vit_tiny_p16'):
        create_backbone('')


def test_a_backbone_of_ones_own_works_in_a_branch():
    @register_backbone(test_own=dict(timm_name='resnet10t'))
    class Own(Backbone):
        def features(self, x):
            z = self.model.forward_features(x)
            tokens = z.flatten(2).transpose(1, 2)
            from glsd.backbones import Features

            return Features(tokens.mean(1), tokens, tuple(z.shape[-2:]))

    from types import SimpleNamespace

    views = SimpleNamespace(crops=[torch.randn(2, 3, 3, 64, 64)], w_geo=[torch.zeros(2, 3, 7)])
    out = Branch(
        create_backbone('test_own'), {'region': 'tokens'}, out_dim=16, hidden_dim=16, bottleneck_dim=8
    )(views)
    assert out.logits['region'].shape == (3, 8, 16)
    from glsd.backbones import features

    del features._backbones['test_own']


def test_head_under_autocast_and_with_batch_norm_statistics():
    head = DINOHead(32, 64, 32, 16, batch_norm=True)
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(torch.randn(4, 5, 32))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert head.mlp[1].num_batches_tracked == 1


def test_import_of_the_floor_needs_no_notebook_tools():
    code = (
        'import sys, glsd.backbones.heads, glsd.backbones.swin; '
        "print([m for m in ('nbdev', 'IPython', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
