"""LooC: what keys share with the query, the loss against a loop, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from glsd.contrastive import looc as L
from glsd.data.loading import sample_rng
from glsd.data.toyworld import ToyWorld
from glsd.objectives.method import create_method
from glsd.training import Recipe

WORLD = ToyWorld(n=8, size=40, seed=1)
TINY = dict(backbone='resnet_mini', global_size=32, queue=16, projector_hidden=16, projector_dim=8)
COMBINATIONS = ['rotation', 'colour', 'blur', 'rotation+colour', 'blur+rotation', 'colour+blur+rotation']


@pytest.mark.parametrize('names', COMBINATIONS)
def test_a_key_shares_one_augmentation_with_the_query_and_nothing_else(names):
    crops = L.LooCCrops(global_size=32, n_local=0, augmentations=names)
    drawn = [crops.draw((40, 40), sample_rng(0, 0, i)) for i in range(60)]
    geo, pho = (torch.stack([part[k][0] for part in drawn]) for k in (0, 1))
    assert geo.shape == (60, names.count('+') + 3, 7)
    for key in range(1, geo.shape[1]):
        shared = names.split('+')[key - 2] if key > 1 else None
        for name, (g, p) in L.AUGMENTATIONS.items():
            equal = (geo[:, key, g] == geo[:, 0, g]).all(1) & (pho[:, key, p] == pho[:, 0, p]).all(1)
            assert equal.all() if name == shared else not equal.all(), (key, name)
        assert not (geo[:, key, :4] == geo[:, 0, :4]).all()  # crops are drawn anew
    turns = geo[..., 6].unique().tolist()
    assert turns == list(range(8)) if 'rotation' in names else turns == [0, 1]


def test_crops_are_turned():
    crops = L.LooCCrops(
        global_size=32, n_local=0, augmentations='rotation', global_scale=(1, 1), ratio=(1, 1)
    )
    sample = crops.sample(WORLD[0][0], sample_rng(0, 0, 3))
    upright = crops.sample(WORLD[0][0], sample_rng(0, 0, 3)).crops[0]
    f = int(sample.w_geo[0][0, 6])
    back = torch.rot90(sample.crops[0][0], -(f // 2), (1, 2))
    other = int(sample.w_geo[0][1, 6])
    again = torch.rot90(upright[1], -(other // 2), (1, 2))
    again = again.flip(-1) if (other % 2) != (f % 2) else again
    assert (back.int() - again.int()).abs().max() <= 1  # the same box, once both stand upright


@pytest.mark.parametrize('S, B, c, K', [(2, 3, 4, 5), (4, 1, 8, 2)])
def test_the_loss_is_the_formula(S, B, c, K):
    q, keys, queues = (
        F.normalize(torch.randn(*s, dtype=torch.float64), dim=-1).float()
        for s in ((S, B, c), (S, S, B, c), (S, K, c))
    )
    q.requires_grad_()
    losses = L.looc_losses(q, keys, queues, 0.3)
    for i in range(S):
        plain = 0.0
        for b in range(B):
            js = range(S) if i else [0]
            scores = [q[i, b] @ keys[i, j, b] for j in js] + [q[i, b] @ k for k in queues[i]]
            plain -= (q[i, b] @ keys[i, i, b] / 0.3 - torch.stack(scores).div(0.3).logsumexp(0)) / B
        torch.testing.assert_close(losses[i], plain)
    losses.sum().backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_each_space_keeps_its_own_key():
    method = create_method('looc', **TINY)
    views = method.views([WORLD[i][0] for i in range(4)], [sample_rng(0, 0, i) for i in range(4)])
    keys = L.encode_keys(method, views.crops[0][1:])
    terms = method.training_step(views, {})
    assert list(terms) == ['all', 'rotation', 'colour']
    for i, bank in enumerate(method.queues):
        torch.testing.assert_close(bank.rows[:4], keys[i, i])
        assert int(bank.filled) == 4
    method.eval().training_step(views, {})
    assert int(method.queues[0].filled) == 4  # evaluation leaves queues alone
    before = method.key_heads[0][0].weight.clone()
    with torch.no_grad():
        method.heads[0][0].weight += 1
    method.after_step({})
    assert 0 < (method.key_heads[0][0].weight - before).mean() < 0.01
    assert L.joined_features(method, views.crops[0][0]).shape == (4, method.backbone.dim + 3 * 8)


def test_keys_come_from_the_whole_network():
    "Stochastic depth is for queries: the key encoder has none, and the same weights."
    method = create_method('looc', **TINY | dict(backbone='vit_mini_p4', drop_path=0.9))
    x = torch.randn(4, 2, 3, 32, 32)
    assert torch.equal(L.encode_keys(method, x), L.encode_keys(method, x))
    assert not torch.equal(method.backbone(x[0]).pooled, method.backbone(x[0]).pooled)
    method.eval()
    torch.testing.assert_close(method.backbone(x[0]).pooled, method.key_backbone(x[0]).pooled)


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(augmentations=''),
            "augmentations='' names no augmentation; choose from: rotation",
        ),
        (dict(augmentations='rotation+taste'), "no 'taste'; choose from: rotation, colour, blur"),
        (dict(augmentations='blur+blur'), 'blur is listed twice'),
        (dict(strength=0.0), 'strength=0 turns colour off'),
        (dict(n_local=2), 'looc has global views only: set n_local=0'),
        (dict(temperature=0.0), 'temperature must be positive'),
        (dict(queue=8, batch_size=16), 'queue=8 is smaller than a batch of 16'),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError) as e:
        Recipe('looc', **options)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_bad_shapes_are_one_line():
    q = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match='2 spaces of queries') as e:
        L.looc_losses(q, torch.randn(2, 3, 3, 4), torch.randn(2, 5, 4))
    assert '\n' not in str(e.value)
