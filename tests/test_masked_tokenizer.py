"""Tokenizers of floor 5: against the authors' values (tests/golden/beit.npz), bad input, runs and files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import close, golden
from safetensors import safe_open

from glsd.backbones.beit import EncoderBackbone
from glsd.backbones.features import _backbones, register_backbone
from glsd.masked.dvae import (
    DVAE,
    DVAEOptions,
    code_figures,
    count_codes,
    dead_codes,
    gumbel_softmax,
    kl_to_uniform,
    load_tokenizer,
    save_tokenizer,
)
from glsd.masked.vq import (
    VQKD,
    Quantizer,
    VQKDOptions,
    cosine_kmeans,
    cosine_loss,
    load_teacher,
    move_codebook,
    nearest_codes,
    quantise,
    sums_of,
)
from glsd.objectives.method import ViewOptions, create_method
from glsd.views.multicrop import Views

SMALL = dict(backbone='dvae_mini', n_codes=16, code_dim=8, decoder_width=8, global_size=32)


@pytest.fixture(scope='module')
def beit():
    return golden('beit')


# The discrete VAE


def _our_name(theirs, layers):
    "encoder.1.net.0.weight -> backbone.model.stages.0.2.net.0.weight"
    part, _, rest = theirs.partition('.')
    if part == 'codebook':
        return theirs
    place, _, rest = rest.partition('.')
    own = {'encoder': 'backbone.model.stages', 'decoder': 'decoder.stages'}[part]
    if int(place) == 2 * layers:
        return {'encoder': 'to_logits.', 'decoder': 'decoder.pixels.'}[part] + rest
    return f'{own}.{int(place) // 2}.{"2." if int(place) % 2 else ""}{rest}'


@pytest.fixture
def tiny(beit):
    "The tokenizer with the sizes and the weights of the file, and its parameters in the file's order."
    z, meta = beit
    m = meta['dvae']
    sizes = dict(timm_name='dvae_encoder_patch4_32', patch=2 ** m['num_layers'], width=m['hidden_dim'])
    register_backbone(test_golden_dvae=sizes)(EncoderBackbone)
    options = DVAEOptions(
        backbone='test_golden_dvae', n_codes=m['num_tokens'], code_dim=m['codebook_dim'],
        decoder_width=m['hidden_dim'],
    )  # fmt: skip
    method = DVAE(options, ViewOptions(global_size=m['image_size'], n_global=1, n_local=0))
    ours = dict(method.named_parameters())
    names = [_our_name(name, m['num_layers']) for name in m['parameters']]
    assert sorted(names) == sorted(ours)
    with torch.no_grad():
        for theirs, name in zip(m['parameters'], names):
            ours[name].copy_(z[f'dvae_w.{theirs}'])
    yield method, [ours[name] for name in names]
    del _backbones['test_golden_dvae']


def test_logits_and_codes(beit, tiny):
    z, _ = beit
    logits = tiny[0].logits(z['dvae_images'])
    close(logits.detach(), z['dvae_logits'])
    close(logits.detach().softmax(1), z['dvae_probs'])
    assert torch.equal(logits.argmax(1), z['dvae_codes'].long())


@pytest.mark.parametrize('case', ['nogumbel', 'gumbel', 'straight'])
def test_three_ways_to_choose_and_their_gradients(beit, tiny, case):
    z, meta = beit
    m, (method, parameters) = meta['dvae'], tiny
    logits = method.logits(z['dvae_images'])
    choice = gumbel_softmax(logits, m['temperature'], z.get(f'dvae_{case}_noise'), case == 'straight')
    output = method.paint(choice)
    error = F.smooth_l1_loss if m['smooth_l1_loss'] else F.mse_loss
    reconstruction, kl = error(output, z['dvae_images']), kl_to_uniform(logits)
    loss = reconstruction + m['kl_div_loss_weight'] * kl
    loss.backward()
    close(output.detach(), z[f'dvae_{case}_output'])
    close(reconstruction.detach(), z[f'dvae_{case}_reconstruction_loss'])
    close(kl.detach(), z[f'dvae_{case}_kl'])
    close(loss.detach(), z[f'dvae_{case}_loss'])
    norms = torch.stack([p.grad.norm() for p in parameters])
    close(norms, z[f'dvae_{case}_grad_norms'], 1e-4)


def test_codes_take_views_and_paint_views():
    "codes() renormalises what views are, so a constant image of views is the same constant of pixels."
    method = create_method('dvae', **SMALL).eval()
    pixels = torch.rand(2, 3, 32, 24) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    crops = (pixels * 0.5 + 0.5 - mean) / std
    codes = method.codes(crops)
    assert codes.shape == (2, 8, 6)
    assert torch.equal(codes, method.logits(pixels).argmax(1))
    painted = method.paint(F.one_hot(codes, 16).float().permute(0, 3, 1, 2)).detach()
    close(method.decode(codes), (painted * 0.5 + 0.5 - mean) / std)


def test_counts_are_kept_in_training_only():
    method = create_method('dvae', **SMALL)
    views = method.views([torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)] * 4, _rngs(4))
    method.eval().training_step(views, {})
    assert not method.counts.any()
    method.train().training_step(views, {})
    assert method.counts.sum() == 4 * 64
    assert code_figures(method.counts)['n_codes'] == 16


def _rngs(n):
    return [np.random.default_rng(i) for i in range(n)]


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(n_codes=1), 'recipe: n_codes=1 must be at least 2'),
        (dict(tau_end=2.0), 'recipe: tau_start=1, tau_end=2'),
        (dict(tau_end=0.0), 'recipe: tau_start=1, tau_end=0'),
        (dict(n_local=2), 'recipe: dvae sees one crop'),
    ],
)
def test_recipes_that_make_no_sense_are_one_line(changes, message):
    from glsd.training import Recipe

    with pytest.raises(ValueError) as e:
        Recipe('dvae', **SMALL | changes)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_a_stride_that_is_no_power_of_two():
    with pytest.raises(ValueError, match='dvae: the pixels per code must be a power of 2, not 14'):
        create_method('dvae', **SMALL | dict(backbone='test_p14'))


@pytest.fixture(autouse=True, scope='module')
def odd_backbone():
    from glsd.backbones.vit import ViTBackbone

    sizes = dict(timm_name='vit_mini_patch4_32', patch_size=14, img_size=28, dynamic_img_size=True)
    register_backbone(test_p14=sizes)(ViTBackbone)
    yield
    del _backbones['test_p14']


# Quantised distillation


def test_quantiser_output_commitment_and_gradient(beit):
    z, meta = beit
    x = z['vq_z'].clone().requires_grad_()
    quantised, codes, commitment = quantise(x, z['vq_codebook'], meta['vq']['beta'])
    assert torch.equal(codes, z['vq_codes'].long())
    close(quantised.detach(), z['vq_quantised'])
    close(commitment.detach(), z['vq_loss'])
    (commitment + (quantised * z['vq_upstream']).sum()).backward()
    close(x.grad, z['vq_grad_z'], 1e-4)


@pytest.fixture
def quantizer(beit):
    "In the file's state."
    z, m = beit[0], beit[1]['vq']
    quantizer = Quantizer(m['codes'], m['dim'], m['beta'], m['decay'], kmeans=False)
    quantizer.codebook.copy_(z['vq_codebook'])
    quantizer.counts.copy_(z['vq_cluster_size'])
    return quantizer


def moved(counts, new, decay):
    return decay * counts + (1 - decay) * new


def test_codebook_and_counts_after_a_step(beit, quantizer):
    z, _ = beit
    quantised, codes, commitment = quantizer.train()(z['vq_z'])
    close(quantised, z['vq_quantised'])
    close(quantizer.codebook, z['vq_codebook_after'])
    used = count_codes(codes, len(quantizer.counts))
    close(quantizer.counts, moved(z['vq_cluster_size'], used, quantizer.decay))
    # in the released code the statistic moves twice in a step
    twice = moved(quantizer.counts, used, quantizer.decay)
    close(twice, z['vq_cluster_size_after'])
    still = quantizer.counts.clone()
    unused = count_codes(codes, len(quantizer.counts)) == 0
    assert unused.any() and (quantizer.codebook - z['vq_codebook'])[unused].abs().max() < 1e-6
    _, codes, commitment = quantizer.eval()(z['vq_z'])
    assert torch.equal(codes, z['vq_eval_codes'].long())
    close(commitment, z['vq_eval_loss'])
    assert torch.equal(quantizer.counts, still)
    close(z['vq_eval_cluster_size_after'], z['vq_cluster_size_after'])  # there, too


def test_kmeans_start(beit):
    z, _ = beit
    means, counts = cosine_kmeans(z['kmeans_samples'], z['kmeans_samples'][z['kmeans_start'].long()])
    close(means, z['kmeans_means'])
    assert torch.equal(counts.int(), z['kmeans_counts'])


def test_cosine_loss(beit):
    z, _ = beit
    predicted = z['vqkd_rec'].clone().requires_grad_()
    loss = cosine_loss(predicted, z['vqkd_target'])
    loss.backward()
    close(loss.detach(), z['vqkd_loss'])
    close(predicted.grad, z['vqkd_grad'], 1e-4)


def test_double_precision(beit):
    z = {k: v.double() for k, v in beit[0].items() if v.dtype == torch.float32}
    close(quantise(z['vq_z'], z['vq_codebook'])[2], z['vq_loss'], 1e-6)
    vectors = F.normalize(z['vq_z'], dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    codes = nearest_codes(vectors, z['vq_codebook'])
    moved = move_codebook(z['vq_codebook'], *sums_of(vectors, codes, len(z['vq_codebook'])))
    close(moved, z['vq_codebook_after'], 1e-6)
    close(cosine_loss(z['vqkd_rec'], z['vqkd_target']), z['vqkd_loss'], 1e-6)


def test_more_codes_than_vectors_in_the_first_batch():
    quantizer = Quantizer(50, 4)
    quantizer(torch.randn(1, 4, 3, 3))
    assert quantizer.started and quantizer.codebook.isfinite().all() and quantizer.counts.sum() == 9


def vqkd(teacher, **options):
    sizes = dict(backbone='vit_mini_p4', n_codes=16, code_dim=8, decoder_depth=1, decoder_heads=2)
    return VQKD(VQKDOptions(**sizes | options), VQKD.default(VQKD.Views, global_size=32), teacher=teacher)


@pytest.mark.parametrize('name', ['vit_mini_p4', 'swin_mini', 'resnet_mini', 'beit_mini'])
def test_any_backbone_as_teacher_of_its_like(name):
    from glsd.backbones import create_backbone

    torch.manual_seed(0)
    method = vqkd(create_backbone(name), backbone=name)
    views = Views([torch.randn(1, 8, 3, 32, 32)], [torch.zeros(1, 8, 7)], torch.arange(8))
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr=1e-3), []
    for _ in range(10):
        loss = sum(method.training_step(views, {}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert all(p.grad is None for p in method.teacher.parameters())


def test_teachers_that_do_not_fit_or_are_not_there(tmp_path):
    from safetensors.torch import save_file

    from glsd.backbones import create_backbone

    with pytest.raises(ValueError, match='has a token per 8 pixels, vit_mini_patch4_32 one per 4'):
        vqkd(create_backbone('vit_mini'))
    with pytest.raises(FileNotFoundError, match='is missing: give a run'):
        load_teacher(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='no checkpoint in this folder'):
        load_teacher(tmp_path)
    save_file({'w': torch.zeros(2)}, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='does not say of which backbone it is'):
        load_teacher(tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='vqkd learns from a teacher'):
        vqkd(None).training_step(
            Views([torch.zeros(1, 2, 3, 32, 32)], [torch.zeros(1, 2, 7)], torch.arange(2)), {}
        )


def test_a_run_is_a_teacher_and_its_tokenizer_needs_it_no_more(tmp_path):
    from training_runs import small_recipe

    from glsd.training import load_run, pretrain

    pretrain(small_recipe('mae', steps=1, device='cpu'), tmp_path / 'mae', {}, progress=False)
    recipe = small_recipe('vqkd', steps=2, teacher=str(tmp_path / 'mae'), device='cpu')
    pretrain(recipe, tmp_path / 'words', {}, progress=False)
    teacher, x = load_teacher(tmp_path / 'mae'), torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(x).tokens, load_run(tmp_path / 'mae').backbone(x).tokens)
    (tmp_path / 'mae').rename(tmp_path / 'gone')
    words = load_tokenizer(tmp_path / 'words')
    assert words.teacher is None and words.codes(x).shape == (2, 8, 8) and words.counts.sum() > 0
    words.teacher = teacher  # as while it was trained
    save_tokenizer(words, tmp_path / 'words.safetensors')
    with safe_open(tmp_path / 'words.safetensors', 'pt') as f:
        assert not any(name.startswith('teacher.') for name in f.keys())  # noqa: SIM118
    assert torch.equal(load_tokenizer(tmp_path / 'words.safetensors').codes(x), words.codes(x))


@pytest.mark.parametrize(
    'changes, error, message',
    [
        (dict(teacher=''), ValueError, 'recipe: vqkd learns from a teacher'),
        (dict(teacher='not/there'), FileNotFoundError, 'recipe: teacher=not/there is missing'),
        (dict(n_codes=1), ValueError, 'recipe: n_codes=1'),
        (dict(n_local=1), ValueError, 'recipe: vqkd sees one crop'),
    ],
)
def test_vqkd_recipes_that_make_no_sense(changes, error, message):
    from training_runs import small_recipe

    with pytest.raises(error) as e:
        small_recipe('vqkd', **changes)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_codes_die_without_kmeans_on_purpose():
    "Vectors in a narrow cone: a random codebook keeps most codes dead, k-means none."
    torch.manual_seed(0)
    z = F.normalize(torch.ones(8, 32, 4, 4) + 0.3 * torch.randn(8, 32, 4, 4), dim=1)
    in_use = {}
    for kmeans in (False, True):
        quantizer = Quantizer(32, 32, kmeans=kmeans)
        for _ in range(20):
            codes = quantizer(z)[1]
        in_use[kmeans] = code_figures(count_codes(codes, 32))['in_use']
    assert in_use[False] < 16 < in_use[True]


# Files and runs


def test_files_that_are_no_tokenizer_are_one_line(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match='is missing: train one with method=dvae'):
        load_tokenizer(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='no checkpoint in this folder'):
        load_tokenizer(tmp_path)
    save_file({'w': torch.zeros(2)}, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='is a file of weights, not a tokenizer'):
        load_tokenizer(tmp_path / 'w.safetensors')
    (tmp_path / 'bad.safetensors').write_bytes(b'nothing of the kind')
    with pytest.raises(ValueError, match='cannot be read'):
        load_tokenizer(tmp_path / 'bad.safetensors')


def test_weights_that_are_not_finite(tmp_path):
    method = create_method('dvae', **SMALL)
    with torch.no_grad():
        method.codebook.weight[0, 0] = float('nan')
    save_tokenizer(method, tmp_path / 'w.safetensors')
    with pytest.raises(ValueError, match='1 of its weights are not finite; train it again'):
        load_tokenizer(tmp_path / 'w.safetensors')


def test_dead_codes_made_on_purpose():
    "A code whose logit can never be the largest is dead, and is named."
    method = create_method('dvae', **SMALL)
    with torch.no_grad():
        method.to_logits.bias[[3, 7]] = -1e4
    counts = count_codes(method.codes(torch.randn(8, 3, 32, 32)), 16)
    assert {3, 7} <= set(dead_codes(counts))
