"""Seconds of k-NN with four values of k: glsd, the plain way, and the one matrix product that neither can
avoid."""

import common
import torch
import torch.nn.functional as F
from plain_knn import plain_knn

from glsd.evaluation.knn import knn_accuracy


def features(n, centres):
    "Unit vectors [n, d] around their class's centre, and labels [n]."
    labels = torch.randint(len(centres), (n,))
    return F.normalize(centres[labels] + 4 * torch.randn(n, centres.shape[1]), dim=1), labels


def main():
    quick = common.start(__doc__)
    (n, m, rounds), ks = ((500, 2000, 1) if quick else (10_000, 50_000, 3)), (10, 20, 100, 200)
    centres = torch.randn(100, 384)
    bank, labels = features(m, centres)
    queries, truth = features(n, centres)
    found = {}
    glsd = lambda: found.update(glsd=knn_accuracy(bank, labels, queries, truth, ks))
    plain = lambda: found.update(plain=plain_knn(bank, labels, queries, truth, ks))
    times = common.interleaved(dict(product=lambda: queries @ bank.T, glsd=glsd), rounds, warm_up=0)
    common.emit(
        **times,
        plain=common.seconds(plain),
        queries=n,
        bank=m,
        dim=384,
        accuracy=list(found['glsd'].values()),
        accuracy_plain=list(found['plain'].values()),
    )


if __name__ == '__main__':
    main()
