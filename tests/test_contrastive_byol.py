"BYOL: the authors' values, what collapses and what does not, bad input. See test_contrastive_methods, too."

import pytest
import torch
from contrastive_runs import first_steps, one_line_from, views_of
from golden_values import close, golden
from training_runs import one_line

from glsd.contrastive import byol_loss
from glsd.contrastive.byol import unit_distance, unit_spread
from glsd.evaluation.collapse import effective_rank, feature_figures, feature_std
from glsd.objectives import create_method
from glsd.training import Recipe

SMALL = dict(backbone='vit_mini', global_size=32, projector_hidden=32, projector_dim=16)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(dtype, tolerance):
    z, _ = golden('contrastive')
    p1, p2, z1, z2 = (z[name].to(dtype).requires_grad_() for name in ('p1', 'p2', 'z1', 'z2'))
    loss = byol_loss(p1, p2, z1, z2)
    loss.backward()
    close(loss, z['byol_loss'], tolerance)
    close(p1.grad, z['byol_grad0'], 10 * tolerance)
    close(p2.grad, z['byol_grad1'], 10 * tolerance)
    assert z1.grad is None and z2.grad is None


def test_distance_under_autocast_is_that_of_float32():
    p, z = torch.randn(2, 8, 16)
    with torch.autocast('cpu', torch.bfloat16):
        assert unit_distance(p, z) == unit_distance(p.float(), z)
        assert unit_distance(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_spread_is_that_of_the_collapse_report():
    x = torch.randn(40, 16) + 1.0
    assert abs(unit_spread(x) - feature_std(x)) < 1e-6
    assert unit_spread(torch.ones(40, 16)) < 1e-6 and effective_rank(torch.ones(40, 16)) < 1.001


@pytest.mark.parametrize(
    'options, alive',
    [(dict(momentum=0.0), True), (dict(momentum=0.0, stop_gradient=False, predictor=False), False)],
)
def test_only_what_must_collapse_does(options, alive):
    "And `stuck` names it, and the collapse report's own figures say the same of the projections."
    torch.manual_seed(0)
    method = create_method('byol', **SMALL | options)
    first_steps(method, 30, lr=1e-2, n=16)
    with torch.no_grad():
        z = method.online(views_of(method, 32).crops[0][0])
    figures = feature_figures(z)['pooled']
    assert abs(figures['std'] - unit_spread(z)) < 1e-5
    assert (figures['std'] > 0.3) == alive and (figures['rank'] > 3) == alive
    assert bool(method.stuck(views_of(method, 32), {})) != alive


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(n_local=2), 'set n_global=2 and n_local=0, not n_global=2, n_local=2'),
        (dict(n_global=1), 'set n_global=2 and n_local=0, not n_global=1, n_local=0'),
        (dict(stop_gradient=False), 'a moving average receives no gradient; set momentum=0'),
        (dict(momentum=1.5), 'momentum must be a share between 0 and 1'),
        (dict(predicter=False), "did you mean 'predictor'"),
    ],
)
def test_bad_options_are_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as e:
        Recipe('byol', **wrong)
    assert one_line(e)
    if 'momentum' not in wrong:
        assert words in one_line_from(create_method, 'byol', **SMALL | wrong)
