"""Photometric transforms: distribution and pixels as torchvision's; no sample depends on batch or threads."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import ImageFilter
from torchvision.transforms import ColorJitter

from glsd.views.photometric import (
    OPS,
    W_PHO,
    Photometric,
    _transform,
    apply_photometric,
    denormalize,
    normalize,
    photometric_vector,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth_image(h=61, w=47, seed=0):
    "uint8 [3,h,w]: colour blobs, all hues, with black and white parts."
    z = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5
    return (torch.nn.functional.interpolate(z, (h, w), mode='bicubic')[0].clamp(0, 1) * 255).byte()


def draws(n, seed=0, **options):
    rng, p = np.random.default_rng(seed), Photometric(**options)
    return np.stack([p.draw(rng) for _ in range(n)])


def torchvision_chain(crop, w):
    "The same program with torchvision's functional ops on uint8."
    for op in w[:4].astype(int):
        if op >= 0:
            crop = getattr(TF, 'adjust_' + OPS[op])(crop, float(w[4 + op]))
    if w[8]:
        crop = TF.rgb_to_grayscale(crop, 3)
    if w[9]:
        crop = TF.gaussian_blur(crop, [17, 17], [float(w[9])] * 2)
    return TF.solarize(crop, 128) if w[10] else crop


@pytest.mark.parametrize(
    'shape, n',
    [
        ((224, 224), 4),
        ((200, 131), 3),
        ((96, 96), 40),
        ((33, 31), 60),
        ((7, 5), 80),
        ((1, 9), 20),
        ((9, 1), 20),
        ((1, 1), 9),
    ],
)
def test_a_sample_is_the_same_in_any_batch_and_on_any_number_of_threads(shape, n):
    crops = torch.randint(
        0, 256, (n, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    w = draws(n, p_blur=0.6, p_solarize=0.3)
    together = apply_photometric(crops, w)
    assert together.isfinite().all()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    assert torch.equal(apply_photometric(crops[order], w[order]), together[order])
    assert torch.equal(torch.cat([apply_photometric(c[None], v[None]) for c, v in zip(crops, w)]), together)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(apply_photometric(crops, w), together)


@pytest.mark.parametrize(
    'op, values',
    [
        ('brightness', (0.6, 0.8, 1.2, 1.4)),
        ('contrast', (0.6, 0.8, 1.2, 1.4)),
        ('saturation', (0.0, 0.8, 1.2, 2.0)),
        ('hue', (-0.5, -0.3, -0.1, 0.05, 0.1, 0.5)),
    ],
)
def test_each_jitter_operation_is_torchvisions(op, values):
    image = smooth_image()
    for value in values:
        w = photometric_vector(op, **{op: value})
        ours = denormalize(apply_photometric(image[None], w[None]))[0].float()
        theirs = getattr(TF, 'adjust_' + op)
        pil = TF.pil_to_tensor(theirs(TF.to_pil_image(image), value))
        assert (ours - theirs(image, value)).abs().mean() < 1
        assert (ours - pil).abs().mean() < 2  # PIL keeps hue in 256 steps


@pytest.mark.parametrize('sigma', [0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
def test_blur_is_torchvisions_inside_and_pils_everywhere(sigma):
    image = smooth_image(seed=3)
    ours = denormalize(apply_photometric(image[None], photometric_vector(sigma=sigma)[None]))[0].float()
    theirs = TF.gaussian_blur(image, [17, 17], [sigma, sigma]).float()
    pil = TF.pil_to_tensor(TF.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma)))
    inside = slice(9, -9)
    assert (ours - theirs)[:, inside, inside].abs().mean() < 1
    assert (ours - pil).abs().mean() < 2


def test_whole_programs_are_torchvisions_within_two_grey_levels():
    w = draws(150, seed=5, p_blur=0.5, p_solarize=0.0)
    crops = torch.stack([smooth_image(seed=i) for i in range(150)])
    ours = denormalize(apply_photometric(crops, w)).float()
    theirs = torch.stack([torchvision_chain(c, v) for c, v in zip(crops, w)]).float()
    gaps = (ours - theirs).abs().mean((1, 2, 3))
    # torchvision drops the fraction after each of up to six operations
    assert gaps.mean() < 1.5 and gaps.max() < 4


def test_gray_and_solarize_are_torchvisions():
    image = smooth_image(seed=7)
    w = np.stack([photometric_vector(gray=True), photometric_vector(solarize=True)])
    gray, solarized = denormalize(apply_photometric(image.expand(2, -1, -1, -1), w))
    assert (gray.int() - TF.rgb_to_grayscale(image, 3).int()).abs().max() <= 1
    assert torch.equal(solarized, TF.solarize(image, 128))


def test_every_drawn_number_is_distributed_like_torchvisions():
    n = 12_000
    ours = draws(n, p_blur=0.5, p_solarize=0.2)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(0)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(n)
    ]
    quantiles = np.linspace(0, 1, 21)
    for column, width in zip(range(4), (0.8, 0.8, 0.4, 0.2)):
        a, b = ours[:, 4 + column], np.array([t[1 + column] for t in theirs])
        np.testing.assert_allclose(np.quantile(a, quantiles), np.quantile(b, quantiles), atol=0.035 * width)
        np.testing.assert_allclose([a.mean(), a.std()], [b.mean(), b.std()], atol=0.01 * width)
    assert abs(np.corrcoef(ours[:, 4:8].T) - np.eye(4)).max() < 0.05  # and they are independent
    jittered = ours[ours[:, 0] >= 0, :4]
    orders, counts = np.unique(jittered, axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts - len(jittered) / 24).max() < 5 * (len(jittered) / 24) ** 0.5
    shares = (ours[:, 0] >= 0).mean(), ours[:, 8].mean(), (ours[:, 9] > 0).mean(), ours[:, 10].mean()
    np.testing.assert_allclose(shares, [0.8, 0.2, 0.5, 0.2], atol=0.02)
    sigma = ours[ours[:, 9] > 0, 9]
    np.testing.assert_allclose(np.quantile(sigma, quantiles), 0.1 + 1.9 * quantiles, atol=0.07)


def test_a_draw_takes_the_same_number_of_random_numbers_whatever_comes_out():
    for options in (dict(), dict(p_jitter=0.0), dict(p_jitter=1.0, p_gray=1.0, p_blur=0.0, p_solarize=1.0)):
        rng, other = np.random.default_rng(0), np.random.default_rng(0)
        Photometric(**options).draw(rng)
        Photometric().draw(other)
        assert rng.random() == other.random()


def test_crops_of_any_memory_layout_and_no_crops_at_all():
    crops, w = torch.stack([smooth_image(seed=i) for i in range(6)]), draws(6)
    assert torch.equal(
        apply_photometric(crops.contiguous(memory_format=torch.channels_last), w), apply_photometric(crops, w)
    )
    before = crops.clone()
    out = apply_photometric(crops[:1], photometric_vector('hue', hue=0.2)[None])
    assert torch.equal(crops, before) and not out.is_inference()
    assert apply_photometric(crops[:0], w[:0]).shape == (0, 3, 61, 47)
    assert apply_photometric(crops, torch.from_numpy(w)).is_contiguous()


def test_the_result_can_be_trained_on():
    x = apply_photometric(smooth_image()[None], draws(1))
    layer = torch.nn.Conv2d(3, 2, 3)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_normalize_takes_bytes_and_floats():
    image = smooth_image()
    torch.testing.assert_close(normalize(image), normalize(image.float()))
    assert torch.equal(denormalize(normalize(image[None])), image[None])


def test_normalize_takes_the_constants_of_published_weights():
    image, half = smooth_image(), (0.5, 0.5, 0.5)
    theirs = TF.normalize(image / 255, half, half)
    torch.testing.assert_close(normalize(image, half, half), theirs)
    assert torch.equal(denormalize(normalize(image, half, half), half, half), image)


@pytest.mark.parametrize(
    'wrong',
    [dict(p_blur=1.5), dict(p_gray=-0.1), dict(hue=0.7), dict(contrast=-1), dict(sigma=(0, 1))],
)
def test_impossible_distributions_are_one_clear_line(wrong):
    with pytest.raises(ValueError, match='Photometric: ' + next(iter(wrong))) as e:
        Photometric(**wrong)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('ops', [['sharpness'], ['hue', 'gray'], [*OPS, 'hue']])
def test_operations_that_do_not_exist_are_one_clear_line(ops):
    with pytest.raises(ValueError, match='photometric_vector: .* must be up to four of brightness') as e:
        photometric_vector(*ops)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'crops, w',
    [((3, 8, 8), (11,)), ((2, 1, 8, 8), (2, 11)), ((2, 3, 8, 8), (3, 11)), ((2, 3, 8, 8), (2, 10))],
)
def test_wrong_shapes_are_one_clear_line(crops, w):
    with pytest.raises(ValueError, match=r'crops must be \[N,3,h,w\]') as e:
        apply_photometric(torch.zeros(crops, dtype=torch.uint8), np.zeros(w))
    assert '\n' not in str(e.value) and len(W_PHO) == 11


@pytest.mark.parametrize('size, n', [(31, 40), (100, 5)])
def test_what_a_gpu_runs_is_what_numpy_runs(size, n):
    "The same lines on torch tensors, the whole batch as one piece."
    crops = torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)
    )
    w = draws(n, seed=3, p_blur=0.6, p_solarize=0.3)
    torch.testing.assert_close(
        _transform(crops, w, torch.empty(crops.shape), n), apply_photometric(crops, w), rtol=0, atol=1e-4
    )
