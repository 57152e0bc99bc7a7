"""Floor 6 against the values of the authors' code (tests/golden): the same numbers in, the same out.

Sizes and options are read from the file."""

import pytest
import torch
from golden_values import close, golden

from glsd.contrastive.infonce import MLP, info_nce, nt_xent, nt_xent_part
from glsd.contrastive.moco import mocov3_loss


@pytest.fixture(scope='module')
def z():
    return golden('contrastive')


def with_gradients(loss, *arrays):
    "A loss of copies of these arrays, and its gradients."
    copies = [a.clone().requires_grad_() for a in arrays]
    value = loss(*copies)
    return value.detach(), torch.autograd.grad(value, copies, allow_unused=True)


def equal_to(name, arrays, loss, *inputs):
    "Value and gradients in single precision, and again in double, against `name` of the file."
    for dtype, for_value, for_gradient in (
        (torch.float32, 1e-5, 1e-4),
        (torch.float64, 1e-6, 1e-6),
    ):
        value, gradients = with_gradients(loss, *(arrays[i].to(dtype) for i in inputs))
        assert value.dtype == dtype
        close(value, arrays[f'{name}_loss'].to(dtype), for_value)
        for i, g in enumerate(gradients):
            theirs = arrays[f'{name}_grad{i}'].to(dtype)
            close(torch.zeros_like(theirs) if g is None else g, theirs, for_gradient)


def test_simclr(z):
    arrays, meta = z
    t = meta['simclr']['temperature']
    equal_to('simclr', arrays, lambda z1, z2: nt_xent(z1, z2, t), 'z1', 'z2')


def test_parts_of_a_batch_have_the_same_loss_and_gradient(z):
    arrays, meta = z
    t = meta['simclr']['temperature']

    def in_parts(z1, z2):
        everyone = torch.stack([z1, z2])
        cuts = range(0, len(z1), 2)
        return sum(nt_xent_part(everyone[:, i : i + 2], everyone, i, t) for i in cuts) / len(cuts)

    equal_to('simclr', arrays, in_parts, 'z1', 'z2')


def test_moco(z):
    arrays, meta = z
    t, queue = meta['moco']['temperature'], arrays['moco_queue'].T
    equal_to('moco', arrays, lambda p, k: info_nce(p, k.detach(), queue, t), 'p1', 'z2')


def test_moco_in_both_directions(z):
    arrays, meta = z
    t, (queue0, queue1) = meta['moco']['temperature'], arrays['moco_symmetric_queue'].mT

    def loss(p1, p2):
        z1, z2 = arrays['z1'].to(p1.dtype), arrays['z2'].to(p1.dtype)
        return (info_nce(p1, z2, queue1, t) + info_nce(p2, z1, queue0, t)) / 2

    equal_to('moco_symmetric', arrays, loss, 'p1', 'p2')


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: nt_xent(torch.zeros(2, 3), torch.zeros(2, 4)), 'two views need projections of one shape'),
        (lambda: nt_xent(torch.ones(2, 3), torch.ones(2, 3), 0.0), 'temperature must be positive, not 0.0'),
        (
            lambda: info_nce(torch.ones(4, 3), torch.ones(3, 3)),
            '4 queries from key 0 on need more than 3 keys',
        ),
        (lambda: MLP(4, 4, 4, norm_last='last'), 'an MLP has 1 or more layers and norm_last none, plain or'),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_mocov3(z):
    arrays, meta = z
    t = meta['mocov3']['temperature']

    def loss(p1, p2):
        return mocov3_loss(p1, p2, arrays['z1'].to(p1.dtype), arrays['z2'].to(p1.dtype), t)

    equal_to('mocov3', arrays, loss, 'p1', 'p2')
