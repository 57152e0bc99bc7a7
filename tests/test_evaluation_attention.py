"""What the chapter cannot show about attention: every kind of block against its own output, odd sizes,
masks, and the widget's clicks."""

import json

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from glsd.backbones import TimmBackbone, create_backbone
from glsd.backbones.swin import SwinBackbone
from glsd.data import ToyWorld
from glsd.evaluation.attention import attention_blocks, attention_maps, block_attention, window_places
from glsd.evaluation.frozen import load_frozen
from glsd.evaluation.object_masks import attention_jaccard, attention_masks, attention_picture
from glsd.evaluation.similarity import (
    pca_rgb,
    similar_patches,
    similarity_map,
    similarity_overlays,
    similarity_widget,
)
from glsd.evaluation.token_matching import PixelPatches

SMALL = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
NETWORKS = {
    'vit with registers and q-norm': lambda: TimmBackbone(
        VisionTransformer(img_size=48, reg_tokens=2, qk_norm=True, **SMALL)
    ),
    'vit without CLS': lambda: create_backbone('vit_mini'),
    'swin of glsd': lambda: create_backbone('swin_mini'),
    'swin of timm': lambda: TimmBackbone(
        SwinTransformer(
            img_size=48,
            patch_size=4,
            window_size=5,
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=0,
        )
    ),
}


def loud(net):
    "Weights so large that attention is far from uniform."
    for name, p in net.named_parameters():
        if 'qkv' in name or 'bias_table' in name:
            torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.fixture(params=NETWORKS)
def network(request):
    return loud(NETWORKS[request.param]().eval())


@torch.no_grad()
def caught(network, block, run):
    """What arrives at the block's dropout of attention (timm's plain way of computing it, if it takes it)
    and at its last layer."""
    seen, fused, block.attn.fused_attn = {}, block.attn.fused_attn, False
    hooks = [
        getattr(block.attn, name).register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0]})
        )
        for name in ('attn_drop', 'proj')
    ]
    hooks.append(block.attn.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out)))
    seen['result'] = run()
    for hook in hooks:
        hook.remove()
    block.attn.fused_attn = fused
    return seen


def test_attention_is_what_timm_computes(network):
    "Ours comes from `qkv` alone; timm, told not to fuse, shows its own."
    x = torch.randn(2, 3, 48, 48)
    for layer, block in enumerate(attention_blocks(network)):
        seen = caught(network, block, lambda layer=layer: block_attention(network, x, layer))
        A = seen['result'][0]
        torch.testing.assert_close(A.sum(-1), torch.ones(A.shape[:-1]))
        if 'attn_drop' in seen:
            torch.testing.assert_close(A.flatten(0, 1), seen['attn_drop'], atol=1e-6, rtol=1e-4)
        else:
            assert isinstance(network, SwinBackbone)  # computes attention itself: the next test


@torch.no_grad()
@pytest.mark.parametrize('size', [48, 32])
def test_weights_times_values_are_what_our_swin_computed(size):
    """A @ v, put back into place, is what arrives at the block's last layer. Blocks of 12 and 6 columns (8
    and 4) with windows of 4."""
    torch.manual_seed(0)
    net = loud(create_backbone('swin_mini').eval())
    x = torch.randn(2, 3, size, size)
    for layer, block in enumerate(attention_blocks(net)):
        seen = caught(net, block, lambda layer=layer: block_attention(net, x, layer))
        A, places, (H, W) = seen['result']
        v = torch.cat([seen['qkv'].flatten(1, 2), block.attn.qkv.bias.expand(2, 1, -1)], 1)[:, places]
        v = v.unflatten(-1, (3, block.attn.num_heads, -1)).movedim(-3, 0)[2].transpose(-2, -3)
        out, there = (A @ v).transpose(-2, -3).flatten(3).flatten(1, 2), places.flatten() >= 0
        together = torch.empty(2, H * W, out.shape[-1])
        together[:, places.flatten()[there]] = out[:, there]
        torch.testing.assert_close(together.unflatten(1, (H, W)), seen['proj'], atol=1e-5, rtol=1e-4)


def test_a_register_is_not_cls():
    "Registers without CLS: the mean over all tokens, not the first register."
    net = TimmBackbone(
        VisionTransformer(img_size=48, reg_tokens=2, class_token=False, global_pool='avg', **SMALL)
    ).eval()
    maps, A = attention_maps(net, x := torch.randn(1, 3, 48, 48)), block_attention(net, x)[0]
    torch.testing.assert_close(maps.flatten(2), A[:, 0, :, 2:, 2:].mean(2))


@pytest.mark.parametrize(
    'name, size',
    [
        ('vit_tiny_patch16_224', 96),
        ('swin_tiny_patch4_window7_224', 224),
        ('vit_mini', 48),
        ('swin_mini', 48),
    ],
)
def test_the_picture_takes_our_networks_and_timms(name, size):
    fig = attention_picture({name: load_frozen(f'random:{name}')}, ToyWorld(3), size, images=(0, 2))
    fig.canvas.draw()
    assert len(fig.axes) == 2 * 6 and fig.axes[0].get_ylabel() == name


@pytest.mark.parametrize(
    'backbones, images, why',
    [
        ({'resnet18': 'random:resnet18'}, (0,), 'ResNet has no self-attention'),
        ({}, (0,), 'at least one'),
        ({'vit': 'random:vit_mini'}, (), 'at least one'),
        ({'vit': 'random:vit_mini'}, (3,), 'no image 3'),
    ],
)
def test_the_picture_refuses_in_one_line(backbones, images, why):
    with pytest.raises(ValueError, match=why) as e:
        attention_picture({k: load_frozen(v) for k, v in backbones.items()}, ToyWorld(3), 64, images)
    assert '\n' not in str(e.value)


def test_sums_and_places(network):
    x, layers = torch.randn(1, 3, 48, 48), len(attention_blocks(network))
    for layer in range(layers):
        mean = attention_maps(network, x, block=layer)[0]
        assert (mean >= 0).all() and (mean.sum((1, 2)) < 1 + 1e-5).all()
        H, W = mean.shape[1:]
        one = attention_maps(network, x, query=(H - 1, W - 1), block=layer)[0]
        assert one[:, H - 1, W - 1].min() > 0  # a token sees itself
        with pytest.raises(ValueError, match='no token at'):
            attention_maps(network, x, query=(H, 0), block=layer)


def test_every_token_lies_in_exactly_one_slot():
    for grid in ((5, 5), (6, 9), (7, 3)):
        for shift in ((0, 0), (2, 2)):
            for pad_first in (True, False):
                places = window_places(grid, (4, 4), shift, pad_first).flatten()
                assert sorted(places[places >= 0].tolist()) == list(range(grid[0] * grid[1]))


def test_a_network_made_to_look_at_one_kind_of_patch_is_seen_doing_so():
    "Keys that measure brightness, and a CLS that asks for it: the brightest patch gets the attention."
    net = TimmBackbone(VisionTransformer(img_size=48, **SMALL)).eval()
    image = torch.zeros(3, 48, 48)
    image[:, 16:24, 32:40] = 1
    with torch.no_grad():
        block = net.model.blocks[0]
        net.model.pos_embed.zero_()
        net.model.cls_token.zero_()
        net.model.patch_embed.proj.bias.zero_()
        net.model.patch_embed.proj.weight.zero_()
        net.model.patch_embed.proj.weight[0] = 1.0
        net.model.cls_token[..., 1] = 1.0
        qkv = block.attn.qkv
        qkv.weight.zero_()
        qkv.bias.zero_()
        qkv.weight[0:48:16, 1] = 5.0
        qkv.weight[48:96:16, 0] = 5.0  # q from the mark of CLS, k from brightness
    maps = attention_maps(net, image, block=0)[0]
    assert all(m.argmax() == 2 * 6 + 4 for m in maps) and (maps.flatten(1).amax(1) > 0.5).all()


def test_masks_hold_the_mass_and_nothing_to_spare():
    maps = torch.rand(20, 3, 6, 6)
    for mass in (0.1, 0.6, 0.99):
        kept = attention_masks(maps, mass)
        held = (maps * kept).sum((-1, -2)) / maps.sum((-1, -2))
        least = torch.where(kept, maps, 9.0).amin((-1, -2)) / maps.sum((-1, -2))
        assert (held > mass - 1e-4).all() and (held - least < mass + 1e-4).all()


def test_perfect_masks_score_a_hundred_and_shuffled_ones_do_not(monkeypatch):
    "A world whose object is a square of whole patches, and a network that looks at exactly them."

    class World:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return self.scene(i)[:2]

        def scene(self, i):
            mask = torch.zeros(1, 48, 48, dtype=torch.bool)
            mask[0, 8:24, 8 * (i % 4) : 8 * (i % 4) + 16] = True
            return (255 * mask).expand(3, -1, -1).to(torch.uint8), 0, mask, None

    look = lambda backbone, image, block=-1: torch.nn.functional.avg_pool2d(image[None, :2].float(), 8) + 1e-6
    monkeypatch.setattr('glsd.evaluation.object_masks.attention_maps', look)
    r = attention_jaccard(create_backbone('vit_mini').eval(), World(), 48, mass=0.99, progress=False)
    assert (
        r['jaccard'] == r['one_head'] == 100 and r['shuffled'] < 50 and abs(r['everything'] - 100 / 9) < 1e-4
    )


def test_jaccard_result_is_json_and_other_sizes_work():
    r = attention_jaccard(create_backbone('swin_mini').eval(), ToyWorld(5), 48, progress=False)
    assert (
        json.loads(json.dumps(r)) == r and len(r['heads']) == 4 and 0 < r['one_head'] <= r['jaccard'] <= 100
    )
    other = attention_jaccard(
        create_backbone('vit_mini'),
        ToyWorld(5),
        48,
        masks=lambda i: torch.ones(64, 64, dtype=torch.bool),
        progress=False,
    )
    assert other['everything'] == 100


def test_a_plain_convolutional_network_is_refused():
    net = TimmBackbone(timm.create_model('resnet10t', num_classes=0))
    with pytest.raises(ValueError, match='no self-attention') as e:
        attention_maps(net, torch.zeros(3, 64, 64))
    assert '\n' not in str(e.value)


def test_colours_do_not_depend_on_the_other_sign_and_stay_in_range():
    tokens = torch.randn(2, 36, 16)
    a, b = pca_rgb(tokens, (6, 6)), pca_rgb(tokens + 100, (6, 6))
    assert a.min() >= 0 and a.max() <= 1
    torch.testing.assert_close(a, b, atol=1e-2, rtol=0)
    assert pca_rgb(torch.randn(36, 2), (6, 6)).shape == (1, 6, 6, 3)  # fewer than three dimensions
    assert not pca_rgb(torch.ones(1, 36, 8), (6, 6)).isnan().any()  # all alike


def test_every_button_of_the_widget_selects_its_own_place():
    net, views = create_backbone('vit_mini').eval(), torch.randn(2, 3, 24, 24)
    row, caption = similarity_widget(net, views, pixels=30).children
    for v in range(2):
        buttons = row.children[v].children[1].children
        assert len(buttons) == 9
        for n, button in enumerate(buttons):
            button.click()
            assert caption.value.startswith(f'view {v + 1}, row {n // 3}, column {n % 3}')


def test_top_share_and_cosines():
    tokens = torch.randn(2, 36, 8)
    cosines = similarity_map(tokens[0], (6, 6), (2, 3))
    assert (
        cosines.flatten().argmax() == 15
        and similar_patches(cosines)[2, 3]
        and similar_patches(cosines).sum() == 4
    )
    across = similarity_map(tokens[0], (6, 6), (2, 3), tokens[1])
    torch.testing.assert_close(across[1, 1], torch.cosine_similarity(tokens[0, 15], tokens[1, 7], dim=0))


def test_overlays_show_what_is_alike_and_tokens_that_are_all_alike_as_bright():
    views, tokens = torch.zeros(2, 3, 24, 24), torch.eye(9)[None].repeat(2, 1, 1)
    a, b = similarity_overlays(views, tokens, (3, 3), (0, 2), pixels=30)
    assert (
        b[5, 25].sum() > 2 * b[25, 5].sum() and (a[0, 20:] == a[0, 20]).all() and (a[0, 20] != b[0, 20]).any()
    )
    same = similarity_overlays(views, torch.ones(2, 9, 4), (3, 3), (0, 2), pixels=30)[1]
    assert (same == b[5, 25]).all()


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda net, x: attention_maps(net, x, query=(6, 0)), r'no token at \(6, 0\): there are 6 rows'),
        (lambda net, x: attention_maps(net, x, block=2), 'no block 2: the backbone has 2'),
        (lambda net, x: attention_maps(net, x[0, 0]), r'images must be \[N, 3, h, w\]'),
        (lambda net, x: attention_maps(PixelPatches(8), x), 'no self-attention'),
        (lambda net, x: similar_patches(torch.ones(4, 4), share=0), 'share=0 must be above 0'),
        (lambda net, x: similarity_map(torch.ones(9, 2), (3, 3), (0, 3)), 'no token at'),
        (lambda net, x: pca_rgb(torch.ones(16, 4), (4, 5)), '16 tokens are not a grid of 4 x 5'),
        (lambda net, x: pca_rgb(torch.full((16, 4), torch.nan), (4, 4)), 'not finite'),
        (lambda net, x: attention_masks(torch.ones(4, 4), 0), 'mass=0 must be above 0'),
        (lambda net, x: attention_jaccard(net, [(x, 0)] * 3, 48), 'list has no masks'),
        (lambda net, x: attention_jaccard(net, ToyWorld(1), 48), 'at least 2'),
        (lambda net, x: attention_picture({'x': PixelPatches(8)}, ToyWorld(3), 48), 'no self-attention'),
        (lambda net, x: similarity_widget(torch.nn.Flatten(), x), 'no tokens'),
    ],
)
def test_refusals_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call(create_backbone('vit_mini').eval(), torch.zeros(1, 3, 48, 48))
    assert '\n' not in str(e.value)


def test_uint8_images_are_normalised_as_the_network_wants_them():
    "The same maps from pixels as from images that are normalised by hand."
    net = loud(create_backbone('vit_mini').eval())
    net.mean, net.std = (0.5,) * 3, (0.25,) * 3
    pixels = torch.stack([ToyWorld(2, 48)[i][0] for i in range(2)])
    torch.testing.assert_close(attention_maps(net, pixels), attention_maps(net, (pixels / 255 - 0.5) / 0.25))
