"NNCLR: the values of two libraries, neighbours of every kind, bad input. See test_contrastive_methods, too."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contrastive_runs import first_steps, one_line_from, views_of
from golden_values import close, golden
from training_runs import one_line

from glsd.contrastive import MemoryBank, nnclr_loss
from glsd.contrastive.nnclr import draw_one, soft_neighbours
from glsd.objectives import create_method
from glsd.training import Recipe

SMALL = dict(
    backbone='vit_mini', global_size=32, projector_hidden=32, projector_dim=16, predictor_hidden=32, queue=24
)


def bank_of(z, dtype, normalize=True):
    "A full queue with the rows of the file."
    bank = MemoryBank(*z['nnclr_support'].shape, normalize=normalize).to(dtype)
    bank.rows.copy_(z['nnclr_support'])
    bank.filled.fill_(len(bank.rows))
    return bank


@pytest.mark.parametrize('library', ['nnclr', 'nnclr_lightly'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(library, dtype, tolerance):
    z, meta = golden('contrastive')
    lightly = library == 'nnclr_lightly'
    bank = bank_of(z, dtype, normalize=not lightly)
    z1, z2 = z['z1'].to(dtype), z['z2'].to(dtype)
    p1, p2 = (z[name].to(dtype).requires_grad_() for name in ('p1', 'p2'))
    (index1, nn1), (index2, nn2) = (bank.nearest(x) for x in (z1, z2))
    assert torch.equal(index1[:, 0], z['nnclr_index1'].long())
    assert torch.equal(index2[:, 0], z['nnclr_index2'].long())
    loss = nnclr_loss(nn1[:, 0], nn2[:, 0], p1, p2, meta['nnclr']['temperature'], both_ways=lightly)
    loss.backward()
    close(loss, z[f'{library}_loss'], tolerance)
    close(p1.grad, z[f'{library}_grad0'], 10 * tolerance)
    close(p2.grad, z[f'{library}_grad1'], 10 * tolerance)
    bank.enqueue(z2 if lightly else z1)
    close(bank.rows, z[f'{library}_support_after'], 1e-6)


def test_no_gradient_reaches_neighbours():
    nn1, nn2, p1, p2 = (x.requires_grad_() for x in torch.randn(4, 6, 8))
    nnclr_loss(nn1, nn2, p1, p2).backward()
    assert nn1.grad is None and nn2.grad is None and p1.grad is not None and p2.grad is not None


@pytest.mark.parametrize(
    'options',
    [
        dict(top_k=5),
        dict(neighbours='soft'),
        dict(neighbours='none'),
        dict(both_ways=True),
        dict(momentum=0.9),
        dict(crop_only=True),
    ],
    ids=str,
)
def test_every_kind_of_neighbour_learns(options):
    losses = first_steps(create_method('nnclr', **SMALL, **options), 5, n=12)
    assert all(terms.keys() == {'neighbour'} for terms in losses)


def test_the_search_comes_before_the_queue():
    "A second step on the same views finds them, the first cannot."
    method = create_method('nnclr', **SMALL)
    views = views_of(method, 12)
    views.index = torch.arange(100, 112)
    method.training_step(views, {})
    assert (method.served == -1).all() and method.sources[:12].tolist() == list(range(100, 112))
    method.training_step(views, {})
    assert torch.equal(method.served, views.index)
    assert int(method.bank.place) == 0 and int(method.bank.filled) == 24


def test_the_image_that_served_is_the_one_that_was_drawn():
    method = create_method('nnclr', **SMALL, top_k=3)
    c = method.options.projector_dim
    method.bank.enqueue(torch.randn(24, c))
    method.sources.copy_(torch.arange(100, 124))
    z = torch.randn(40, c)
    found, served = method.positives(z)
    assert torch.equal(found, method.bank.rows[served - 100])
    rank = (method.bank.nearest(z, 3)[0] == served[:, None] - 100).float().argmax(1)
    assert set(rank.tolist()) == {0, 1, 2}


def test_one_of_k_is_drawn_by_torchs_generator_and_only_if_there_is_a_choice():
    found = torch.randn(50, 3, 4)
    torch.manual_seed(3)
    one, state = draw_one(found), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(one, draw_one(found))
    places = (found == one[:, None]).all(-1).float().argmax(1)
    assert set(places.tolist()) == {0, 1, 2}
    draw_one(found[:, :1])
    assert torch.equal(state, torch.get_rng_state())


def test_soft_neighbours_of_a_queue_that_is_not_full_are_means_of_the_keys_it_has():
    method = create_method('nnclr', **SMALL, neighbours='soft')
    key = F.normalize(torch.randn(1, method.options.projector_dim), dim=1)
    method.bank.enqueue(key)
    found, _ = method.positives(torch.randn(3, method.options.projector_dim))
    torch.testing.assert_close(found, key.expand(3, -1))


def test_soft_neighbours_are_means_of_all_keys():
    z, rows = torch.randn(5, 8), F.normalize(torch.randn(20, 8), dim=1)
    weights = (F.normalize(z, dim=1) @ rows.T / 0.3).softmax(1)
    torch.testing.assert_close(soft_neighbours(z, rows, 0.3), weights @ rows)
    torch.testing.assert_close(soft_neighbours(z, rows, 1e6), rows.mean(0).expand(5, 8), atol=1e-4, rtol=0)


def test_crops_only_have_the_colours_of_the_image():
    grey = torch.full((3, 48, 48), 100, dtype=torch.uint8)
    grey[0] = 200
    for crop_only in True, False:
        method = create_method('nnclr', **SMALL, crop_only=crop_only)
        crops = method.views([grey] * 4, [np.random.default_rng(i) for i in range(4)]).crops[0]
        assert (crops.flatten(3).std(-1).max() < 1e-5 and crops.std((0, 1)).max() < 1e-5) == crop_only


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(n_local=2), 'set n_global=2 and n_local=0, not n_global=2, n_local=2'),
        (dict(top_k=0), 'top_k=0 of a queue of'),
        (dict(top_k=200000), 'top_k=200000 of a queue of'),
        (dict(neighbours='near'), "no neighbours 'near'; choose from: hard, soft, none"),
        (dict(neighbours='soft', top_k=2), "top_k=2 is for neighbours='hard', not 'soft'"),
    ],
)
def test_bad_options_are_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as e:
        Recipe('nnclr', **wrong)
    assert one_line(e) and words in one_line_from(create_method, 'nnclr', **SMALL | wrong)


def test_a_queue_smaller_than_a_batch_is_one_line():
    with pytest.raises(ValueError, match='queue=16 is smaller than a batch of 64') as e:
        Recipe('nnclr', queue=16, batch_size=64)
    assert one_line(e)
