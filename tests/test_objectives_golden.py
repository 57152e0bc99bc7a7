"""Losses, gradients and centres equal the reference implementation's, computed once on random inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glsd.objectives import DINOLoss, GeometricLoss, SimilarityLoss
from glsd.objectives.branches import Objective, Outputs

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / 'golden/glsd_loss.npz').items()}
GRIDS = [(7, 7)] * 2 + [(3, 3)] * 8
ONE = [(1, 1)] * 10  # the global head: one row a view


def batch_first(rows, grids, batch=2):
    "Rows ordered by view, image, token -> [batch, all tokens of an image, d]."
    sizes = [h * w for h, w in grids]
    views = rows.split([batch * n for n in sizes])
    return torch.cat([view.unflatten(0, (batch, n)) for view, n in zip(views, sizes)], 1)


def outputs(side, n_views):
    pooled, tokens, region = (
        batch_first(GOLDEN[f'{side}_{k}'], g[:n_views])
        for k, g in (('cls', ONE), ('tokens', GRIDS), ('region', GRIDS))
    )
    w_geo = GOLDEN['w_geo'].transpose(0, 1)[:, :n_views]
    return Outputs(pooled, tokens, GRIDS[:n_views], w_geo, {'view': pooled, 'region': region})


@pytest.mark.parametrize(
    'golden, local, options',
    [
        ('vanilla', None, {}),
        ('distance', GeometricLoss, {}),
        ('distance_nothreshold', GeometricLoss, dict(threshold=False)),
        ('similarity', SimilarityLoss, {}),
    ],
)
def test_equals_the_reference(golden, local, options):
    student, teacher = outputs('student', 10), outputs('teacher', 2)
    for logits in student.logits.values():
        logits.requires_grad_()
    terms = [local(64, weight=0.5, **options)] if local else []  # the reference: both terms times 1/2
    objective = Objective(DINOLoss(64, weight=0.5 if local else 1.0), *terms)
    centers = {'view': 'center', 'region': 'center_region'}
    for head, term in objective.terms.items():
        term.center.copy_(GOLDEN[centers[head]][0])

    terms = objective(student, teacher, GOLDEN['teacher_temp'].item())
    sum(terms.values()).backward()

    grads = {'view': ('grad_cls', ONE), 'region': ('grad_region', GRIDS)}
    for head, term in objective.terms.items():
        key, grids = grads[head]
        close = dict(rtol=1e-5, atol=0.0)
        torch.testing.assert_close(terms[head].double(), GOLDEN[f'{golden}_{head}'], **close)
        torch.testing.assert_close(term.center, GOLDEN[f'{centers[head]}_after'][0], rtol=1e-5, atol=1e-7)
        grad = batch_first(GOLDEN[f'{golden}_{key}'], grids)
        atol = 1e-5 * grad.abs().max().item()
        torch.testing.assert_close(student.logits[head].grad, grad, rtol=1e-5, atol=atol)


def test_other_direction_and_scale_differ():
    "Options matter: the paper's direction and its plain sum give other numbers than the reference's."
    student, teacher = outputs('student', 10), outputs('teacher', 2)

    def region(**options):
        return GeometricLoss(64, **options).eval()(student, teacher, 0.05).item()

    assert region(weight=0.5) == pytest.approx(region() / 2)
    assert abs(region(search='teacher') / region() - 1) > 0.01
