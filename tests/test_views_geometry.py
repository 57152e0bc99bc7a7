"""Token centres and matches: what is refused. (The chapter holds them against a search of all distances.)"""

import pytest
import torch

from glsd.views.geometry import match_tokens, token_centers, token_diagonal

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
