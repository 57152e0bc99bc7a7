"""SimMIM: units on Swin's grid, the linear decoder and its error, learning, and what cannot be.

Killed and resumed, and on several processes: test_training_resume.py and test_training_processes.py."""

import pytest
import torch
from test_masked_maskfeat import batch_of, falls

from glsd.masked.maskfeat import repeat_mask
from glsd.masked.patches import patchify
from glsd.masked.simmim import SimMIM, average_distance, paint
from glsd.objectives.method import create_method

SMALL = dict(backbone='swin_mini', global_size=32, mask_unit=8)


@pytest.mark.parametrize('backbone, unit', [('swin_mini', 8), ('vit_mini_p4', 8), ('resnet_mini', 8)])
def test_the_error_falls(backbone, unit):
    torch.manual_seed(0)
    method = create_method('simmim', backbone=backbone, global_size=32, mask_unit=unit)
    first, last = falls(method)
    assert last < 0.9 * first


def test_units_of_a_vit_are_several_tokens():
    method = create_method('simmim', backbone='vit_mini_p4', global_size=32, mask_unit=8)
    assert method.grid == (8, 8) and method.units == (4, 4)
    hidden = method.draw(5).view(5, 4, 2, 4, 2)
    assert (hidden == hidden[:, :, :1, :, :1]).all() and (hidden.flatten(1).sum(1) == 4 * 10).all()


def test_the_loss_is_the_mean_over_hidden_pixels():
    method = create_method('simmim', **SMALL).eval()
    views = batch_of(method, 4)
    x = views.crops[0][0]
    torch.manual_seed(3)
    loss = method.training_step(views, {})['rgb']
    torch.manual_seed(3)
    hidden = method.draw(4)
    pixels = repeat_mask(hidden, method.grid, (32, 32)).view(4, 1, 32, 32).expand_as(x)
    painted = paint(method, x, hidden, overlay=False)
    torch.testing.assert_close(loss, (painted - x)[pixels].abs().mean())


def test_no_hidden_pixel_is_seen():
    method = create_method('simmim', **SMALL).eval()
    x, hidden = torch.randn(2, 3, 32, 32), method.draw(2)
    pixels = repeat_mask(hidden, method.grid, (32, 32)).view(2, 1, 32, 32)
    other = torch.where(pixels, torch.randn_like(x), x)
    assert torch.equal(method.predict(x, hidden), method.predict(other, hidden))
    shown = method.targets(x)[~hidden]
    assert torch.equal(patchify(paint(method, x, hidden), 8)[~hidden], shown)


def test_the_head_is_one_linear_layer():
    method = create_method('simmim', **SMALL)
    assert isinstance(method.norm, torch.nn.Identity) and method.head.out_features == 3 * 8 * 8


def test_distances():
    one = torch.zeros(9, dtype=torch.bool)
    one[4] = True
    assert average_distance(one, (3, 3)) == 1.0
    assert average_distance(one, (3, 3), side=3) == pytest.approx((8 * 1 + 2) / 9)  # the middle: 2 pixels
    for flags in torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool):
        with pytest.raises(ValueError, match='at least one visible and one hidden patch'):
            average_distance(flags, (2, 2))


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(mask_unit=32), 'a mask ratio of 0.6 hides all of 1 patches'),
        (dict(mask_unit=24), 'mask_unit=24: units of that many pixels do not fill 4 x 4 tokens of 8'),
        (dict(mask_unit=4), 'mask_unit=4: units of that many pixels do not fill'),
        (dict(global_size=20), 'global_size=20: tokens of 8 pixels'),
    ],
)
def test_what_cannot_be_is_one_line(values, message):
    with pytest.raises(ValueError) as e:
        create_method('simmim', **SMALL | values)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_only_pixels_can_be_painted():
    method = create_method('maskfeat', backbone='vit_mini', global_size=32)
    with pytest.raises(ValueError, match='target=hog is no picture'):
        paint(method, torch.randn(1, 3, 32, 32), method.draw(1))


def test_the_defaults_are_the_papers():
    d = SimMIM.defaults
    assert (d['mask_unit'], d['mask_ratio'], d['power'], d['global_scale']) == (32, 0.6, 1, (0.67, 1.0))
