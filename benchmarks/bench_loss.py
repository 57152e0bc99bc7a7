"""Seconds and peak megabytes of the dual loss, forward and backward. One contestant a process.

CONTESTANT=glsd and plain go from logits, which nobody reads again, to their gradient; fused, stored and
plain_z from the bottleneck through the last layer to the gradients of both factors: without stored logits,
glsd's loss with them, and the plain loss with them."""

import os
from dataclasses import replace

import common
import numpy as np
import torch

from glsd.objectives import DINOLoss, GeometricLoss, Objective
from glsd.objectives.branches import Outputs
from glsd.objectives.fused import Factored
from glsd.views.multicrop import MultiCrop


class Given(torch.autograd.Function):
    "Logits as a last layer hands them over; of the gradient that comes back, the norm is noted once."

    @staticmethod
    def forward(ctx, trigger, logits, name, norms):
        ctx.name, ctx.norms = name, norms
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, g):
        if ctx.name not in ctx.norms:
            ctx.norms[ctx.name] = g.norm().item()
        return None, None, None, None


def outputs(w_geo, grids, K):
    "`Outputs` of a branch with random logits. Drawn in place: the inputs themselves must not set the peak."
    B, V = w_geo.shape[:2]
    S = sum(H * W for H, W in grids)
    logits = {}
    for name, n in (('view', V), ('region', S)) if K else ():
        logits[name] = torch.empty(B, n, K).uniform_(-0.5, 0.5)
    return Outputs(torch.zeros(B, V, 1), torch.zeros(B, S, 1), grids, w_geo, logits)


def factors(student, teacher, K, b=256):
    """z of the student and the directions of its prototypes, by head.

    Both branches get logits that are not multiplied out yet."""
    leaves = {}
    for branch in student, teacher:
        for head, tokens in (('view', branch.pooled), ('region', branch.tokens)):
            pair = [torch.empty(*n, b).uniform_(-1, 1) for n in (tokens.shape[:2], (K,))]
            for x in pair:
                x.div_(x.norm(dim=-1, keepdim=True))
            if branch is student:
                leaves[head] = [x.requires_grad_() for x in pair]
            branch.logits[head] = Factored(*pair)
    return leaves


def dense(branch):
    return replace(branch, logits={k: v.dense() for k, v in branch.logits.items()})


def views(B):
    "w_geo [B, 10, 7] of B images of 500 x 375."
    draws = [MultiCrop().draw((375, 500), np.random.default_rng(i))[0] for i in range(B)]
    return torch.stack([torch.cat(groups) for groups in draws])


def contestant(name, K):
    "A function (student, teacher, teacher_temp) -> terms."
    if name in ('stored', 'plain_z'):
        loss = contestant(dict(stored='glsd', plain_z='plain')[name], K)
        return lambda s, t, temp: loss(dense(s), dense(t), temp)
    if name == 'plain':
        from plain_loss import plain_dual_loss

        return lambda s, t, temp: plain_dual_loss(s, t, 0.1, temp, torch.zeros(K), torch.zeros(K))
    # eval: the centres stay, so that every round computes the same
    objective = Objective(DINOLoss(K), GeometricLoss(K)).eval()
    return lambda s, t, temp: objective(s, t, temp, overwrite=True)


def main():
    quick = common.start(__doc__)
    B, K, rounds = (2, 1024, 1) if quick else (8, 65536, 5)
    w_geo, grids = views(B), [(7, 7)] * 2 + [(3, 3)] * 8
    name = os.environ.get('CONTESTANT', 'glsd')
    width = 0 if name in ('fused', 'stored', 'plain_z') else K
    student, teacher = outputs(w_geo, grids, width), outputs(w_geo[:, :2], grids[:2], width)
    loss, found, norms, drawn = contestant(name, K), {}, {}, student.logits
    leaves = {} if width else factors(student, teacher, K)
    trigger = torch.zeros((), requires_grad=True)

    def step():
        for xs in leaves.values():
            for x in xs:
                x.grad = None
        if width:
            student.logits = {k: Given.apply(trigger, x, k, norms) for k, x in drawn.items()}
        terms = loss(student, teacher, 0.04)
        sum(terms.values()).backward()
        for k, v in terms.items():
            found.setdefault(k, v.item())  # glsd's later rounds read the gradients of the first

    before = common.peak_memory()
    t = common.interleaved(dict(step=step), rounds)
    common.emit(
        seconds=t['step'],
        megabytes=(common.peak_memory() - before) / 1e6,
        inputs_mb=before / 1e6,
        gradient=norms['region'] if width else leaves['region'][-1].grad.norm().item(),
        batch=B,
        prototypes=K,
        **found,
    )


if __name__ == '__main__':
    main()
