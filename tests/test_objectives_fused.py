"""What the chapter cannot show about logits that are never stored: every setting, monitors, peak memory, processes."""
import subprocess, sys

import pytest
import torch
import torch.nn.functional as F

from glsd.backbones import create_backbone
from glsd.backbones.heads import Branch, Factored
from glsd.data.loading import make_loader
from glsd.data.toyworld import ToyWorld
from glsd.evaluation.collapse import collapse_figures
from glsd.objectives import SETTINGS, create_objective, soft_cross_entropy
from glsd.training.watching import flat_terms
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
    def branch(net, heads): return Branch(net, heads, objective.modules_of(net, **HEAD), fused=fused, **HEAD)
    student, teacher = branch(student_net, objective.heads), branch(create_backbone('vit_mini'), objective.teacher_heads)
    torch.manual_seed(1)                                                     # masks
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        with torch.no_grad(): t = teacher(views, objective.teacher_groups, objective.asks(views, teacher, teacher=True))
        s = student(views, asked=objective.asks(views, student))
        terms = objective(s, t, .05)
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
    flat = [flat_terms(*x[:4], .05) for x in ((objective, s, t, terms), dense)]
    assert flat[0] == flat[1]
    figures = []
    for o, student, teacher in ((objective, s, t), dense[:3]):
        torch.manual_seed(2)                                                 # partners that are dealt at random
        figures.append(collapse_figures(student, teacher, o, .05)['heads'])
    assert [*figures[0]] == distilled
    for head, expected in figures[1].items(): assert figures[0][head] == pytest.approx(expected, rel=1e-3, abs=1e-5)

def test_autocast(views):
    "bf16 products: the loss is near float32's, gradients of the prototypes are float32 and finite, the centre is float32's to bf16's precision."
    (objective, _, _, terms, grads), exact = step('geometric', views, True, amp=True), step('geometric', views, True)
    for head, term in terms.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(exact[3][head].item(), rel=.02)
        g, e = (x[f'heads.{head}.last_layer.weight'] for x in (grads, exact[4]))
        assert g.dtype == torch.float32 and ((g - e).norm() / e.norm()).item() < .1
        assert objective.terms[head].center.dtype == torch.float32

def test_only_what_is_asked_for():
    "No gradient where none is wanted: frozen prototypes, a frozen bottleneck, no_grad."
    torch.manual_seed(0)
    z, D = F.normalize(torch.randn(2, 6, 8), dim=-1), F.normalize(torch.randn(50, 8), dim=-1)
    teacher, W = Factored(z.detach().flip(1), D.detach()), torch.eye(6).expand(2, -1, -1)
    def grads(*wanted):
        x = [z.clone().requires_grad_(wanted[0]), D.clone().requires_grad_(wanted[1])]
        value = soft_cross_entropy(Factored(*x), teacher, W, .1, .05)
        value.backward()
        return value, x[0].grad, x[1].grad
    value, dz, dD = grads(True, True)
    assert grads(True, False)[2] is None and torch.equal(grads(True, False)[1], dz)
    assert grads(False, True)[1] is None and torch.equal(grads(False, True)[2], dD)
    with torch.no_grad(): assert torch.equal(soft_cross_entropy(Factored(z, D), teacher, W, .1, .05), value)
    twice = [D.clone().requires_grad_() for _ in '12']
    (3 * soft_cross_entropy(Factored(z, twice[0]), teacher, W, .1, .05)).backward()
    torch.testing.assert_close(twice[0].grad, 3 * dD)

def test_extreme_logits_stay_finite():
    "Directions with learned lengths are not bounded by 1."
    D = torch.tensor([[1e4], [-1e4], [0.]], requires_grad=True)
    z = torch.ones(1, 1, 1, requires_grad=True)
    loss = soft_cross_entropy(Factored(z, D), Factored(-torch.ones(1, 1, 1), D), torch.ones(1, 1, 1), .1, .04)
    loss.backward()
    assert loss.item() == pytest.approx(2e5) and D.grad.flatten().tolist() == [10, -10, 0]
