"""What the chapter cannot show about correspondence: exactness on many pairs, workers, networks that must
win or lose."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from glsd.backbones import Features, create_backbone
from glsd.data import ToyWorld
from glsd.evaluation.extraction import EvalTransform
from glsd.evaluation.pairs import Pairs, draw_pair, exact_map, renormalized, shift_reach, token_grid
from glsd.evaluation.token_matching import (
    PixelPatches,
    best_match,
    correspondence,
    correspondence_picture,
    score,
    summary,
)
from glsd.views.geometry import token_centers


class Photos:
    "Unlabelled images of many shapes."

    shapes = [(61, 90), (75, 48), (50, 50), (120, 49), (64, 200)]

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return torch.randint(256, (3, *self.shapes[i]), generator=g, dtype=torch.uint8), -1


@pytest.mark.parametrize('G', [1, 2, 3, 7, 14])
@pytest.mark.parametrize('shift', [0, 0.25, 0.9])
def test_map_is_exact_and_one_to_one(G, shift):
    rng = np.random.default_rng(G)
    for _ in range(50):
        a, b = draw_pair((int(rng.integers(40, 300)), int(rng.integers(40, 300))), 16 * G, (G, G), rng, shift)
        index, known = exact_map(a, b, (G, G))
        ea, eb = token_centers(a, (G, G)), token_centers(b, (G, G))
        assert (
            known.any() and (ea[known] - eb[index[known]]).abs().max() < 1e-3
        )  # the same place, to rounding
        assert len(set(index[known].tolist())) == int(known.sum())  # no token twice
        lonely = torch.cdist(ea[~known], eb)
        assert (
            not lonely.numel() or lonely.min() > 0.9 * float(a[2] - a[0]) / G
        )  # nobody that has a counterpart is left out


def test_pixels_find_every_match_without_flip_and_colour():
    "On images of noise, any shape, cut without resizing: 100 % and no error, whatever the shift."

    class Same(Photos):
        shapes = [(64, 64), (64, 100), (100, 64)]

    for shift in (0, 0.25, 0.6):
        reach = max(0, round(8 * shift))
        size = 8 * (64 // (8 + reach))
        r = correspondence(
            PixelPatches(size // 8), Same(), size, shift=shift, flip=0, photometric=None, progress=False
        )
        assert r['accuracy'] == 100 and r['distance'] == 0 and r['accuracy_ci'] == [100, 100]


def test_constant_tokens_are_not_above_chance():
    "All alike: every token takes the first one, a corner, which has a partner less often than others."

    class Constant(nn.Module):
        def forward(self, x):
            return Features(torch.ones(len(x), 4), torch.ones(len(x), 36, 4), (6, 6))

    r = correspondence(Constant(), ToyWorld(300), 48, progress=False)
    assert 0 < r['accuracy'] < r['chance']['accuracy'] and r['distance'] > r['chance']['distance']


def test_position_alone_wins_only_where_nothing_moves():
    class Positions(nn.Module):
        def forward(self, x):
            return Features(torch.ones(len(x), 36), torch.eye(36).expand(len(x), 36, 36), (6, 6))

    world = ToyWorld(40)
    assert correspondence(Positions(), world, 48, shift=0, flip=0, progress=False)['accuracy'] == 100
    moved = correspondence(Positions(), world, 48, progress=False)
    assert moved['accuracy'] == moved['same_place']['accuracy'] < 30


def test_flips_are_followed():
    "A token that is the same seen in a mirror (its square's mean) wins with flips what it wins without."

    class Mean(nn.Module):
        def forward(self, x):
            tokens = nn.functional.avg_pool2d(x, 8).flatten(2).mT
            tokens = torch.cat([tokens, torch.ones_like(tokens[..., :1])], -1)
            return Features(tokens.mean(1), tokens, (6, 6))

    class Same(Photos):
        shapes = [(64, 64)] * 20

    for flip in (0, 0.5, 1):
        assert (
            correspondence(Mean(), Same(), 48, flip=flip, photometric=None, progress=False)['accuracy'] > 99
        )


def test_result_is_json_and_the_same_with_workers_batches_and_mode():
    net, photos = create_backbone('swin_mini').train(), Photos()
    one = correspondence(net, photos, 48, progress=False)
    assert net.training and json.loads(json.dumps(one)) == one
    for options in (dict(batch_size=2), dict(workers=1, batch_size=2)):
        other = correspondence(net, photos, 48, progress=False, **options)
        assert other['accuracy'] == pytest.approx(one['accuracy']) and other['pixels'] == one['pixels']
    assert correspondence(net, photos, 48, seed=1, progress=False)['pixels'] != one['pixels']


def test_interval_covers():
    "Of 200 samples of 50 images, the 95 % interval holds the true mean in 90 to 99 %."
    g = torch.Generator().manual_seed(0)
    holds = [
        lo < 50 < hi
        for lo, hi in (summary(x, x, 1)['accuracy_ci'] for x in 100 * torch.rand(200, 50, generator=g))
    ]
    assert 0.9 < np.mean(holds) < 0.99


def test_score_ignores_tokens_without_a_counterpart():
    truth, known = torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.bool)
    known[0, 4] = True
    accuracy, distance = score(torch.full((1, 9), 0), truth, known, (3, 3))
    assert accuracy == 0 and distance == pytest.approx(2**0.5)


def test_picture_has_a_panel_for_each_and_takes_networks_of_other_strides():
    fig = correspondence_picture({'8': PixelPatches(8), '16': PixelPatches(16)}, Photos(), 48, images=[0, 3])
    assert len(fig.axes) == 6
    fig.canvas.draw()


@pytest.mark.parametrize(
    'backbone, n, size, message',
    [
        (nn.Flatten(), 4, 48, 'no tokens'),
        (PixelPatches(8), 1, 48, 'at least 2'),
        (PixelPatches(1), 4, 60, 'too small'),
        (create_backbone('vit_mini'), 4, 50, 'multiples of 8'),
        (create_backbone('vit_mini'), 4, 512, 'too small'),
    ],
)
def test_bad_input_in_one_line(backbone, n, size, message):
    with pytest.raises(ValueError, match=message) as e:
        correspondence(backbone, ToyWorld(n), size, progress=False)
    assert '\n' not in str(e.value)


class Broken(PixelPatches):
    "A network that diverged."

    def forward(self, x):
        f = super().forward(x)
        return replace(f, tokens=f.tokens * float('nan'))


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: token_grid(nn.Flatten(), 48), 'returns no tokens'),
        (lambda: shift_reach((7, 7), 1.5), 'shift=1.5 must be a share'),
        (lambda: draw_pair((7, 90), 48, (6, 6), np.random.default_rng(0)), 'needs 8 pixels'),
        (lambda: best_match(torch.full((2, 3, 4), torch.nan), torch.ones(2, 3, 4)), '6 of 6 tokens'),
        (lambda: correspondence(Broken(8), ToyWorld(4), 48, progress=False), 'not finite'),
        (lambda: correspondence_picture({}, ToyWorld(4), 48), 'at least one backbone'),
    ],
)
def test_refusals_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert '\n' not in str(e.value)


def test_pairs_as_the_backbone_wants_them():
    "Both crops of a pair, in the units of a network that was trained with a mean of 0.5."

    class Shows(PixelPatches):
        mean, std, seen = (0.5,) * 3, (0.25,) * 3, []

        def forward(self, x):
            self.seen.append(x)
            return super().forward(x)

    net = Shows(8)
    correspondence(net, ToyWorld(4), 48, progress=False)
    crops = Pairs(ToyWorld(4), 48, (6, 6))[range(4)].crops[0]
    for seen, crop in zip(net.seen[-2:], crops):
        torch.testing.assert_close(seen, renormalized(crop, EvalTransform(net.mean, net.std)))
        assert (seen - crop).abs().max() > 0.1
