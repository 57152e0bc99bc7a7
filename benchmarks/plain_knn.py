"""Weighted k-NN as most code has it: for each k the whole search again, with a vote [queries, k, classes]."""

import torch


def plain_knn(bank, labels, queries, truth, ks, temperature=0.07, n_classes=100, chunk=100):
    "{k: top-1 in per cent}; features are unit vectors."
    return {k: plain_one(bank, labels, queries, truth, k, temperature, n_classes, chunk) for k in ks}


def plain_one(bank, labels, queries, truth, k, temperature, n_classes, chunk):
    right = 0
    for q, y in zip(queries.split(chunk), truth.split(chunk)):
        similarity, index = (q @ bank.T).topk(k)
        one_hot = torch.zeros(len(q), k, n_classes).scatter_(2, labels[index][..., None], 1)
        votes = (one_hot * (similarity / temperature).exp()[..., None]).sum(1)
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(queries)
