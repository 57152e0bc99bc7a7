"""What the chapter cannot show about logits that are never stored: every setting, monitors, peak memory, processes."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from glsd.training.watching import flat_terms

from glsd.backbones import create_backbone
from glsd.backbones.heads import Branch, Factored
from glsd.data.loading import make_loader
from glsd.data.toyworld import ToyWorld
from glsd.evaluation.collapse import collapse_figures
from glsd.objectives import SETTINGS, create_objective, soft_cross_entropy
from glsd.training.loop import Trainer
from glsd.training.recipe import Recipe
from glsd.views.multicrop import MultiCrop

HEAD = dict(out_dim=96, hidden_dim=32, bottleneck_dim=16)


@pytest.fixture(scope='module')
def views():
    multicrop = MultiCrop(global_size=32, local_size=16, n_local=2, n_query=2, query_size=8)
    return next(iter(make_loader(ToyWorld(n=4, size=48), multicrop, 4)))


def step(name, views, fused, amp=False):
    "-> objective, student's and teacher's Outputs, terms, gradients of the student."
    torch.manual_seed(0)
    student_net = create_backbone('vit_mini')
    objective = create_objective(name, HEAD['out_dim'], given={'dim': student_net.dim})

    def branch(net, heads):
        return Branch(net, heads, objective.modules_of(net, **HEAD), fused=fused, **HEAD)

    student, teacher = (
        branch(student_net, objective.heads),
        branch(create_backbone('vit_mini'), objective.teacher_heads),
    )
    torch.manual_seed(1)  # masks
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        with torch.no_grad():
            t = teacher(views, objective.teacher_groups, objective.asks(views, teacher, teacher=True))
        s = student(views, asked=objective.asks(views, student))
        terms = objective(s, t, 0.05)
    sum(terms.values()).backward()
    return objective, s, t, terms, {k: p.grad for k, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('name', SETTINGS)
def test_every_setting_is_the_same_without_logits(name, views):
    "Terms, gradients of all parameters, centres, and what the monitors read."
    (objective, s, t, terms, grads), dense = (step(name, views, fused) for fused in (True, False))
    distilled = [k for k, term in objective.terms.items() if hasattr(term, 'center')]
    assert all(isinstance(out.logits[k], Factored) for out in (s, t) for k in distilled)
    assert not any(isinstance(x, Factored) for x in dense[1].logits.values())
    torch.testing.assert_close(terms, dense[3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, dense[4], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(objective.state_dict(), dense[0].state_dict(), rtol=1e-4, atol=1e-6)
    flat = [flat_terms(*x[:4], 0.05) for x in ((objective, s, t, terms), dense)]
    assert flat[0] == flat[1]
    figures = []
    for o, student, teacher in ((objective, s, t), dense[:3]):
        torch.manual_seed(2)  # partners that are dealt at random
        figures.append(collapse_figures(student, teacher, o, 0.05)['heads'])
    assert [*figures[0]] == distilled
    for head, expected in figures[1].items():
        assert figures[0][head] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_autocast(views):
    "bf16 products: the loss is near float32's, gradients of the prototypes are float32 and finite, the centre is float32's to bf16's precision."
    (objective, _, _, terms, grads), exact = (
        step('geometric', views, True, amp=True),
        step('geometric', views, True),
    )
    for head, term in terms.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(exact[3][head].item(), rel=0.02)
        g, e = (x[f'heads.{head}.last_layer.weight'] for x in (grads, exact[4]))
        assert g.dtype == torch.float32 and ((g - e).norm() / e.norm()).item() < 0.1
        assert objective.terms[head].center.dtype == torch.float32


def test_only_what_is_asked_for():
    "No gradient where none is wanted: frozen prototypes, a frozen bottleneck, no_grad."
    torch.manual_seed(0)
    z, D = F.normalize(torch.randn(2, 6, 8), dim=-1), F.normalize(torch.randn(50, 8), dim=-1)
    teacher, W = Factored(z.detach().flip(1), D.detach()), torch.eye(6).expand(2, -1, -1)

    def grads(*wanted):
        x = [z.clone().requires_grad_(wanted[0]), D.clone().requires_grad_(wanted[1])]
        value = soft_cross_entropy(Factored(*x), teacher, W, 0.1, 0.05)
        value.backward()
        return value, x[0].grad, x[1].grad

    value, dz, dD = grads(True, True)
    assert grads(True, False)[2] is None and torch.equal(grads(True, False)[1], dz)
    assert grads(False, True)[1] is None and torch.equal(grads(False, True)[2], dD)
    with torch.no_grad():
        assert torch.equal(soft_cross_entropy(Factored(z, D), teacher, W, 0.1, 0.05), value)
    twice = [D.clone().requires_grad_() for _ in '12']
    (3 * soft_cross_entropy(Factored(z, twice[0]), teacher, W, 0.1, 0.05)).backward()
    torch.testing.assert_close(twice[0].grad, 3 * dD)


def test_extreme_logits_stay_finite():
    "Directions with learned lengths are not bounded by 1."
    D = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    z = torch.ones(1, 1, 1, requires_grad=True)
    loss = soft_cross_entropy(
        Factored(z, D), Factored(-torch.ones(1, 1, 1), D), torch.ones(1, 1, 1), 0.1, 0.04
    )
    loss.backward()
    assert loss.item() == pytest.approx(2e5) and D.grad.flatten().tolist() == [10, -10, 0]


def test_a_recipe_switches_it_on():
    small = dict(backbone='vit_mini', out_dim=32, head_hidden=16, head_bottleneck=8, device='cpu')
    for fused in (True, False):
        trainer = Trainer(Recipe(**small, fused=fused), 4)
        assert trainer.student.fused == trainer.teacher.fused == fused


KERNELS = """
import torch, torch.nn.functional as F
from glsd.backbones.heads import Factored
from glsd.objectives.fused import kernel_cross_entropy, online_cross_entropy
from glsd.objectives import soft_cross_entropy
torch.manual_seed(0)
def unit(*shape): return F.normalize(torch.randn(*shape), dim=-1)
for B, S, T, K, b in [(2, 6, 20, 90, 16)]:
    z, D, teacher = unit(B, S, b).requires_grad_(), unit(K, b).requires_grad_(), Factored(unit(B, T, b), unit(K, b))
    W, center = torch.rand(B, S, T) * (torch.rand(B, S, T) < .2), .1 * torch.randn(K)
    found = []
    for way in soft_cross_entropy, online_cross_entropy, kernel_cross_entropy:
        loss = way(Factored(z, D), teacher, W, .1, .05, center)
        found.append((loss.detach(), *torch.autograd.grad(loss, (z, D))))
    for way in found[1:]: torch.testing.assert_close(way, found[0], rtol=1e-4, atol=1e-6)
print('same')
"""


def test_triton_kernels_in_the_interpreter():
    "Value and gradients of rows, columns and kernels; the student fills no block, the teacher and the prototypes more than one."
    pytest.importorskip('triton', reason='Triton is not installed: its kernels are not tested')
    run = subprocess.run(
        [sys.executable, '-c', KERNELS],
        capture_output=True,
        text=True,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
    )
    assert run.stdout == 'same\n', run.stderr[-1500:]


def resident():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def peak_megabytes(f):
    "The most resident memory during f, beyond what there was before, looked at from a thread."
    before, seen, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        f()
    finally:
        done.set()
        watcher.join()
    return max(seen)


@pytest.mark.skipif(sys.platform != 'linux', reason='resident memory is read from /proc')
def test_memory_does_not_grow_with_the_batch(capsys):
    "4 more images of 170 + 98 tokens and 32,768 prototypes need almost nothing, where stored logits of all 6 and their gradient are 345 MB."
    K, b, S, T = 32768, 64, 170, 98
    z, D, z_t = (torch.randn(*n, b) / 8 for n in ((6, S), (K,), (6, T)))
    W = torch.zeros(6, S, T).scatter_(2, torch.randint(T, (6, S, 1)), 1 / S)

    def way(B, logits):
        x = z[:B].clone().requires_grad_(), D.clone().requires_grad_()
        return lambda: soft_cross_entropy(logits(*x), logits(z_t[:B], D), W[:B], 0.1, 0.05).backward()

    way(1, Factored)()  # buffers that products keep
    few, many, dense = (
        peak_megabytes(way(*how)) for how in ((2, Factored), (6, Factored), (6, lambda z, D: z @ D.T))
    )
    with capsys.disabled():
        print(f' [{few:.0f} MB for 2 images, {many:.0f} for 6, with stored logits {dense:.0f}]', end='')
    assert many < few + 20 and dense > 5 * many
