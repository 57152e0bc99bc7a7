"""Robust background detection against the values of a public implementation; and odd images.

Sizes and options are read from the file."""

import math

import pytest
import torch
from golden_values import golden

from glsd.contrastive import saliency as S


@pytest.fixture(scope='module')
def values():
    return golden('saliency')


def cases():
    return range(len(golden('saliency')[1]['images']))


def apart(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max())


@pytest.mark.parametrize('i', cases())
def test_the_values_of_the_released_code(values, i):
    z, meta = values
    image, segments = z[f'image{i}'].permute(2, 0, 1), z[f'segments{i}']
    regions, steps = S.regions_of(image, segments), S.rbd_steps(image, segments)
    assert len(regions.border) == meta['images'][i]['found']
    assert apart(regions.colours, z[f'colours{i}']) < 1e-3
    assert torch.equal(regions.border, z[f'boundary{i}'].bool())
    for ours, theirs in dict(connectivity='boundary_connectivity').items():
        assert apart(getattr(steps, ours), z[f'{theirs}{i}']) < 1e-5
    for name in 'background', 'contrast', 'solution':
        assert apart(getattr(steps, name), z[f'{name}{i}']) < 1e-5
    assert apart(255 * steps.saliency[segments.long()], z[f'saliency{i}']) < 1e-3
    assert apart(255 * S.rbd(image, segments), z[f'saliency{i}']) < 1e-3


@pytest.mark.parametrize('i', cases())
def test_own_superpixels_lead_to_a_similar_map(values, i):
    z, meta = values
    m = meta['images'][i]
    found = S.rbd(z[f'image{i}'].permute(2, 0, 1), n=m['n_segments'])
    both = torch.stack([found.flatten().double(), z[f'saliency{i}'].flatten().double()])
    assert torch.corrcoef(both)[0, 1] > 0.7


@pytest.mark.parametrize('size', [(8, 8), (1, 1), (1, 40), (33, 20), (64, 64)])
@pytest.mark.parametrize('n', [1, 7, 250])
def test_superpixels_of_any_size(size, n):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    n = min(n, size[0] * size[1])
    segments = S.superpixels(image, n)
    assert segments.shape == size and segments.dtype == torch.long
    assert segments.unique().tolist() == list(range(int(segments.max()) + 1))
    assert int(segments.max()) < 2 * n + sum(size)  # a strip has a cell for each side of a square
    for method in S.SALIENCY:
        found = S.saliency(image, method, n)
        assert found.shape == size and found.isfinite().all() and 0 <= found.min() and found.max() <= 1


@pytest.mark.parametrize('method', list(S.SALIENCY))
def test_a_flat_image_has_no_object(method):
    for value in 0, 128, 255:
        image = torch.full((3, 24, 24), value, dtype=torch.uint8)
        assert not S.saliency(image, method, 16).any()


def test_the_same_bits_again_and_nothing_overwritten():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    kept = image.clone()
    first, again = S.saliency(image), S.saliency(image)
    assert torch.equal(first, again) and torch.equal(image, kept)


def test_measures():
    truth = torch.tensor([[True, True, False, False]])
    assert S.f_beta(truth.float(), truth) == 1 and S.map_error(truth.float(), truth) == 0
    assert S.f_beta(1 - truth.float(), truth) == 0 and S.map_error(1 - truth.float(), truth) == 1
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert S.f_beta(nothing.float(), nothing) == 1 and S.f_beta(nothing.float(), truth) == 0
    map = torch.tensor([[0.9, 0.1, 0.5, 0.1]])  # mean 0.4: cut at 0.8
    assert math.isclose(S.f_beta(map, truth), 1.3 * 1 / (1 + 0.3 * 2))


image = torch.zeros(3, 8, 8, dtype=torch.uint8)
FOUR = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)


@pytest.mark.parametrize(
    'call, message',
    [
        (
            lambda: S.rgb_to_lab(image.float()),
            'an image must be uint8 [3, H, W] and not empty; this is float32',
        ),
        (
            lambda: S.saliency(image[:1]),
            'an image must be uint8 [3, H, W] and not empty; this is uint8 [1, 8',
        ),
        (lambda: S.saliency(image, 'cam'), "no saliency 'cam'; choose from: gs, mc, rbd"),
        (
            lambda: S.superpixels(image, 0),
            '0 superpixels in an image of 8 x 8 pixels: choose between 1 and 64',
        ),
        (lambda: S.superpixels(image, 65), '65 superpixels in an image of 8 x 8 pixels'),
        (
            lambda: S.rbd(image, FOUR[:4]),
            'segments must be integers [8, 8] as the image; these are int64 [4, 8]',
        ),
        (
            lambda: S.rbd(image, FOUR.float()),
            'segments must be integers [8, 8] as the image; these are float32',
        ),
        (
            lambda: S.rbd(image, FOUR * 2),
            'segments must be numbered from 0 without gaps; these are 4 numbers fr',
        ),
        (lambda: S.f_beta(FOUR.float(), FOUR), 'a map and its truth must have one shape, the truth bool'),
        (lambda: S.map_error(FOUR.float(), FOUR[:4] > 0), 'a map and its truth must have one shape'),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert str(e.value).startswith(message) and '\n' not in str(e.value)
