"MoBY and SelfPatch as a trainer meets them: resumed, on several processes, in any order; their gradients."

import copy

import pytest
import torch
import torch.nn.functional as F

from glsd.evaluation.collapse import collapse_figures
from glsd.objectives import MoBYLoss, SelfPatchLoss, create_method, soft_cross_entropy
from glsd.objectives.aggregation import Aggregation, neighbours, positives
from glsd.objectives.branches import Outputs
from glsd.objectives.moby import all_gather_keys, enqueue
from glsd.objectives.selfpatch import patch_contrast
from glsd.training import Recipe
from glsd.training.loop import batches, build_dataset
from glsd.training.trainer import Trainer
from glsd.views.multicrop import Views

SIZES = dict(global_size=32, local_size=16, n_local=1, out_dim=16, head_hidden=16, head_bottleneck=8)
QUEUE = dict(view_queue=24, view_hidden=16, view_width=8)
OPTIONS = {
    'moby': QUEUE,
    'selfpatch': dict(patch_k=2),
    'selfpatch_moby': QUEUE,
    'selfpatch_moby_negatives': dict(**QUEUE, patch_hidden=16, patch_width=8),
}
PATCH = [name for name in OPTIONS if name != 'moby']


def create(name, backbone='vit_mini', **options):
    "A method whose teacher takes gradients, too: it must get none all the same."
    method = create_method(name, backbone=backbone, drop_path=0.0, **SIZES | OPTIONS[name] | options).eval()
    method.teacher.requires_grad_(True)
    return method


def views_of(n=4, order=None, sizes=(32, 16)):
    "Two global crops and a local one, of noise."
    g = torch.Generator().manual_seed(0)
    crops = [torch.randn(v, n, 3, s, s, generator=g) for v, s in zip((2, 1), sizes)]
    if order is not None:
        crops = [c[:, order] for c in crops]
    return Views(crops, [torch.zeros(v, n, 7) for v in (2, 1)], torch.arange(n))


@pytest.mark.parametrize('name', ['moby', 'selfpatch', 'selfpatch_moby_negatives'])
def test_stopped_and_resumed(name):
    "Queue, its mark, predictor, centre and aggregation are in the state: the same weights, bit for bit."
    run = dict(n_images=32, image_size=32, batch_size=8, steps=3, freeze_last=0.0)
    recipe = Recipe(name, backbone='vit_mini', **run, **SIZES, **OPTIONS[name])
    ends = []
    for stop in (None, 1):
        trainer = Trainer(recipe, 3)
        start = copy.deepcopy(trainer.method.student.state_dict())
        for i, views in enumerate(batches(recipe, build_dataset(recipe), 0, 3, trainer.method.views)):
            trainer.step(views)
            if i == stop:
                state, trainer = copy.deepcopy(trainer.state_dict()), Trainer(recipe, 3)
                trainer.load_state_dict(state)
        ends.append(trainer.method.state_dict())
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    end = trainer.method.student.state_dict()
    moved = {k.split('.')[1] for k in end if k.startswith('heads.') and not torch.equal(end[k], start[k])}
    assert moved == ({'view'} if name == 'moby' else {'view', 'patch', 'aggregate'})


def test_ring_holds_the_keys_of_all_processes(monkeypatch):
    "Two processes: the ring takes the keys of both, in the same order everywhere."
    import torch.distributed as dist

    keys = [F.normalize(torch.randn(3, 2, 8), dim=-1) for _ in range(2)]
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(dist, 'all_gather', lambda out, own: [a.copy_(b) for a, b in zip(out, keys)])
    rings = []
    for rank in range(2):
        torch.manual_seed(0)
        term = MoBYLoss(24, hidden=16, width=8)
        enqueue(term.queue, term.place, all_gather_keys(keys[rank]))
        rings.append(term.queue)
    assert torch.equal(*rings) and term.place == 6
    assert torch.equal(rings[0][:, :6], torch.cat(keys).transpose(0, 1))


@pytest.mark.parametrize('name', OPTIONS)
def test_collapse_figures_look_at_prototypes_only(name):
    method = create(name)
    with torch.no_grad():
        figures = collapse_figures(*method.outputs(views_of()), method.objective, 0.07)
    heads = {'selfpatch': {'view', 'patch'}, 'selfpatch_moby': {'patch'}}
    assert set(figures['heads']) == heads.get(name, set())


def has_gradient(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini'])
@pytest.mark.parametrize('name', PATCH)
def test_gradient_flows_only_where_the_paper_lets_it(name, backbone):
    method, reached = create(name, backbone), {}
    for term in 'view', 'patch':
        method.zero_grad()
        student = method.student(views_of())
        teacher = method.teacher(views_of(), method.objective.teacher_groups)
        method.objective(student, teacher, 0.07)[term].backward()
        parts = [('backbone', method.student.backbone), *method.student.heads.items()]
        reached[term] = {part for part, module in parts if has_gradient(module)}
        assert not has_gradient(method.teacher)
    assert reached == {'view': {'backbone', 'aggregate', 'view'}, 'patch': {'backbone', 'patch'}}


@pytest.mark.parametrize('name', ['moby', 'selfpatch', 'selfpatch_moby_negatives'])
def test_order_of_the_batch(name):
    method, values = create(name), dict(teacher_temp=0.07)
    views = views_of(), views_of(order=torch.tensor([2, 0, 3, 1]))
    one, other = (method.training_step(v, values) for v in views)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('grid', [(4, 7), (7, 4), (2, 9)])
def test_nothing_comes_round_the_border(grid):
    "A change at one border reaches targets at most two rows away: as a positive, and in choosing positives."
    H, W = grid
    term, modules = SelfPatchLoss(16), {'aggregate': Aggregation(32)}
    tokens = torch.randn(1, H * W, 32)

    def targets(x):
        return term.targets(Outputs(None, x, [grid], None, {}), modules).view(H, W, 32)

    for axis in (0, 1):
        changed = tokens.clone().view(1, H, W, 32)
        changed.select(axis + 1, grid[axis] - 1).add_(torch.randn(32))
        difference = (targets(tokens) - targets(changed.flatten(1, 2))).abs().amax(-1)
        moved = difference.amax(1 - axis) > 0
        assert not moved[:-2].any() and moved[-1]


@pytest.mark.parametrize('size', [3, 5, 'all'])
def test_positives_against_a_double_loop(size):
    grid, k, tokens = (3, 5), 6, torch.randn(2, 15, 8)
    index, found = positives(tokens, grid, k, size)

    def is_near(i, j):
        steps = max(abs(i // 5 - j // 5), abs(i % 5 - j % 5))
        return j != i and (size == 'all' or steps <= size // 2)

    for x, chosen, there in zip(tokens, index, found):
        for i in range(15):
            similarity = F.cosine_similarity(x[i][None], x).tolist()
            near = [j for j in range(15) if is_near(i, j)]
            best = sorted(near, key=similarity.__getitem__, reverse=True)[:k]
            assert chosen[i][there[i]].tolist() == best


def test_terms_against_plain_versions():
    g = torch.Generator().manual_seed(1)
    grids = [(3, 3), (3, 3), (2, 2)]
    s, t = (torch.randn(3, 22, 16, generator=g) for _ in range(2))
    student, teacher = (Outputs(None, x, grids, None, {'patch': x}) for x in (s, t))
    term = SelfPatchLoss(16, weight=0.5)
    term.center.normal_(generator=g)
    center = term.center.clone()
    plain = 0.0
    for b in range(3):
        for rows in torch.arange(22).split([9, 9, 4]):
            p, q = ((t[b, rows] - center) / 0.05).softmax(-1), (s[b, rows] / 0.1).log_softmax(-1)
            plain += -(p * q).sum(-1).mean() / (3 * 3)
    dense = soft_cross_entropy(s, t, 0.5 * term.matching(student, teacher), 0.1, 0.05, center)
    fast = term(student, teacher, 0.05)
    assert torch.isclose(fast, 0.5 * plain) and torch.isclose(fast, dense)
    torch.testing.assert_close(term.center, 0.9 * center + 0.1 * t.mean((0, 1)))
    assert len(SelfPatchLoss(65536).center) == 4096


def test_contrast_in_bfloat16_is_computed_in_float32():
    q, keys = (F.normalize(torch.randn(4, 5, 8), dim=-1) for _ in range(2))
    with torch.autocast('cpu', torch.bfloat16):
        low = patch_contrast(q, keys, keys[:, :2], 0.2)
    assert low.dtype == torch.float32 and torch.equal(low, patch_contrast(q, keys, keys[:, :2], 0.2))


@pytest.mark.parametrize(
    'name, options, message',
    [
        (
            'selfpatch',
            dict(patch_k=9),
            'k=9 positives: choose 1 or more, and at most the 8 neighbours of 3x3',
        ),
        (
            'selfpatch',
            dict(patch_neighbours='4'),
            "neighbours=4 must be 3 (the 3x3 around a patch), 5 (5x5) or 'all'",
        ),
        ('selfpatch', dict(patch_aggregate='max'), "aggregate='max': 'attention' or 'mean'"),
        ('selfpatch', dict(backbone='vit_tiny_p16'), 'SelfPatch gives no gradient to the CLS token'),
        ('moby', dict(view_queue=0), 'queue=0: MoBY needs at least one key of another image'),
        ('selfpatch', dict(patch_neighbors='5'), "no option 'patch_neighbors' of method 'selfpatch'"),
    ],
)
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(ValueError) as e:
        create(name, **options)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_wrong_views_are_one_line():
    with pytest.raises(ValueError, match='^a grid of 1x1 has no neighbours: use larger crops or smaller'):
        neighbours((1, 1))
    method = create('selfpatch')
    with pytest.raises(ValueError, match='a grid of 1x1 has no neighbours'):
        method.teacher(views_of(sizes=(32, 8)))  # a local crop of a single patch
    one = Outputs(None, None, [], None, {'view': torch.randn(4, 1, 8)})
    with pytest.raises(ValueError, match='^MoBY compares two global views, not 1: set n_global=2$'):
        MoBYLoss(24, hidden=16, width=8)(one, one)
