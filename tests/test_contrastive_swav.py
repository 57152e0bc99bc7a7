"SwAV: the authors' values, the queue, what collapses, what it refuses. See test_contrastive_methods, too."

import pytest
import torch
import torch.nn.functional as F
from contrastive_runs import first_steps, one_line_from, views_of
from golden_values import close, golden
from training_runs import one_line

from glsd.contrastive import make_codes, swav_loss
from glsd.contrastive.swav import push
from glsd.objectives import create_method
from glsd.training import Recipe

SMALL = dict(
    backbone='vit_mini', global_size=32, local_size=16, n_local=2, local_scale=(0.1, 0.4), prototypes=12,
    projector_hidden=32, projector_dim=16,
)  # fmt: skip


@pytest.mark.parametrize('with_queue', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(with_queue, dtype, tolerance):
    z, meta = golden('contrastive')
    m, prefix = meta['swav'], 'swav_queue_' if with_queue else 'swav_'
    n_crops, G = m['global_crops'] + m['local_crops'], m['global_crops']
    crops = [z[f'swav_crop{i}'].to(dtype).requires_grad_() for i in range(n_crops)]
    prototypes = z['swav_prototypes'].to(dtype).requires_grad_()
    queue = z['swav_queue'].to(dtype)
    scores = torch.stack([crop @ prototypes.T for crop in crops])
    kept = [rows @ prototypes.T.detach() if with_queue else None for rows in queue]
    codes = [make_codes(scores[i].detach(), kept[i], m['epsilon'], m['iterations']) for i in range(G)]
    loss = swav_loss(scores, torch.stack(codes), m['temperature'])
    loss.backward()
    close(loss, z[f'{prefix}loss'], tolerance)
    for i in range(G):
        close(codes[i], z[f'{prefix}codes{i}'], 10 * tolerance)
    for i in range(n_crops):
        close(crops[i].grad, z[f'{prefix}grad_crop{i}'], 10 * tolerance)
    close(prototypes.grad, z[f'{prefix}grad_prototypes'], 10 * tolerance)
    if with_queue:
        push(queue, torch.stack([crop.detach() for crop in crops[:G]], 1))
        close(queue, z['swav_queue_after'], tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_method_with_the_queue_of_the_authors(dtype):
    "The same numbers through the method: a network that hands on what it is given."
    z, meta = golden('contrastive')
    m = meta['swav']
    K, c = z['swav_prototypes'].shape
    rows = m['queue_rows']
    method = create_method(
        'swav', **SMALL | dict(prototypes=K, projector_dim=c), queue=rows, temperature=m['temperature']
    ).to(dtype)
    method.prototypes.weight.data = z['swav_prototypes'].to(dtype)
    method.queue.copy_(z['swav_queue'])
    crops = torch.stack([z[f'swav_crop{i}'] for i in range(m['global_crops'] + m['local_crops'])])
    method.project = lambda views: crops.to(dtype)
    views = views_of(method, crops.shape[1])
    loss = method.training_step(views, dict(queued=1.0))['swap']
    close(loss, z['swav_queue_loss'], 1e-5)
    close(method.queue, z['swav_queue_after'], 1e-5)


def test_a_queue_is_used_once_it_is_full():
    method = create_method('swav', **SMALL, queue=12)
    views, others, without = views_of(method, 6), views_of(method, 12), create_method('swav', **SMALL)
    without.load_state_dict({k: v for k, v in method.state_dict().items() if k != 'queue'})
    alone = without.training_step(views, {})['swap'].item()

    def loss():  # on what is in the queue now
        kept, value = method.queue.clone(), method.training_step(views, dict(queued=1.0))['swap'].item()
        method.queue.copy_(kept)
        return value

    assert loss() == pytest.approx(alone, abs=1e-6)
    method.training_step(views, dict(queued=1.0))
    assert not method.queue[:, -1].any() and loss() == pytest.approx(alone, abs=1e-6)
    method.training_step(others, dict(queued=1.0))
    assert method.queue[:, -1].any() and abs(loss() - alone) > 1e-5
    before = method.queue.clone()
    method.training_step(views, dict(queued=0.0))
    assert torch.equal(method.queue, before)


def test_prototypes_stand_still_while_frozen():
    method = create_method('swav', **SMALL, freeze_prototypes=1.0)
    before = method.prototypes.weight.detach().clone()
    first_steps(method, 2, n=6)
    torch.testing.assert_close(before, method.prototypes.weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize('iterations', [0, 3])
def test_without_sinkhorn_one_prototype_has_all(iterations):
    "And `stuck` names it."
    torch.manual_seed(0)
    method = create_method('swav', **SMALL | dict(n_local=0, iterations=iterations, freeze_prototypes=0.0))
    first_steps(method, 30, lr=1e-2, n=16)
    views = views_of(method, 16)
    with torch.no_grad():
        used = method.scores(method.project(views))[0].argmax(1).unique()
    assert (len(used) == 1) == (iterations == 0)
    assert bool(method.stuck(views, {})) == (iterations == 0)


def test_scores_are_in_full_precision_under_autocast():
    method = create_method('swav', **SMALL)
    z = F.normalize(torch.randn(8, 16), dim=1)
    with torch.autocast('cpu', torch.bfloat16):
        scores = method.scores(z)
    assert torch.equal(scores, method.scores(z)) and scores.dtype == torch.float32


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(n_global=1, n_local=0), 'swav needs at least two crops per image'),
        (dict(prototypes=1), 'prototypes must be at least 2, not 1'),
        (dict(epsilon=0.0), 'epsilon must be greater than 0'),
        (dict(iterations=-1), 'iterations must be at least 0'),
        (dict(queue_start=15.0), 'queue_start is a share of the run'),
    ],
)
def test_bad_options_are_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as e:
        Recipe('swav', **wrong)
    assert one_line(e) and words in one_line_from(create_method, 'swav', **SMALL | wrong)


def test_a_queue_smaller_than_a_batch_is_one_line():
    with pytest.raises(ValueError, match='queue=16 is smaller than a batch of 64') as e:
        Recipe('swav', queue=16, batch_size=64)
    assert one_line(e)


def test_scores_without_a_pair_are_one_line():
    scores = torch.randn(1, 4, 5)
    assert 'two crops in all' in one_line_from(swav_loss, scores, scores.softmax(-1))
