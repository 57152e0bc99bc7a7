"What a chapter cannot show about the losses: memory, precision, processes, names, every method in a loop."

import subprocess
import sys

import numpy as np
import pytest
import torch
from meters import Meter
from training_runs import MASKED, deit_teacher, files_named_by, plain_backbone

import glsd.objectives
from glsd.data.toyworld import ToyWorld
from glsd.objectives import (
    DINOLoss,
    GeometricLoss,
    IBOTLoss,
    ShuffledLoss,
    SimilarityLoss,
    create_method,
    find_method,
    list_methods,
    soft_cross_entropy,
)
from glsd.objectives.branches import Objective, Outputs
from glsd.objectives.geometric import geometric_matching
from glsd.objectives.ibot import draw_masks

SETTINGS = {
    'dino': [DINOLoss],
    'similarity': [DINOLoss, SimilarityLoss],
    'geometric': [DINOLoss, GeometricLoss],
    'shuffled': [DINOLoss, ShuffledLoss],
}


def objective_of(name):
    return Objective(*(term(32) for term in SETTINGS[name]))


def outputs(batch=2, K=32, seed=0, grad=True):
    "Random outputs of a student with three views and a teacher with two."
    g, grids = torch.Generator().manual_seed(seed), [(3, 3), (3, 3), (2, 2)]

    def side(n):
        tokens = sum(h * w for h, w in grids[:n])
        box = torch.rand(batch, n, 2, generator=g) * 40
        w_geo = torch.cat([box, box + 60, torch.zeros(batch, n, 3)], -1)
        pooled = torch.randn(batch, n, 8, generator=g)
        local = torch.randn(batch, tokens, 8, generator=g)
        logits = {
            k: torch.randn(batch, m, K, generator=g, requires_grad=grad)
            for k, m in (('view', n), ('region', tokens))
        }
        return Outputs(pooled, local, grids[:n], w_geo, logits)

    return side(3), side(2)


def run(code):
    "What a new process prints."
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout


# -- the loss


@pytest.mark.parametrize('overwrite', [False, True])
def test_the_core_holds_a_gradient_at_most(overwrite):
    "Beyond its inputs: one gradient, or none if it takes the place of the logits, and a few blocks."
    B, S, T, K = 4, 60, 40, 4096
    logits, teacher = torch.randn(B, S, K, requires_grad=True) * 1, torch.randn(B, T, K)
    W = torch.zeros(B, S, T).scatter_(2, torch.randint(T, (B, S, 2)), 1 / S)
    with Meter(logits, teacher, W) as meter:
        soft_cross_entropy(logits, teacher, W, 0.1, 0.05, overwrite=overwrite)
    image, block, all_logits = (
        4 * T * K * 3,
        4 * 2**19,
        4 * B * S * K,
    )  # the teacher's: some images in a block
    assert meter.peak < image + 6 * block + (0 if overwrite else all_logits)


def test_by_keyword():
    "Every argument has a name, for tensors and for what is not one."
    s, t, W = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 3, 9), torch.rand(2, 5, 3)
    options = dict(W=W, student_temp=0.1, teacher_temp=0.04, center=torch.randn(9))
    by_name = soft_cross_entropy(student=s, teacher=t, **options)
    assert torch.equal(by_name, soft_cross_entropy(s, t, W, 0.1, 0.04, options['center']))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(W=torch.rand(2, 3, 5)), 'need W'),
        (dict(teacher=torch.randn(2, 3, 8)), 'same batch and prototypes'),
        (dict(teacher_temp=0.0), 'must be positive'),
    ],
)
def test_wrong_input_is_one_line(change, message):
    good = dict(
        student=torch.randn(2, 5, 9),
        teacher=torch.randn(2, 3, 9),
        W=torch.rand(2, 5, 3),
        student_temp=0.1,
        teacher_temp=0.05,
    )
    with pytest.raises(ValueError, match=message) as e:
        soft_cross_entropy(**good | change)
    assert '\n' not in str(e.value)


def test_extreme_logits_stay_finite():
    s = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = soft_cross_entropy(s, torch.tensor([[[-1e4, 1e4, 0.0]]]), torch.ones(1, 1, 1), 0.1, 0.04)
    loss.backward()
    assert loss.item() == pytest.approx(2e5) and s.grad.tolist() == [[[10, -10, 0]]]


@pytest.mark.parametrize('shape', [(70, 20, 18, 512), (3, 40, 9, 2**17)])
def test_blocks_do_not_change_the_result(shape):
    "Batches that fill several blocks of images, and images that fill several blocks of rows."
    B, S, T, K = shape
    s, t = torch.randn(B, S, K, requires_grad=True), torch.randn(B, T, K)
    W = torch.rand(B, S, T) * (torch.rand(B, S, T) < 0.1)
    plain = -(W * ((s / 0.1).log_softmax(-1) @ (t / 0.05).softmax(-1).mT)).sum() / B
    loss = soft_cross_entropy(s, t, W, 0.1, 0.05)
    torch.testing.assert_close(loss, plain)
    grads = (torch.autograd.grad(x, s)[0] for x in (loss, plain))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_gradient_in_place_of_the_logits():
    "overwrite: the same loss and gradient; a leaf is left alone; a second reader is refused."
    s, t, W = torch.randn(2, 5, 9, requires_grad=True), torch.randn(2, 3, 9), torch.rand(2, 5, 3)
    both = [soft_cross_entropy(2 * s, t, W, 0.1, 0.05, overwrite=o) for o in (False, True)]
    assert both[0] == both[1] and torch.equal(*(torch.autograd.grad(3 * x, s)[0] for x in both))
    before = s.detach().clone()
    soft_cross_entropy(s, t, W, 0.1, 0.05, overwrite=True).backward()
    assert torch.equal(s, before) and s.grad.abs().sum() > 0
    logits = 2 * s
    other = logits.square().sum()
    loss = soft_cross_entropy(logits, t, W, 0.1, 0.05, overwrite=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        (loss + other).backward()
    with torch.no_grad():
        logits, kept = 2 * s, 2 * s
        soft_cross_entropy(logits, t, W, 0.1, 0.05, overwrite=True)
    assert torch.equal(logits, kept)


# -- terms


@pytest.mark.parametrize('name', SETTINGS)
def test_gradient_only_to_the_student(name):
    student, teacher = outputs()
    objective = objective_of(name)
    sum(objective(student, teacher, 0.05).values()).backward()
    for head in objective.terms:
        assert student.logits[head].grad.abs().sum() > 0 and teacher.logits[head].grad is None
    assert not any(c.requires_grad for c in objective.state_dict().values())


def test_two_terms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two terms are called 'view'.*DINOLoss"):
        Objective(DINOLoss(32), DINOLoss(32))
    assert [*Objective(DINOLoss(32), DINOLoss(32, name='again')).terms] == ['view', 'again']


@pytest.mark.parametrize('leaf', [True, False])
def test_a_second_term_reads_the_same_logits(leaf):
    "Nothing is written over unless the caller says so: the second term's value is the first one's."
    student, teacher = outputs()
    if not leaf:
        student.logits = {k: 1 * v for k, v in student.logits.items()}
    before = student.logits['view'].detach().clone()
    first, second = (DINOLoss(32)(student, teacher, 0.05) for _ in range(2))
    assert first == second and torch.equal(student.logits['view'], before)
    DINOLoss(32)(student, teacher, 0.05, overwrite=True)
    assert torch.equal(student.logits['view'], before) == leaf


@pytest.mark.parametrize('name', ['dino', 'similarity', 'geometric'])
def test_bf16_under_autocast(name):
    "bf16 logits: a finite loss close to float32's, a bf16 gradient; autocast itself changes nothing."
    student, teacher = outputs(grad=False)
    exact = objective_of(name)(student, teacher, 0.05)
    with torch.autocast('cpu', torch.bfloat16):
        assert objective_of(name)(student, teacher, 0.05) == exact
        for side in (student, teacher):
            side.logits = {k: v.bfloat16().requires_grad_() for k, v in side.logits.items()}
        half = objective_of(name)(student, teacher, 0.05)
        sum(half.values()).backward()
    for head, loss in half.items():
        grad = student.logits[head].grad
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[head].item(), rel=0.02)
        assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


def test_centers_survive_a_checkpoint():
    student, teacher = outputs()
    objective, other = objective_of('geometric'), objective_of('geometric')
    objective(student, teacher, 0.05)
    other.load_state_dict(objective.state_dict())
    assert other(student, teacher, 0.05) == objective(student, teacher, 0.05)


def test_geometric_matching_compares_no_token_with_all_others():
    "The largest tensor that it makes is W itself: no differences [B, S, T, 2], no distances in float64."
    B, side, n = 2, 14, 4
    corner = torch.rand(B, n, 2) * 40
    w_geo, grids = torch.cat([corner, corner + 60, torch.zeros(B, n, 3)], -1), [(side, side)] * n
    with Meter() as meter:
        W = geometric_matching(w_geo, grids, w_geo[:, :2], grids[:2])
    assert meter.largest == W.numel() == B * n * side**2 * 2 * side**2


def test_ibot_makes_no_diagonal():
    "Nothing of size [B, S, S]: the largest tensor is logits and probabilities."
    B, V, N, K = 2, 2, 400, 16
    mask = draw_masks(V * B, (20, 20), np.random.default_rng(0), prob=1.0)
    logits = torch.randn(B, V * N, K, requires_grad=True)
    student = Outputs(logits, logits, [(20, 20)] * V, None, {'patch': logits}, inputs=[{'mask': mask}])
    with Meter() as meter:
        IBOTLoss(K)(student, student, 0.05).backward()
    assert meter.largest <= B * V * N * K < B * (V * N) ** 2


TWO = """
import torch, torch.distributed as dist, torch.multiprocessing as mp
from types import SimpleNamespace as Outputs
from glsd.objectives import DINOLoss

def outputs(n, value):
    logits = {'view': torch.full((1, n, 4), value)}
    return Outputs(grids=[(1, 1)] * n, pooled=torch.zeros(1, n, 1), logits=logits)

def main(rank, address):
    dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    loss = DINOLoss(4, center_momentum=.5)
    loss(outputs(3, 1. + 2 * rank), outputs(2, 1. + 2 * rank), .05)
    print(loss.center.tolist(), flush=True)
    dist.destroy_process_group()

mp.start_processes(main, ('file://ADDRESS',), 2, start_method='fork')
"""


def test_processes_share_one_center(tmp_path):
    "Teacher logits are 1 in one process and 3 in the other: both centres move from 0 half-way to 2."
    printed = run(TWO.replace('ADDRESS', str(tmp_path / 'rendezvous')))
    assert printed.count('[1.0, 1.0, 1.0, 1.0]') == 2  # both write to one pipe: lines may run together


# -- names


def test_star_import_gives_every_name():
    names = {}
    exec('from glsd.objectives import *', names)
    assert 'soft_cross_entropy' in glsd.objectives.__all__ and set(glsd.objectives.__all__) <= set(names)


def test_all_is_static():
    "A list of words that editors and type checkers can read."
    source = open(glsd.objectives.__file__, encoding='utf-8').read()
    assert "__all__ = ['ADCLR'" in source and 'globals()' not in source


def test_a_loss_imports_no_more_than_it_needs():
    code = (
        'import sys, glsd.objectives.dino; from glsd.objectives import GeometricLoss, soft_cross_entropy; '
        'print([m for m in ("timm", "matplotlib", "ipywidgets", "glsd.training", "glsd.evaluation") '
        'if m in sys.modules])'
    )
    # GeometricLoss is in the chapter of a method, which needs a backbone; a loss alone needs none
    alone = code.replace('from glsd.objectives import GeometricLoss, soft_cross_entropy; ', '')
    assert run(alone) == '[]\n'
    with_method = run(code)
    assert 'glsd.training' not in with_method and 'matplotlib' not in with_method


# -- every method


SMALL = dict(backbone='vit_mini', out_dim=32, head_hidden=16, head_bottleneck=8, view_queue=16, n_query=2)
CROPS = dict(global_size=32, local_size=16, n_local=1)
VALUES = dict(teacher_temp=0.04, momentum=0.9, frozen=0.0)


def small_method(name):
    cls = find_method(name)
    known = {*cls.Options.__dataclass_fields__, *cls.Views.__dataclass_fields__}
    values = {k: v for k, v in (SMALL | CROPS).items() if k in known}
    if cls.defaults.get('n_local') == 0:
        del values['n_local']  # it takes none
    if cls.__module__.startswith('glsd.masked.'):
        values |= {k: v for k, v in MASKED.items() if k in known} | files_named_by(name)
        values['backbone'] = plain_backbone(name)
    if name == 'deit':
        values |= dict(backbone=plain_backbone(name), teacher=deit_teacher(), n_global=1)
    classes = ToyWorld(1, size=32).classes
    return create_method(name, classes=classes, **values)


def batch_of(method, n=4):
    world = ToyWorld(n, size=32)
    images, labels = zip(*((world[i][0], world[i][1]) for i in range(n)))
    views = method.views(list(images), [np.random.default_rng(i) for i in range(n)])
    views.label = torch.tensor(labels)
    return views


@pytest.mark.parametrize('name', list_methods())
def test_every_method_in_a_loop_of_your_own(name):
    "The README's lines: views, a step, the gradient, the optimiser, what comes after; a backbone is left."
    method = small_method(name)
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-3)
    before = [p.clone() for p in method.parameters()]
    views = batch_of(method)
    terms = method.training_step(views, VALUES)
    sum(terms.values()).backward()
    method.after_backward(VALUES)
    optimizer.step()
    method.after_step(VALUES)
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, method.parameters()))
    features = method.backbone.eval()(views.crops[0][0])
    assert features.pooled.shape == (4, method.backbone.dim)


@pytest.mark.parametrize('name', list_methods())
def test_a_step_in_eval_mode_leaves_all_as_it_was(name):
    "No centre, queue or average moves: a monitor may look at a step without changing the run."
    method = small_method(name).eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with torch.no_grad():
        method.training_step(batch_of(method), VALUES)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
