"""Floor 6 against the values of the authors' code (tests/golden): the same numbers in, the same out.

Sizes and options are read from the file."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / 'golden'


def golden(name):
    with np.load(GOLDEN / f'{name}.npz') as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != 'meta'}
        return arrays, json.loads(str(z['meta']))


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
