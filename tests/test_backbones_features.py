"""What all backbones share: Features, an index of patches, inner maps, how they want their images, names."""

import ast
import copy
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from glsd.backbones import Features, TimmBackbone, ViTBackbone, create_backbone, list_backbones
from glsd.backbones import features as features_module
from glsd.backbones.beit import HALF
from glsd.views.photometric import MEAN, STD

CLIPS = [
    n for n, module in features_module._modules.items() if module.endswith('.mvit')
]  # timm has none of these
SMALL = ['vit_mini', 'vit_tiny_p16', 'swin_mini', 'resnet_mini', 'cvt_mini', 't2t_mini']
NB = Path(__file__).parent.parent / 'nbs' / '3_backbones'


def run_python(code):
    "What a fresh interpreter prints, with every warning an error."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def outputs_of(modules, call):
    "What each of `modules` returned during `call`."
    seen = {}
    hooks = [
        m.register_forward_hook(lambda m, _, out, i=i: seen.update({i: out})) for i, m in enumerate(modules)
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(modules))]


def small_vit(**options):
    options = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=3, num_classes=0) | options
    return timm.models.VisionTransformer(**options).eval()


# Features


def test_features_do_not_share_what_one_method_needs():
    a, b = Features(torch.zeros(1, 2)), Features(torch.zeros(1, 2))
    a.extra['queries'] = torch.zeros(1)
    assert b.extra == {} and b.tokens is None and b.grid is None and b.index is None


def test_features_can_be_compiled():
    model = torch.compile(create_backbone('vit_tiny_p16').eval(), backend='eager', fullgraph=True)
    f = model(torch.randn(1, 3, 32, 32))
    assert isinstance(f, Features) and f.tokens.shape == (1, 4, 192)


# An index of patches


@pytest.mark.parametrize('name', ['vit_mini', 'vit_tiny_p16', 'vit_tiny_p16_mean'])
def test_an_index_of_all_patches_changes_no_bit(name):
    model, x = create_backbone(name).eval(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        f = model(x)
        g = model(x, index=torch.arange(f.tokens.shape[1]).expand(2, -1))
    assert torch.equal(f.tokens, g.tokens) and torch.equal(f.pooled, g.pooled) and f.grid == g.grid


@pytest.mark.parametrize('name', ['vit_mini', 'vit_tiny_p16'])
def test_a_subset_of_patches_is_gathered_before_the_blocks(name):
    model, x = create_backbone(name).eval(), torch.randn(2, 3, 64, 64)
    index = torch.tensor([[7, 0, 3], [1, 2, 15]])
    timms, p = model.model, model.model.num_prefix_tokens
    with torch.no_grad():
        z = timms._pos_embed(timms.patch_embed(x))
        z = torch.stack([torch.cat([one[:p], one[p:][i]]) for one, i in zip(z, index)])
        z = timms.norm(timms.blocks(z))
        f = model(x, index=index)
    torch.testing.assert_close(f.tokens, z[:, p:])
    torch.testing.assert_close(f.pooled, z[:, 0] if p else z.mean(1))
    assert torch.equal(f.index, index) and f.tokens.shape == (2, 3, model.dim)


def test_an_index_goes_with_a_mask_and_queries_and_has_gradients():
    model, x = create_backbone('vit_tiny_p16').eval(), torch.randn(2, 3, 64, 64)
    index, mask = torch.tensor([[5, 2], [0, 1]]), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = True
    token, queries = nn.Parameter(torch.randn(192)), torch.randn(2, 3, 3, 16, 16)
    f = model(x, index=index, mask=mask, mask_token=token, queries=queries)
    assert f.tokens.shape == (2, 2, 192) and f.extra['queries'].shape == (2, 3, 192)
    f.tokens.sin().sum().backward()
    assert token.grad.abs().sum() > 0 and model.model.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('index', [torch.arange(4), torch.zeros(3, 4, dtype=torch.long)])
def test_an_index_of_another_shape_is_refused(index):
    with pytest.raises(ValueError, match=r'an index for 2 crops must be \[2, n\]'):
        create_backbone('vit_mini')(torch.zeros(2, 3, 32, 32), index=index)


@pytest.mark.parametrize('name', [name for name in SMALL if 'vit' not in name])
def test_other_backbones_refuse_an_index(name):
    with pytest.raises(ValueError, match="cannot take 'index'"):
        create_backbone(name)(torch.zeros(1, 3, 32, 32), index=torch.zeros(1, 4, dtype=torch.long))


# Maps of inner layers


@pytest.mark.parametrize('name', SMALL)
def test_the_last_map_is_the_tokens(name):
    model, x = create_backbone(name).eval(), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        f = model(x)
        (last,) = model.intermediates(x, norm=True)
    assert last.shape[-2:] == f.grid and torch.equal(last.flatten(2).mT, f.tokens)


@pytest.mark.parametrize('antialias', [True, False])
def test_maps_of_a_vit_are_those_of_its_blocks(antialias):
    model, x = create_backbone('vit_tiny_p16', antialias=antialias).eval(), torch.randn(2, 3, 48, 96)
    seen = outputs_of(model.model.blocks, lambda: model(x))
    with torch.no_grad():
        maps = model.intermediates(x, (11, 0, -3), return_prefix_tokens=True)
        normed = model.intermediates(x, (4,), norm=True)[0]
    for i, (m, cls) in zip((11, 0, 9), maps):
        assert torch.equal(m.flatten(2).mT, seen[i][:, 1:]) and torch.equal(cls, seen[i][:, :1])
        assert m.shape == (2, 192, 3, 6)
    assert torch.equal(normed.flatten(2).mT, model.model.norm(seen[4])[:, 1:])


@pytest.mark.parametrize('size', [64, 96, 100])
def test_maps_of_a_swin_are_those_of_its_stages_and_blocks(size):
    model, x = create_backbone('swin_tiny_w7').eval(), torch.randn(1, 3, size, 64)
    stages = list(model.model.layers)
    blocks = [block for stage in stages for block in stage.blocks]
    seen = outputs_of(stages, lambda: model(x))
    inside = outputs_of(blocks, lambda: model(x))
    with torch.no_grad():
        maps, block_maps = model.intermediates(x, range(4)), model.intermediates(x, range(12), blocks=True)
        normed = model.intermediates(x, range(4), norm=True)
    for found, expected in ((maps, seen), (block_maps, inside)):
        assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(found, expected))
    assert [m.shape[1] for m in maps] == [96, 192, 384, 768]
    assert all(torch.equal(a, b) for a, b in zip(maps[:3], normed))
    assert torch.equal(normed[3].permute(0, 2, 3, 1), model.model.norm(seen[3]))


def test_the_last_four_blocks_of_swin_as_esvit_reads_them():
    "Two blocks of the third stage as they are, two of the last through the LayerNorm, averaged."
    model, x = create_backbone('swin_tiny_w7').eval(), torch.randn(2, 3, 96, 96)
    third, last = (list(model.model.layers[i].blocks)[-2:] for i in (2, 3))
    seen = outputs_of([*third, *last], lambda: model(x))
    with torch.no_grad():
        expected = [*seen[:2], *(model.model.norm(z) for z in seen[2:])]
        found = [m.mean((2, 3)) for m in model.intermediates(x, range(-4, 0), norm=True, blocks=True)]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat([z.mean((1, 2)) for z in expected], 1))
    assert torch.cat(found, 1).shape == (2, 2304)


def test_maps_of_a_resnet_are_those_of_its_stages():
    model, x = create_backbone('resnet_mini').eval(), torch.randn(2, 3, 32, 48)
    seen = outputs_of([getattr(model.model, f'layer{i}') for i in (1, 2, 3, 4)], lambda: model(x))
    with torch.no_grad():
        maps = model.intermediates(x, (0, 1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(maps, seen))
    with pytest.raises(ValueError, match='stages only'):
        model.intermediates(x, blocks=True)


def test_maps_of_a_cvt_are_those_of_its_blocks():
    model, x = create_backbone('cvt_mini').eval(), torch.randn(2, 3, 32, 48)
    seen = outputs_of([block for stage in model.model.stages for block in stage], lambda: model(x))
    with torch.no_grad():
        blocks = model.intermediates(x, range(4), blocks=True, return_prefix_tokens=True)
        stages = model.intermediates(x, range(3))
    for i, (m, cls) in enumerate(blocks):
        first = int(i >= 2)  # CLS joins in the last stage
        assert torch.equal(m.flatten(2).mT, seen[i][:, first:])
        assert cls is None if not first else torch.equal(cls, seen[i][:, :1])
    assert all(torch.equal(a, blocks[i][0]) for a, i in zip(stages, (0, 1, 3)))


def test_maps_of_a_t2t_are_those_of_its_blocks():
    model, x = create_backbone('t2t_mini').eval(), torch.randn(2, 3, 32, 48)
    seen = outputs_of(model.model.blocks, lambda: model(x))
    with torch.no_grad():
        maps = model.intermediates(x, (1, 0), return_prefix_tokens=True)
    for (m, cls), z in zip(maps, seen[::-1]):
        assert torch.equal(m.flatten(2).mT, z[:, 1:]) and torch.equal(cls, z[:, :1])


@pytest.mark.parametrize('name', SMALL)
def test_a_layer_that_is_not_there_and_a_size_that_does_not_divide_are_refused(name):
    model = create_backbone(name)
    n = model.n_layers()
    for layer in (n, -n - 1):
        with pytest.raises(ValueError, match=f'no layer {layer}: there are {n}'):
            model.intermediates(torch.zeros(1, 3, 32, 32), (0, layer))
    with pytest.raises(ValueError, match='does not divide'):
        model.intermediates(torch.zeros(1, 3, 33, 32))


# How a network wants its images


@pytest.mark.parametrize('name', [n for n in list_backbones() if n not in CLIPS])
def test_what_is_trained_here_is_measured_with_the_normalisation_of_training(name):
    with torch.device('meta'):
        model = create_backbone(name)
    size = 32 if 'mini' in name else 224
    mean, std = (HALF, HALF) if name.startswith('dvae') else (MEAN, STD)  # a tokenizer's pixels
    assert (model.input_size, model.mean, model.std) == ((size, size), mean, std)
    assert (model.crop_pct, model.interpolation) == (0.875, 'bicubic')
    assert model.model.pretrained_cfg['input_size'] == (3, size, size)


def test_the_size_that_a_backbone_is_built_for_is_its_input_size():
    assert create_backbone('vit_mini', img_size=64).input_size == (64, 64)
    assert create_backbone('t2t_mini', img_size=64).input_size == (64, 64)


def test_a_published_model_says_what_its_weights_want():
    net = TimmBackbone(timm.create_model('vit_small_patch16_224', depth=1))
    assert net.mean == net.std == (0.5, 0.5, 0.5) and net.crop_pct == 0.9 and net.input_size == (224, 224)
    net = TimmBackbone(timm.create_model('efficientnet_lite0'))
    assert net.interpolation == 'bicubic' and net.crop_pct == 0.875 and net.dim == 1280
    net = TimmBackbone(
        net.model, input_size=(96, 128), mean=MEAN, std=STD, crop_pct=1.0, interpolation='bilinear'
    )
    assert (net.input_size, net.mean, net.std) == ((96, 128), MEAN, STD)
    assert (net.crop_pct, net.interpolation) == (1.0, 'bilinear')


def test_a_network_without_a_config_is_told_of():
    with pytest.warns(UserWarning, match="SmallNet does not say .* ImageNet's mean and std are assumed"):

        class SmallNet(nn.Flatten):
            pass

        TimmBackbone(SmallNet())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        TimmBackbone(nn.Flatten(), mean=MEAN, std=STD)


# Any network in hand


@pytest.mark.parametrize(
    'name',
    [
        'vit_tiny_p16',
        'swin_tiny_w7',
        'resnet50',
        'vit_mini',
        'swin_mini',
        'cvt_mini',
        'dvae_mini',
    ],
)
def test_timms_own_model_gives_what_our_backbone_gives(name):
    ours = create_backbone(name).eval()
    model = timm.create_model(ours.timm_name, num_classes=10, **ours.timm_kwargs).eval()
    model.load_state_dict(ours.model.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6 if name[:4] in ('swin', 'vit_') else module.eps
    net, x = TimmBackbone(model), torch.randn(1, 3, *ours.input_size)
    with torch.no_grad():
        f, g = ours(x), net(x)
    torch.testing.assert_close(f.pooled, g.pooled, rtol=1e-4, atol=1e-4)
    assert net.dim == ours.dim and net.timm_name == ours.timm_name and net.stride == ours.stride
    torch.testing.assert_close(f.tokens, g.tokens, rtol=1e-4, atol=1e-4)
    assert f.grid == g.grid


@pytest.mark.parametrize('options', [{}, dict(class_token=False, global_pool='avg'), dict(reg_tokens=4)])
@pytest.mark.parametrize('no_embed_class', [False, True])
def test_vits_with_and_without_cls_and_registers(options, no_embed_class):
    model = small_vit(dynamic_img_size=True, no_embed_class=no_embed_class, **options)
    net, x = TimmBackbone(model, mean=MEAN, std=STD), torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        f = net(x)
        sequence = model.forward_features(x)
        (m, prefix), *_ = net.intermediates(x, norm=True, return_prefix_tokens=True)
    assert f.grid == (6, 5) and torch.equal(f.tokens, sequence[:, -30:])
    assert torch.equal(f.pooled, model(x)) and torch.equal(m.flatten(2).mT, f.tokens)
    assert (prefix is None) == (model.num_prefix_tokens == 0)


def test_vit_backbone_takes_registers_and_refuses_what_is_no_plain_vit():
    ours = ViTBackbone('vit_small_patch14_reg4_dinov2', img_size=112, depth=2).eval()
    theirs = timm.create_model(ours.timm_name, num_classes=0, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.model.state_dict())
    for size in (112, 70):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            f = ours(x)
            torch.testing.assert_close(f.pooled, theirs(x))
            torch.testing.assert_close(f.tokens, theirs.forward_features(x)[:, 5:])
    for name in ('deit_tiny_distilled_patch16_224', 'eva02_tiny_patch14_224'):
        with pytest.raises(ValueError, match=f'{name} is not a plain timm VisionTransformer'):
            ViTBackbone(name, depth=1)
    with pytest.raises(ValueError, match='keeps all patches'):
        ViTBackbone('vit_tiny_patch16_224', depth=1, patch_drop_rate=0.5)


@pytest.mark.parametrize(
    'name, size',
    [('vit_small_patch14_reg4_dinov2', 120), ('vit_tiny_patch16_224', 224 + 16), ('mixer_s32_224', 96)],
)
def test_a_size_that_the_model_cannot_take_is_one_line(name, size):
    options = dict(dynamic_img_size=True) if 'dinov2' in name else {}
    net = TimmBackbone(timm.create_model(name, num_classes=0, **options))
    with pytest.raises(ValueError, match=f'{size}x{size}') as e:
        net(torch.zeros(1, 3, size, size))
    assert '\n' not in str(e.value)


def test_an_error_that_has_nothing_to_do_with_the_size_stays_what_it_is():
    net = TimmBackbone(small_vit(), mean=MEAN, std=STD)
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 4, 32, 32))  # four channels


def test_positions_like_dinos_for_any_vit_of_timm():
    model = small_vit(dynamic_img_size=True, reg_tokens=2)
    nn.init.normal_(model.pos_embed)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        before, native = model(x), model(torch.ones(1, 3, 32, 32))
        net = TimmBackbone(model, mean=MEAN, std=STD, antialias=False)
        ours = create_backbone('vit_tiny_p16', antialias=False).eval()
        timms = timm.create_model(ours.timm_name, num_classes=0, **ours.timm_kwargs).eval()
        timms.load_state_dict(ours.model.state_dict())
        torch.testing.assert_close(TimmBackbone(timms, antialias=False)(x).pooled, ours(x).pooled)
        assert not torch.allclose(net(x).pooled, before, atol=1e-4)
        torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), native)  # nothing to resize
        twin = copy.deepcopy(net)
        model.pos_embed.zero_()
        assert not torch.allclose(twin(x).pooled, net(x).pooled)  # the copy has its own positions
    assert (
        net.state_dict().keys()
        == TimmBackbone(small_vit(reg_tokens=2), mean=MEAN, std=STD).state_dict().keys()
    )
    with pytest.raises(ValueError, match='antialias=False is for'):
        TimmBackbone(timm.create_model('resnet10t'), antialias=False)


def test_modules_that_are_not_timms():
    x = torch.randn(2, 3, 16, 24)
    options = dict(mean=MEAN, std=STD)
    f = TimmBackbone(nn.Conv2d(3, 5, 8, 8), **options)(x)
    assert f.grid == (2, 3) and f.tokens.shape == (2, 6, 5)
    torch.testing.assert_close(f.pooled, f.tokens.mean(1))
    assert TimmBackbone(nn.Flatten(), **options)(x).tokens is None

    class Own(nn.Module):
        def forward(self, x):
            return Features(x.mean((2, 3)), x.flatten(2).mT, tuple(x.shape[-2:]))

    assert TimmBackbone(Own(), **options)(x).grid == (16, 24)
    for module, what in ((nn.Flatten(2), r'a tensor \[2, 3, 384\]'), (nn.LSTM(24, 2), 'a tuple')):
        with pytest.raises(ValueError, match=f'returns {what}: a backbone returns'):
            TimmBackbone(module, **options)(x if what.startswith('a te') else x[:, 0])
    with pytest.raises(ValueError, match='no forward_intermediates'):
        TimmBackbone(nn.Flatten(), **options).intermediates(x)


def test_models_of_timm_without_places_and_with_a_hidden_layer_in_the_head():
    net = TimmBackbone(timm.create_model('mobilenetv3_small_050')).eval()
    with torch.no_grad():
        f = net(torch.randn(1, 3, 64, 64))
    assert f.pooled.shape == (1, net.dim) == (1, 1024) and f.tokens.shape == (1, 4, 288) and f.grid == (2, 2)
    net = TimmBackbone(timm.create_model('crossvit_tiny_240')).eval()
    with torch.no_grad():
        f = net(torch.randn(1, 3, 240, 240))
    assert f.tokens is None and f.grid is None and f.pooled.shape == (1, net.dim)


# Names


def test_every_module_registers_the_names_that_the_list_gives_it():
    modules = features_module._modules
    for module in set(modules.values()):
        importlib.import_module(module)
    registered = {name: cls.__module__ for name, (cls, _) in features_module._backbones.items()}
    ours = {n: m for n, m in registered.items() if m.startswith('glsd.') and not n.startswith('golden')}
    assert ours == modules


@pytest.mark.slow
@pytest.mark.parametrize('order', ['import timm, glsd.backbones', 'import glsd.backbones, timm'])
def test_timm_knows_the_small_models_in_either_order(order):
    from glsd.backbones.timm_models import _timm_models

    code = (
        f'import warnings; warnings.simplefilter("error", UserWarning)\n{order}\n'
        f'print(all(timm.is_model(n) for n in {list(_timm_models)}))\n'
        'print(timm.create_model("vit_mini_patch8_32").default_cfg["input_size"])\n'
        'from glsd.backbones import *\nfrom glsd.backbones.timm_models import *\n'
        'print(TimmBackbone.__name__, t2t_mini_32.__module__)'
    )
    assert run_python(code).split('\n') == ['True', '(3, 32, 32)', 'TimmBackbone glsd.backbones.t2t']


def test_the_package_is_cheap_to_import():
    code = 'import sys, glsd.backbones.heads; print([m for m in ("timm", "torchvision") if m in sys.modules])'
    assert run_python(code) == '[]'


def test_chapters_import_no_later_floor():
    allowed = ('glsd.views', 'glsd.data', 'glsd.backbones')
    for path in sorted(NB.glob('*.ipynb')):
        for cell in json.loads(path.read_text())['cells']:
            if cell['cell_type'] != 'code':
                continue
            for node in ast.walk(ast.parse(''.join(cell['source']))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                later = [n for n in names if n.startswith('glsd') and not n.startswith(allowed)]
                assert not later, f'{path.name} imports {later}'


def test_options_of_t2t_travel_with_an_export():
    net = create_backbone('t2t_mini', qk_scale=96**-0.5, antialias=False)
    assert net.timm_kwargs == dict(qk_scale=96**-0.5, antialias=False)
    twin = timm.create_model(net.timm_name, num_classes=0, **json.loads(json.dumps(net.timm_kwargs)))
    twin.load_state_dict(net.model.state_dict())
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(x), net.eval()(x).pooled)
        assert not torch.equal(net(x).tokens, create_backbone('t2t_mini').eval()(x).tokens)
