"InfoNCE beside lightly's and a loop, neighbours in a queue, Sinkhorn-Knopp and saliency beside plain ones."

import math

import common
import plain_contrastive as plain
import torch
import torch.nn.functional as F

from glsd.contrastive.infonce import info_nce
from glsd.contrastive.memory_bank import MemoryBank
from glsd.contrastive.saliency import rbd_steps, regions_of, superpixels
from glsd.data.toyworld import ToyWorld
from glsd.experiments.setup import kept_bytes
from glsd.objectives.dino import sinkhorn

TEMPERATURE = 0.2


def lightly_loss(negatives):
    "lightly's NT-Xent with its memory bank filled with our negatives, or None without lightly."
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        return None
    loss = NTXentLoss(TEMPERATURE, memory_bank_size=tuple(negatives.shape))
    loss.memory_bank.bank = negatives.clone()
    return loss


def forward_backward(loss, q, k):
    def step():
        q.grad = None
        loss(q, k).backward()

    return step


def compare_losses(quick, rounds):
    n, few, K, dim = (64, 16, 1024, 32) if quick else (4096, 64, 65_536, 128)
    q, k = torch.randn(n, dim, requires_grad=True), torch.randn(n, dim)
    negatives = F.normalize(torch.randn(K, dim), dim=-1)
    losses = dict(glsd=lambda q, k: info_nce(q, k, negatives, TEMPERATURE))
    theirs = lightly_loss(negatives)
    if theirs:
        losses['lightly'] = theirs
    values = {name: float(loss(q.detach(), k)) for name, loss in losses.items()}
    leave_out = [q, k, negatives]
    kept = {name: kept_bytes(lambda f=f: f(q, k), leave_out)[0] for name, f in losses.items()}
    seconds = common.interleaved({name: forward_backward(f, q, k) for name, f in losses.items()}, rounds)
    some, keys = q[:few].detach().requires_grad_(), k[:few]
    loops = dict(glsd=losses['glsd'], plain=lambda q, k: plain.info_nce(q, k, negatives, TEMPERATURE))
    by_loop = common.interleaved({name: forward_backward(f, some, keys) for name, f in loops.items()}, rounds)
    values['loop'] = [float(f(some.detach(), keys)) for f in loops.values()]
    return dict(batch=n, queue=K, few=few, values=values, kept=kept, seconds=seconds, loop=by_loop)


def compare_queues(quick, rounds):
    size, dim, n = (2048, 32, 64) if quick else (98_304, 256, 256)
    bank, z = MemoryBank(size, dim, normalize=True), torch.randn(n, dim)
    bank.enqueue(torch.randn(size, dim))
    contestants = dict(glsd=lambda: bank.nearest(z), plain=lambda: plain.nearest(bank.rows, z, 1))
    same = bool((contestants['glsd']()[0] == contestants['plain']()[0]).all())
    return dict(size=size, dim=dim, batch=n, same=same, seconds=common.interleaved(contestants, rounds))


def compare_sinkhorns(quick, rounds):
    n, K = (64, 128) if quick else (512, 3000)
    scores = F.normalize(torch.randn(n, 64), dim=-1) @ F.normalize(torch.randn(64, K), dim=0)
    contestants = dict(glsd=lambda: sinkhorn(scores, 0.05, 3), plain=lambda: plain.sinkhorn(scores, 0.05, 3))
    apart = float((contestants['glsd']() - contestants['plain']()).abs().max())
    return dict(batch=n, prototypes=K, apart=apart, seconds=common.interleaved(contestants, rounds))


def compare_saliencies(quick, rounds):
    size, n = (48, 40) if quick else (96, 250)
    image = ToyWorld(1, size=size)[0][0]
    segments = superpixels(image, n)
    regions, diagonal = regions_of(image, segments), math.hypot(size, size)
    contestants = dict(glsd=lambda: rbd_steps(image, segments), plain=lambda: plain.rbd(regions, diagonal))
    apart = float((contestants['glsd']().solution - contestants['plain']()).abs().max())
    found = common.interleaved(contestants, rounds)
    return dict(size=size, superpixels=len(regions.border), apart=apart, seconds=found)


def main():
    quick = common.start(__doc__)
    rounds = 1 if quick else 3
    common.emit(
        infonce=compare_losses(quick, rounds),
        queue=compare_queues(quick, rounds),
        sinkhorn=compare_sinkhorns(quick, rounds),
        rbd=compare_saliencies(quick, rounds),
    )


if __name__ == '__main__':
    main()
