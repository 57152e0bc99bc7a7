"What the authors' code gave for small inputs (tests/golden), and how ours is compared with it."

import json
from pathlib import Path

import numpy as np
import torch


def golden(name):
    "The arrays of a file as tensors, and the options they were made with."
    with np.load(Path(__file__).parent / f'golden/{name}.npz') as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != 'meta'}
        return arrays, json.loads(str(z['meta']))


def doubled(arrays):
    "Floats in double precision."
    return {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}


def close(ours, theirs, tolerance=1e-5):
    "Equal up to a share of each entry of theirs and of the largest, which were rounded to float32."
    theirs = theirs.to(ours.dtype)
    atol = tolerance * float(theirs.abs().max())
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=atol)
