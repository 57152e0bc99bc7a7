"DINO's ablation (its Table 7) equals the released code's values; Sinkhorn-Knopp serves DINO and SwAV alike."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from glsd.objectives.dino import sinkhorn

HERE = Path(__file__).parent / 'golden'


def golden(name):
    "Arrays as tensors, floats in double precision, and the options."
    z = np.load(HERE / f'{name}.npz')
    arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != 'meta'}
    return {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}, json.loads(
        str(z['meta'])
    )


DINO, META = golden('dino_ablation')
CONTRASTIVE, OTHER = golden('contrastive')
CLOSE = dict(rtol=1e-6, atol=2e-7)  # the values were stored in single precision


@pytest.mark.parametrize(
    'dtype, close', [(torch.float64, CLOSE), (torch.float32, dict(rtol=2e-5, atol=1e-6))]
)
@pytest.mark.parametrize('key', [k for k in DINO if k.startswith('sinkhorn_targets_it')])
def test_sinkhorn_equals_dinov2s(key, dtype, close):
    rounds = int(key.rpartition('it')[2])
    found = sinkhorn(DINO['teacher'].to(dtype), META['teacher_temp'], rounds)
    torch.testing.assert_close(found.double(), DINO[key], **close)


def test_sinkhorn_equals_swavs():
    o, prototypes = OTHER['swav'], CONTRASTIVE['swav_prototypes']
    for i in range(o['global_crops']):
        crop, queue = CONTRASTIVE[f'swav_crop{i}'], CONTRASTIVE['swav_queue'][i]
        for rows, name in ((crop, 'codes'), (torch.cat([queue, crop]), 'queue_codes')):
            codes = sinkhorn(rows @ prototypes.T, o['epsilon'], o['iterations'])[-len(crop) :]
            torch.testing.assert_close(codes, CONTRASTIVE[f'swav_{name}{i}'], **CLOSE)


@pytest.mark.parametrize(
    'scores, options, words',
    [
        ((2, 3, 4), {}, 'not \\(2, 3, 4\\)'),
        ((0, 4), {}, 'at least one row'),
        ((2, 4), dict(temperature=0), 'temperature > 0'),
        ((2, 4), dict(iterations=0), 'iterations >= 1'),
    ],
)
def test_sinkhorn_refuses(scores, options, words):
    with pytest.raises(ValueError, match=words) as error:
        sinkhorn(torch.zeros(scores), **options)
    assert '\n' not in str(error.value)


HALF = """
import sys, torch
from torch import distributed as dist
from glsd.objectives.dino import sinkhorn

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
torch.save(sinkhorn(rows.chunk(2)[rank], 0.1), f'{store}_{rank}.pt')
dist.barrier()
"""


def test_sinkhorn_of_two_processes_is_that_of_one(tmp_path):
    store = tmp_path / 'store'
    halves = [subprocess.Popen([sys.executable, '-c', HALF, str(rank), str(store)]) for rank in (0, 1)]
    assert [p.wait(60) for p in halves] == [0, 0]
    found = torch.cat([torch.load(f'{store}_{rank}.pt') for rank in (0, 1)])
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found, sinkhorn(rows, 0.1))
