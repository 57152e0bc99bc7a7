"MoBY and SelfPatch as a trainer meets them: cut and resumed, on several processes, in any order, and where their gradient goes."

import copy

import pytest
import torch
import torch.nn.functional as F

from glsd.backbones import create_backbone
from glsd.backbones.heads import Branch, Outputs
from glsd.evaluation.collapse import collapse_figures
from glsd.objectives import MoBYLoss, SelfPatchLoss, create_objective, soft_cross_entropy
from glsd.objectives.selfpatch import Aggregation, neighbours, patch_contrast, positives
from glsd.training import Recipe
from glsd.training.loop import Trainer, batches, build_dataset

TINY = dict(queue=24, hidden=16, width=8)
RECIPE = Recipe(
    backbone='vit_mini',
    n_images=32,
    image_size=32,
    global_size=32,
    local_size=16,
    n_local=1,
    out_dim=16,
    head_hidden=16,
    head_bottleneck=8,
    batch_size=8,
    steps=3,
    freeze_last=0.0,
)
SETTINGS = {'moby': TINY, 'selfpatch': dict(k=2), 'selfpatch_moby_negatives': TINY}


@pytest.mark.parametrize('name', SETTINGS)
def test_cut_and_resumed(name):
    "Queue, its mark, predictor, centre and aggregation are in the state: a run that was cut ends with the same weights, bit for bit."
    recipe = RECIPE.replace(objective=name, objective_options=SETTINGS[name])
    views, ends = list(batches(recipe, build_dataset(recipe), 0, 3)), []
    for cut in (None, 1):
        trainer = Trainer(recipe, 3)
        start = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        for i, one in enumerate(views):
            trainer.step(one)
            if i == cut:
                state, trainer = copy.deepcopy(trainer.state_dict()), Trainer(recipe, 3)
                trainer.load_state_dict(state)
        ends.append({**trainer.student.state_dict(), **trainer.objective.state_dict()})
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    parts = {
        k.split('.')[1]
        for k, v in trainer.student.state_dict().items()
        if k.startswith('heads.') and not torch.equal(v, start[k])
    }
    assert parts == {'moby': {'view'}}.get(name, {'view', 'patch', 'aggregate'})


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
        term = MoBYLoss(**TINY)
        term.remember(keys[rank])
        rings.append(term.queue)
    assert (
        torch.equal(*rings)
        and term.place == 6
        and torch.equal(rings[0][:, :6], torch.cat(keys).transpose(0, 1))
    )


def views_of(n=4, seed=0, sizes=(32, 16)):
    "A stand-in for Views: two global crops and a local one, of noise."
    from types import SimpleNamespace

    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        crops=[torch.randn(v, n, 3, s, s, generator=g) for v, s in zip((2, 1), sizes)],
        batch_size=n,
        w_geo=[torch.zeros(v, n, 7) for v in (2, 1)],
    )


def pair(objective, name='vit_mini'):
    head = dict(out_dim=16, hidden_dim=16, bottleneck_dim=8)

    def branch(heads):
        backbone = create_backbone(name)
        return Branch(backbone, heads, objective.modules_of(backbone, **head), **head).eval()

    return branch(objective.heads), branch(
        objective.teacher_heads
    )  # the teacher with gradient on: it must get none all the same


@pytest.mark.parametrize(
    'name, options',
    [('moby', TINY), ('selfpatch', {}), ('selfpatch_moby', TINY), ('selfpatch_moby_negatives', TINY)],
)
def test_collapse_figures_look_at_prototypes_only(name, options):
    objective, views = create_objective(name, 16, **options), views_of()
    student, teacher = pair(objective)
    with torch.no_grad():
        figures = collapse_figures(student(views), teacher(views, objective.teacher_groups), objective, 0.07)
    assert set(figures['heads']) == {
        'moby': set(),
        'selfpatch': {'view', 'patch'},
        'selfpatch_moby': {'patch'},
    }.get(name, set())


def grads(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini'])
@pytest.mark.parametrize(
    'name, options', [('selfpatch', {}), ('selfpatch_moby', TINY), ('selfpatch_moby_negatives', TINY)]
)
def test_gradient_flows_only_where_the_paper_lets_it(name, options, backbone):
    objective, views = create_objective(name, 16, **options), views_of()
    student, teacher = pair(objective, backbone)
    reached = {}
    for term in 'view', 'patch':
        student.zero_grad()
        teacher.zero_grad()
        objective(student(views), teacher(views, objective.teacher_groups), 0.07)[term].backward()
        reached[term] = {
            part for part, m in [('backbone', student.backbone), *student.heads.items()] if grads(m)
        }
        assert not grads(teacher)
    assert reached == {'view': {'backbone', 'aggregate', 'view'}, 'patch': {'backbone', 'patch'}}


@pytest.mark.parametrize(
    'name, options', [('moby', TINY), ('selfpatch', {}), ('selfpatch_moby_negatives', TINY)]
)
def test_order_of_the_batch(name, options):
    objective, views, order = (
        create_objective(name, 16, **options).eval(),
        views_of(),
        torch.tensor([2, 0, 3, 1]),
    )
    student, teacher = pair(objective)
    turned = views_of()
    turned.crops = [c[:, order] for c in turned.crops]
    one, other = (objective(student(v), teacher(v, objective.teacher_groups), 0.07) for v in (views, turned))
    assert one.keys() == other.keys() and all(torch.isclose(one[k], other[k], rtol=1e-5) for k in one)


@pytest.mark.parametrize('grid', [(4, 7), (7, 4), (2, 9)])
def test_nothing_comes_round_the_border(grid):
    "A change at one border reaches targets at most two columns (rows) away: one as a positive, one through the choice of positives."
    H, W = grid
    term, h = SelfPatchLoss(16), {'aggregate': Aggregation(32)}
    tokens = torch.randn(1, H * W, 32)
    far = lambda x: term.targets(Outputs(None, x, [grid], None, {}), h).view(H, W, 32)
    for axis in (0, 1):
        changed = tokens.clone().view(1, H, W, 32)
        changed.select(axis + 1, grid[axis] - 1).add_(torch.randn(32))
        moved = (far(tokens) - far(changed.flatten(1, 2))).abs().amax(-1).amax(1 - axis) > 0
        assert not moved[:-2].any() and moved[-1]


@pytest.mark.parametrize('size', [3, 5, 'all'])
def test_positives_against_a_double_loop(size):
    grid, k, tokens = (3, 5), 6, torch.randn(2, 15, 8)
    index, found = positives(tokens, grid, k, size)
    for x, chosen, there in zip(tokens, index, found):
        for i in range(15):
            near = [
                j
                for j in range(15)
                if j != i and (size == 'all' or max(abs(i // 5 - j // 5), abs(i % 5 - j % 5)) <= size // 2)
            ]
            best = sorted(near, key=lambda j: -F.cosine_similarity(x[i], x[j], dim=0).item())[:k]
            assert chosen[i][there[i]].tolist() == best


def test_terms_against_plain_versions():
    g = torch.Generator().manual_seed(1)
    grids = [(3, 3), (3, 3), (2, 2)]
    s, t = (torch.randn(3, 22, 16, generator=g) for _ in range(2))
    out = lambda x: Outputs(None, x, grids, None, {'patch': x})
    term = SelfPatchLoss(16, weight=0.5)
    term.center.normal_(generator=g)
    center = term.center.clone()
    plain = 0.0
    for b in range(3):
        for rows in torch.arange(22).split([9, 9, 4]):
            p, q = ((t[b, rows] - center) / 0.05).softmax(-1), (s[b, rows] / 0.1).log_softmax(-1)
            plain += -(p * q).sum(-1).mean() / (3 * 3)
    dense = soft_cross_entropy(s, t, 0.5 * term.matching(out(s), out(t)), 0.1, 0.05, center)
    fast = term(out(s), out(t), 0.05)['patch']
    assert torch.isclose(fast, 0.5 * plain) and torch.isclose(fast, dense)
    assert torch.allclose(term.center, 0.9 * center + 0.1 * t.mean((0, 1)))
    assert len(SelfPatchLoss(65536).center) == 4096


def test_contrast_in_bfloat16_is_computed_in_float32():
    q, keys = (F.normalize(torch.randn(4, 5, 8), dim=-1) for _ in range(2))
    with torch.autocast('cpu', torch.bfloat16):
        low = patch_contrast(q, keys, keys[:, :2], 0.2)
    assert low.dtype == torch.float32 and torch.equal(low, patch_contrast(q, keys, keys[:, :2], 0.2))


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('selfpatch', dict(k=9), 'k=9 positives: choose 1 or more, and at most the 8 neighbours of 3x3'),
        ('selfpatch', dict(neighbours=4), "neighbours=4: 3 (the 3x3 around a patch), 5 (5x5), or 'all'"),
        ('selfpatch', dict(aggregate='max'), "aggregate='max': 'attention' or 'mean'"),
        ('moby', dict(queue=0), 'queue=0: MoBY needs at least one key of another image'),
        ('selfpatch', dict(neighbors=5), "no option of 'selfpatch' 'neighbors'; did you mean neighbours"),
    ],
)
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(ValueError) as e:
        create_objective(name, 16, **options)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_wrong_views_are_one_line():
    with pytest.raises(
        ValueError, match='^a grid of 1x1 has no neighbours: use larger crops or smaller patches$'
    ):
        neighbours((1, 1))
    views, objective = (
        views_of(sizes=(32, 8)),
        create_objective('selfpatch', 16),
    )  # a local crop of a single patch
    student, teacher = pair(objective)
    with pytest.raises(ValueError, match='a grid of 1x1 has no neighbours'):
        teacher(views)
    one = Outputs(None, None, [], None, {'view': torch.randn(4, 1, 8)})
    with pytest.raises(ValueError, match='^MoBY compares two global views, not 1: set n_global=2$'):
        MoBYLoss(**TINY)(one, one, 0.07)
