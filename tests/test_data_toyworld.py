"The toy world across processes and access orders, and what colour tells about the class, on many images."

import hashlib
import subprocess
import sys

import pytest
import torch

from glsd.data.toyworld import SHAPES, TEXTURES, ToyWorld

DIGEST = """
import hashlib, sys
from glsd.data.toyworld import ToyWorld
world = ToyWorld(50, size=40, split='val', seed=3)
for i in map(int, sys.argv[1:]):
    content = world[i][0].numpy().tobytes() + world.scene(i)[2].numpy().tobytes()
    print(hashlib.sha256(content).hexdigest())
"""


def _digest(world, i):
    return hashlib.sha256(world[i][0].numpy().tobytes() + world.scene(i)[2].numpy().tobytes()).hexdigest()


def test_same_images_in_another_process_in_another_order():
    indices = [49, 0, 17, 17, 3]
    world = ToyWorld(50, size=40, split='val', seed=3)
    world.render(range(50))  # all at once here, one by one there
    command = [sys.executable, '-c', DIGEST, *map(str, indices)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.split() == [_digest(world, i) for i in indices]


def test_no_image_is_in_both_splits():
    hashes = [
        {hash(image.numpy().tobytes()) for image in ToyWorld(300, 32, split).render(range(300))}
        for split in ('train', 'val')
    ]
    assert len(hashes[0]) == len(hashes[1]) == 300 and not hashes[0] & hashes[1]


def test_a_world_beyond_the_memory_limit_paints_the_same():
    big, small = ToyWorld(10**6, 32), ToyWorld(20, 32)
    assert torch.equal(big[19][0], small[19][0]) and torch.equal(big[19][0], big[19][0]) and len(big) == 10**6


@pytest.mark.parametrize('size', [8, 33, 224])
def test_any_size(size):
    image, label, masks, boxes = ToyWorld(24, size, shapes=tuple(SHAPES)).scene(23)
    assert image.shape == (3, size, size) and label == 23
    assert masks.shape[1:] == (size, size) and boxes.shape == (len(masks), 4)


@pytest.mark.parametrize('shared', [False, True])
def test_every_object_is_visible_and_boxed(shared):
    world = ToyWorld(300, 48, shapes=tuple(SHAPES), shared_nuisances=shared)
    for i in range(300):
        _, _, masks, boxes = world.scene(i)
        assert len(masks) in ((1, 2, 3) if shared else (4,)) and masks.sum(0).max() == 1
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            assert mask.sum() > 20 and mask.sum() == mask[y0:y1, x0:x1].sum()
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_clip_starts_with_the_image_and_moves():
    world = ToyWorld(12, 32)
    for i in range(12):
        frames, masks = world.clip(i, 6)
        image, _, first, _ = world.scene(i)
        assert torch.equal(frames[0], image) and torch.equal(masks[0], first)
        assert not torch.equal(masks[5], masks[0]) and torch.equal(world.clip(i, 3)[0], frames[:3])


@pytest.mark.slow
def test_colour_tells_nothing_about_the_class():
    n, bins = 4800, 16
    x, x_test = ToyWorld(n, 32).render(range(n)), ToyWorld(n, 32, 'val').render(range(n))
    y = torch.arange(n) % 12

    def histogram(images):  # counts of every level, without a one-hot of every pixel
        level = (images.long() * bins // 256).flatten(2)
        level = level + bins * torch.arange(3)[None, :, None] + 3 * bins * torch.arange(n)[:, None, None]
        return torch.bincount(level.flatten(), minlength=n * 3 * bins).view(n, 3 * bins) / 1024

    def accuracy(f, labels):
        a, b = f(x), f(x_test)
        scale = a.std(0) + 1e-6
        near = torch.cdist(b / scale, a / scale).topk(20, largest=False).indices
        return (torch.mode(labels[near], 1).values == labels).double().mean().item()

    def mean(images):
        return images.float().mean((2, 3)) / 255

    # a histogram sees how much of an annulus the border hides: a trace of shape, none of texture
    for f, labels in (mean, y), (mean, y // 6), (mean, y % 6), (histogram, y % 6):
        chance = 1 / (labels.max().item() + 1)
        margin = 3 * (chance * (1 - chance) / n) ** 0.5
        assert abs(accuracy(f, labels) - chance) < margin, (f.__name__, chance)
    assert accuracy(histogram, y // 6) < 0.7


@pytest.mark.parametrize('texture', TEXTURES)
def test_textures_share_their_mean_brightness(texture):
    world = ToyWorld(400, 32, textures=(texture,))
    grey = world.render(range(400)).double().mean((1, 2, 3))
    assert abs(grey.mean() - 127) < 4 * grey.std() / 400**0.5 + 1


@pytest.mark.parametrize(
    'wrong', [dict(split='test'), dict(size=0), dict(n=-1), dict(textures=('plaid',)), dict(shapes=())]
)
def test_wrong_input_is_one_line(wrong):
    with pytest.raises(ValueError) as e:
        ToyWorld(**wrong)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('i', [12, -13, 10**6])
def test_an_image_that_does_not_exist_is_one_line(i):
    with pytest.raises(IndexError, match=f'no image {i}: the toy world has 12'):
        ToyWorld(12, 16)[i]


def test_a_fingerprint_tells_worlds_apart():
    same = ToyWorld(24, 16).fingerprint()
    assert same == ToyWorld(24, 16).fingerprint()
    others = [
        ToyWorld(23, 16),
        ToyWorld(24, 17),
        ToyWorld(24, 16, 'val'),
        ToyWorld(24, 16, seed=1),
        ToyWorld(24, 16, shapes=('disc', 'cross')),
    ]
    assert len({same, *(world.fingerprint() for world in others)}) == 6
