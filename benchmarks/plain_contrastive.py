"Contrastive pieces written the usual way, one query, one round and one superpixel at a time."

import heapq
import math

import torch
import torch.nn.functional as F


def info_nce(queries, keys, negatives, temperature):
    "A loop over the queries."
    losses = []
    for q, k in zip(queries, keys):
        q, k = q / q.norm(), k / k.norm()
        scores = torch.cat([(q @ k)[None], negatives @ q]) / temperature
        losses.append(torch.logsumexp(scores, 0) - scores[0])
    return torch.stack(losses).mean()


def nearest(queue, z, k):
    "The rows with the largest cosine: everything normalised anew, everything sorted."
    cosines = F.normalize(z, dim=-1) @ F.normalize(queue, dim=-1).T
    index = cosines.argsort(dim=1, descending=True)[:, :k]
    return index, queue[index]


def sinkhorn(scores, temperature, iterations):
    "As it is usually printed: exponentials, then columns and rows in turn."
    Q = (scores / temperature).exp().T
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(iterations):
        Q /= Q.sum(1, keepdim=True)
        Q /= K
        Q /= Q.sum(0, keepdim=True)
        Q /= B
    return (Q * B).T


def paths(ways):
    "Dijkstra from every node of a list of {neighbour: length}."
    everything = []
    for start in range(len(ways)):
        known, waiting = {}, [(0.0, start)]
        while waiting:
            so_far, here = heapq.heappop(waiting)
            if here in known:
                continue
            known[here] = so_far
            for there, length in ways[here].items():
                if there not in known:
                    heapq.heappush(waiting, (so_far + length, there))
        everything.append([known[end] for end in range(len(ways))])
    return everything


def rbd(regions, diagonal):
    "Saliency of superpixels, by loops: the solution before it is scaled."
    joined = (regions.neighbours | (regions.border[:, None] & regions.border)).tolist()
    m = range(len(joined))
    length = [[math.dist(a, b) for b in regions.colours.tolist()] for a in regions.colours.tolist()]
    d = paths([{j: length[i][j] for j in m if joined[i][j]} for i in m])
    near = [[math.exp(-(d[i][j] ** 2) / 200) for j in m] for i in m]
    border, centres = regions.border.tolist(), regions.centres.tolist()
    touching = [sum(near[i][j] for j in m if border[j]) for i in m]
    background = [1 - math.exp(-(touching[i] ** 2) / sum(near[i]) / 2) for i in m]
    far = [[math.dist(centres[i], centres[j]) / diagonal for j in m] for i in m]
    contrast = [sum(d[i][j] * math.exp(-8 * far[i][j] ** 2) * background[j] for j in m) for i in m]
    low, high = min(contrast), max(contrast)
    contrast = [(x - low) / (high - low) for x in contrast]
    A = torch.zeros(len(d), len(d), dtype=torch.float64)
    for i in m:
        A[i, i] += background[i] + contrast[i]
        for j in regions.neighbours[i].nonzero()[:, 0].tolist():
            A[i, i] += near[i][j] + 0.1
            A[i, j] -= near[i][j] + 0.1
    return torch.linalg.solve(A, torch.tensor(contrast, dtype=torch.float64))
