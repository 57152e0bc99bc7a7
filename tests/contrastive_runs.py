"What the test files of the contrastive chapters share."

import numpy as np
import pytest
import torch

from glsd.data.toyworld import ToyWorld


def views_of(method, n):
    world = ToyWorld(n, size=32)
    return method.views([world[i][0] for i in range(n)], [np.random.default_rng(i) for i in range(n)])


def first_steps(method, steps, lr=2e-3, n=16):
    "Terms of some steps on one batch of n images."
    views, log = views_of(method, n), []
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=lr)
    schedules = method.schedules(steps)
    for step in range(steps):
        values = {name: float(array[step]) for name, array in schedules.items()}
        terms = method.training_step(views, values)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        method.after_backward(values)
        optimizer.step()
        method.after_step(values)
        log.append({name: value.item() for name, value in terms.items()})
        assert np.isfinite(list(log[-1].values())).all()
    return log


def one_line_from(call, *args, **kwargs):
    "The message of the ValueError of a call."
    with pytest.raises(ValueError) as e:
        call(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)
