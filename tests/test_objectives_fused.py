"What the chapter cannot show about logits that are never stored: every method, monitors, memory."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from meters import Meter

from glsd.data.toyworld import ToyWorld
from glsd.evaluation.collapse import collapse_figures
from glsd.objectives import create_method, find_method, list_methods, soft_cross_entropy
from glsd.objectives.fused import Factored
from glsd.objectives.self_distillation import SelfDistillation, uniform_terms

SMALL = dict(
    backbone='vit_mini',
    drop_path=0.0,
    global_size=32,
    local_size=16,
    n_local=2,
    out_dim=96,
    head_hidden=32,
    head_bottleneck=16,
)
MORE = dict(n_query=2, view_queue=16, view_hidden=32, view_width=16, patch_hidden=32, patch_width=16)
NAMES = [name for name in list_methods() if issubclass(find_method(name), SelfDistillation)]


def create(name, fused):
    "A method with its small options, drawn from the same numbers whether fused or not."
    torch.manual_seed(0)
    known = find_method(name).Options.__dataclass_fields__
    return create_method(name, fused=fused, **SMALL, **{k: v for k, v in MORE.items() if k in known})


def step(name, fused, amp=False):
    "-> objective, student's and teacher's Outputs, terms, gradients of the student."
    method, world = create(name, fused), ToyWorld(n=4, size=48)
    images = [world[i][0] for i in range(4)]
    views = method.views(images, [np.random.default_rng(i) for i in range(4)])
    torch.manual_seed(1)  # masks
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        s, t = method.outputs(views)
        terms = method.objective(s, t, 0.05)
    sum(terms.values()).backward()
    grads = {k: p.grad for k, p in method.student.named_parameters() if p.grad is not None}
    return method.objective, s, t, terms, grads


@pytest.mark.parametrize('name', NAMES)
def test_every_method_is_the_same_without_logits(name):
    "Terms, gradients of all parameters, centres, and what the monitors read."
    (objective, s, t, terms, grads), dense = (step(name, fused) for fused in (True, False))
    distilled = [k for k, term in objective.terms.items() if hasattr(term, 'center')]
    assert all(isinstance(out.logits[k], Factored) for out in (s, t) for k in distilled)
    assert not any(isinstance(x, Factored) for x in dense[1].logits.values())
    torch.testing.assert_close(terms, dense[3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, dense[4], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(objective.state_dict(), dense[0].state_dict(), rtol=1e-4, atol=1e-6)
    objective.eval()
    dense[0].eval()
    assert uniform_terms(objective, s, t, 0.05) == uniform_terms(*dense[:3], 0.05)
    figures = []
    for sides in (objective, s, t), dense[:3]:
        torch.manual_seed(2)  # matches that are shuffled
        figures.append(collapse_figures(sides[1], sides[2], sides[0], 0.05)['heads'])
    assert [*figures[0]] == distilled
    for head, expected in figures[1].items():
        assert figures[0][head] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_autocast():
    "bf16 products: the loss is near float32's, gradients of the prototypes are float32, so is the centre."
    (objective, _, _, terms, grads), exact = step('geometric', True, amp=True), step('geometric', True)
    for head, term in terms.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(exact[3][head].item(), rel=0.02)
        g, e = (x[f'heads.{head}.last_layer.weight'] for x in (grads, exact[4]))
        assert g.dtype == torch.float32 and ((g - e).norm() / e.norm()).item() < 0.1
        assert objective.terms[head].center.dtype == torch.float32


def test_only_gradients_that_are_wanted():
    "None for frozen prototypes, for a frozen bottleneck, under no_grad."
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
    again = D.clone().requires_grad_()
    (3 * soft_cross_entropy(Factored(z, again), teacher, W, 0.1, 0.05)).backward()
    torch.testing.assert_close(again.grad, 3 * dD)


def test_extreme_logits_stay_finite():
    "Directions with learned lengths are not bounded by 1."
    D = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    z, W = torch.ones(1, 1, 1, requires_grad=True), torch.ones(1, 1, 1)
    loss = soft_cross_entropy(Factored(z, D), Factored(-torch.ones(1, 1, 1), D), W, 0.1, 0.04)
    loss.backward()
    assert loss.item() == pytest.approx(2e5) and D.grad.flatten().tolist() == [10, -10, 0]


@pytest.mark.parametrize('change, message', [(dict(T=3), 'need W'), (dict(K=7), 'same batch and prototypes')])
def test_wrong_input_is_one_line(change, message):
    sizes = dict(T=4, K=9) | change
    student = Factored(torch.randn(2, 5, 8), torch.randn(9, 8))
    teacher = Factored(torch.randn(2, sizes['T'], 8), torch.randn(sizes['K'], 8))
    with pytest.raises(ValueError, match=message) as e:
        soft_cross_entropy(student, teacher, torch.rand(2, 5, 4), 0.1, 0.05)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('fused', [True, False])
def test_a_recipe_switches_it_on(fused):
    from glsd.training import Recipe
    from glsd.training.trainer import Trainer

    small = dict(backbone='vit_mini', out_dim=32, head_hidden=16, head_bottleneck=8, device='cpu')
    method = Trainer(Recipe('geometric', fused=fused, **small), 4).method
    for branch in method.student, method.teacher:
        assert (branch.make_logits is Factored) == fused


def test_memory_does_not_grow_with_the_batch():
    "Two more images of 170 + 98 tokens need almost nothing; stored logits of all three 170 MB."
    K, b, S, T = 32768, 64, 170, 98
    z, D, z_t = (torch.randn(*n, b) / 8 for n in ((3, S), (K,), (3, T)))
    W = torch.zeros(3, S, T).scatter_(2, torch.randint(T, (3, S, 1)), 1 / S)

    def megabytes(B, logits):
        x = z[:B].clone().requires_grad_(), D.clone().requires_grad_()
        with Meter(*x, z_t, D, W) as meter:
            loss = soft_cross_entropy(logits(*x), logits(z_t[:B], D), W[:B], 0.1, 0.05)
            torch.autograd.grad(loss, x)
        return meter.peak / 1e6

    few, many, dense = megabytes(1, Factored), megabytes(3, Factored), megabytes(3, lambda z, D: z @ D.T)
    assert many < few + 2 and dense > 2 * many
