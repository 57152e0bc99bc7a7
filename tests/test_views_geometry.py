"""Token centres and matches: what is refused. (The chapter holds them against a search of all distances.)"""

import pytest
import torch

from glsd.views.geometry import match_threshold, match_tokens, token_centers, token_diagonal
from glsd.views.multicrop import crop

W_GEO = torch.tensor([40.0, 20, 470, 450, 224, 224, 0])


@pytest.mark.parametrize(
    'w_geo, grid, message',
    [
        (W_GEO[:6], (7, 7), r'w_geo is torch.float32 of shape \(6,\): give floats \[..., 7\]'),
        (W_GEO.long(), (7, 7), 'w_geo is torch.int64'),
        (W_GEO, (7, 0), r'grid is \(7, 0\): give \(rows, columns\), each at least 1'),
        (W_GEO, (7,), r'grid is \(7,\)'),
        (W_GEO, (2, 7, 7), r'grid is \(2, 7, 7\)'),
    ],
)
def test_wrong_shapes_are_one_clear_line(w_geo, grid, message):
    for function in (token_centers, token_diagonal):
        with pytest.raises(ValueError, match=message) as e:
            function(w_geo, grid)
        assert '\n' not in str(e.value)
    for one, other in ((0, 1), (1, 0)):
        pair = [(w_geo, grid), (W_GEO, (7, 7))]
        with pytest.raises(ValueError, match=message):
            match_tokens(*pair[one], *pair[other])


def turned_box(f, box=(16, 8, 56, 32), size=8):
    "A box, mirrored and turned: its w_geo, its grid of tokens of 8 pixels, and where they look, by a map."
    x0, y0, x1, y1 = box
    x, y = torch.arange(80) + 0.5, torch.arange(64) + 0.5
    where = torch.stack(torch.meshgrid(x, y, indexing='xy'))[:, y0:y1, x0:x1]
    where = torch.rot90(where.flip(-1) if f % 2 else where, f // 2, (1, 2))
    tokens = torch.nn.functional.avg_pool2d(where, size)
    h, w = where.shape[1:]
    return torch.tensor([x0, y0, x1, y1, h, w, f]).float(), tuple(tokens.shape[1:]), tokens.flatten(1).T


@pytest.mark.parametrize('f', range(8))
def test_quarter_turns_and_mirrors(f):
    w_geo, grid, where = turned_box(f)
    torch.testing.assert_close(token_centers(w_geo, grid), where)
    assert abs(float(token_diagonal(w_geo, grid)) - 8 * 2**0.5) < 1e-4
    for g in range(8):
        other, grid_other, there = turned_box(g, (24, 0, 64, 40))
        found = match_tokens(w_geo, grid, other, grid_other)
        d = torch.cdist(where, there)
        torch.testing.assert_close(found.distance, d.amin(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(d.gather(1, found.index[:, None])[:, 0], d.amin(1), atol=1e-4, rtol=0)
        assert float(match_threshold(w_geo, grid, other, grid_other)) > 0


@pytest.mark.parametrize('f', range(8))
def test_crops_turn_as_the_geometry_says(f):
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    w_geo, _, _ = turned_box(f)
    upright = image[:, 8:32, 16:56]
    expected = torch.rot90(upright.flip(-1) if f % 2 else upright, f // 2, (1, 2))
    assert torch.equal(crop(image, w_geo[None])[0], expected)
