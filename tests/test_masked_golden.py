"""Floor 5 against the values of the authors' code (tests/golden): the same numbers in, the same out.

Sizes and options are read from the files."""

import numpy as np
import pytest
import torch
from golden_values import close, golden

from glsd.backbones import create_backbone
from glsd.backbones.features import register_backbone
from glsd.backbones.vit import ViTBackbone
from glsd.masked.hog import hog, hog_targets
from glsd.masked.mae import MAE, MAEOptions, sincos_positions
from glsd.masked.masks import MASKS, block_mask, draw_masks, random_masks
from glsd.masked.patches import masked_mse, normalize_patches, patchify, unpatchify
from glsd.objectives.method import ViewOptions


@pytest.fixture(scope='module')
def mae():
    return golden('mae')


def test_patches(mae):
    z, meta = mae
    side = meta['patchify']['size'] // meta['patchify']['patch']
    assert torch.equal(patchify(z['patchify_images'], meta['patchify']['patch']), z['patchify_patches'])
    assert torch.equal(unpatchify(z['unpatchify_patches'], (side, side)), z['unpatchify_images'])


def test_masks_and_positions(mae):
    z, meta = mae
    for i, case in enumerate(meta['masking']):
        hidden, visible = random_masks(z[f'masking{i}_noise'], case['ratio'])
        assert torch.equal(visible, z[f'masking{i}_ids_keep'].long())
        assert torch.equal(hidden.float(), z[f'masking{i}_mask'])
    for i, case in enumerate(meta['sincos']):
        grid = case['grid'], case['grid']
        close(sincos_positions(grid, case['width'], int(case['cls_row'])), z[f'sincos{i}'], 1e-6)


@pytest.mark.parametrize('norm_pix', [0, 1])
def test_loss_and_gradient(mae, norm_pix):
    z, meta = mae
    predicted = z['loss_pred'].clone().requires_grad_()
    target = patchify(z['loss_images'], meta['loss']['patch'])
    if norm_pix:
        target = normalize_patches(target, meta['loss']['eps'])[0]
    loss = masked_mse(predicted, target, z['loss_mask'])
    loss.backward()
    close(loss.detach(), z[f'loss_normpix{norm_pix}'])
    close(predicted.grad, z[f'loss_normpix{norm_pix}_grad'])


@pytest.fixture
def tiny(mae):
    "A method with the sizes and the weights of the file."
    z, meta = mae
    m = meta['model']
    own = 'img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio'
    sizes = {name: m[name] for name in own} | dict(dynamic_img_size=True)
    register_backbone(golden_mae=dict(timm_name='vit_tiny_patch16_224', **sizes))(ViTBackbone)
    decoder = dict(decoder_dim=m['decoder_embed_dim'], decoder_depth=m['decoder_depth'])
    options = MAEOptions(backbone='golden_mae', decoder_heads=m['decoder_num_heads'], **decoder)
    views = ViewOptions(global_size=m['img_size'], n_global=1, n_local=0)

    def build(norm_pix):
        method = MAE(MAEOptions(**vars(options) | dict(norm_pix=bool(norm_pix))), views)
        ours = dict(method.named_parameters())
        names = {name: _our_name(name) for name in m['parameters']}
        with torch.no_grad():
            for theirs, name in names.items():
                ours[name].copy_(z[f'model_w.{theirs}'].reshape(ours[name].shape))
        return method, [ours[name] for name in names.values()]

    return build


def _our_name(name):
    for theirs, ours in (('decoder_', 'decoder.'), ('mask_token', 'decoder.mask_token')):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs).removeprefix('.')
    return f'backbone.model.{name}'


@pytest.mark.parametrize('norm_pix', [0, 1])
def test_the_whole_network(mae, tiny, norm_pix):
    z, meta = mae
    method, parameters = tiny(norm_pix)
    x = z['model_images']
    hidden, visible = random_masks(z['model_noise'], meta['model']['mask_ratio'])
    features = method.backbone(x, index=visible)
    latent = torch.cat([features.pooled[:, None], features.tokens], 1)
    close(latent.detach(), z['model_latent'], 2e-5)
    predicted = method.predict(x, hidden, visible)
    close(predicted[:1].detach(), z['model_pred_first'], 2e-5)
    loss = masked_mse(predicted, method.targets(x), hidden)
    loss.backward()
    close(loss.detach(), z[f'model_loss_normpix{norm_pix}'])
    norms = torch.tensor([float(p.grad.norm()) for p in parameters])
    close(norms, z['model_grad_norms'][:, norm_pix].float(), 1e-4)


def test_order_of_visible_places_is_no_matter(mae, tiny):
    z, meta = mae
    method, _ = tiny(1)
    hidden, visible = random_masks(z['model_noise'], meta['model']['mask_ratio'])
    orders = visible, visible.sort(1).values
    by_noise, in_order = (method.predict(z['model_images'], hidden, v).detach() for v in orders)
    close(in_order, by_noise)
    assert create_backbone('golden_mae').patch == meta['model']['patch_size']


@pytest.fixture(scope='module')
def hogs():
    return golden('maskfeat_hog')


def nearly_all_close(ours, theirs, tolerance=1e-4):
    "A direction on the border of two bins may fall into the other one: judged by the share of numbers."
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() < tolerance).float().mean() > 0.999


@pytest.mark.parametrize('cell', [4, 8])
def test_hog(hogs, cell):
    z, _ = hogs
    nearly_all_close(hog(z['images'], cell), z[f'hog_cell{cell}'])
    nearly_all_close(hog_targets(z['images'], 16, cell), z[f'targets_cell{cell}'])


def test_hog_of_exact_edges_and_the_loss(hogs):
    z, _ = hogs
    close(hog(z['axis_images']), z['axis_hog_cell8'])
    predicted = z['pred'].clone().requires_grad_()
    loss = masked_mse(predicted, hog_targets(z['images'], 16), z['patch_mask'])
    loss.backward()
    close(loss.detach(), z['loss'], 1e-4)
    close(predicted.grad, z['loss_grad'], 1e-3)


def test_blocks_have_the_statistics_of_the_released_code():
    z, meta = golden('beit')
    m, rng = meta['masks'], np.random.default_rng(0)
    grid = m['grid'], m['grid']
    masks = np.stack([block_mask(grid, m['wanted'], rng, low=m['min_block']) for _ in range(3000)])
    counts, draws = masks.sum((1, 2)), z['mask_counts'].sum()
    assert abs(counts.mean() - m['mean_count']) < 0.1 and counts.max() == m['wanted']
    full = float(z['mask_counts'][m['wanted']] / draws)
    assert abs((counts == m['wanted']).mean() - full) < 0.03
    assert abs(masks.mean(0) - z['mask_frequency'].numpy()).max() < 0.04


@pytest.mark.parametrize('kind', MASKS)
@pytest.mark.parametrize('grid', [(2, 2), (4, 4), (3, 5), (14, 14)])
def test_every_mask_hides_the_same_number_on_any_grid(kind, grid):
    n = grid[0] * grid[1]
    hidden, visible = draw_masks(kind, 20, grid, 0.75)
    assert hidden.shape == (20, n) and (hidden.sum(1) == n - visible.shape[1]).all()
    assert kind == 'grid' or visible.shape[1] == int(n * 0.25)
    assert not hidden.gather(1, visible).any()


@pytest.mark.parametrize(
    'kind, grid, ratio, message',
    [
        ('stripes', (4, 4), 0.5, "no mask 'stripes'; choose from: random, block, grid"),
        ('random', (4, 4), 0.0, 'a mask ratio of 0 hides none of 16 patches'),
        ('block', (4, 4), 0.99, 'a mask ratio of 0.99 hides all of 16 patches'),
        ('random', (1, 1), 0.5, 'a mask ratio of 0.5 hides all of 1 patches'),
        ('grid', (4, 4), 0.5, 'a grid mask needs ratio 0.75'),
    ],
)
def test_masks_that_cannot_be_drawn_are_one_line(kind, grid, ratio, message):
    with pytest.raises(ValueError) as e:
        draw_masks(kind, 2, grid, ratio)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)
