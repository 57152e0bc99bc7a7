"""Every method of floor 6: it learns on each backbone, goes on to the same bits, N processes do as one does.

A new one: its name here, its small options in `training_runs`."""

import math

import numpy as np
import pytest
import torch
from training_runs import apart, in_processes, same, small_recipe

from glsd.training import Trainer
from glsd.training.loop import batches
from glsd.training.processes import DistributedWorld, process_group
from glsd.training.trainer import build_dataset

METHODS = ['simclr', 'mocov2', 'mocov3', 'byol', 'swav', 'dilo', 'looc', 'nnclr']
# those that N processes compute as one does, to 1e-6
AS_ONE = ['simclr', 'mocov2', 'mocov3', 'byol', 'swav', 'dilo', 'looc', 'nnclr']
# what a loss is compared with, where its start is no measure: against a queue it rises while that is filled
UNLEARNED = {'mocov2': lambda recipe: 0.98 * math.log(1 + recipe.queue)}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(recipe, steps, trainer=None):
    "A trainer that has done so many steps, and their losses."
    data = build_dataset(recipe)
    trainer = trainer or Trainer(recipe, recipe.steps)
    found = batches(recipe, data, trainer.done, steps, trainer.method.views)
    return trainer, [trainer.step(views)['loss'] for views in found]


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini', 'resnet_mini'])
@pytest.mark.parametrize('method', METHODS)
def test_the_loss_falls(method, backbone):
    "In a world whose crops share much, which is learned quickly."
    recipe = small_recipe(method, backbone=backbone, data='toyworld-shared', batch_size=16, steps=20, lr=4e-3)
    _, losses = trained(recipe, 20)
    assert np.isfinite(losses).all()
    unlearned = UNLEARNED[method](recipe) if method in UNLEARNED else np.mean(losses[3:7])
    assert np.mean(losses[-4:]) < unlearned


@pytest.mark.parametrize('method', METHODS)
def test_it_goes_on_to_the_same_bits(method):
    recipe = small_recipe(method, drop_path=0.1)
    straight, losses = trained(recipe, 6)
    first, _ = trained(recipe, 3)
    second = Trainer(recipe, 6)
    second.load_state_dict(first.state_dict())
    second, rest = trained(recipe, 6, second)
    assert rest == losses[3:]
    assert same(straight.state_dict(), second.state_dict())


def follow(out):
    "In each process, four steps of each method; in double precision, so that no difference is rounding."
    torch.set_default_dtype(torch.float64)
    with process_group('cpu'):
        world = DistributedWorld()
        for method in AS_ONE:
            recipe = small_recipe(method, drop_path=0.0)
            if 'bn_group' in recipe.to_dict():  # groups depend on the number of processes
                recipe = recipe.replace(bn_group=0)
            trainer, losses = Trainer(recipe, 4, world), []
            for views in batches(recipe, build_dataset(recipe), 0, 4, trainer.method.views, world):
                views.crops = [c.double() for c in views.crops]
                losses.append(trainer.step(views)['loss'])
            if world.rank == 0:
                torch.save((losses, trainer.state_dict()['method']), out / f'{method}_{world.size}.pt')


@pytest.mark.slow
def test_two_processes_do_as_one_does(tmp_path):
    for n in 1, 2:
        in_processes(n, follow, tmp_path)
    for method in AS_ONE:
        (one, one_state), (two, two_state) = (torch.load(tmp_path / f'{method}_{n}.pt') for n in (1, 2))
        assert apart(one, two) < 1e-6 and apart(one_state, two_state) < 1e-6, method
        assert abs(one[-1] - one[0]) > 1e-3, method  # or the comparison would prove nothing


@pytest.mark.parametrize('method', METHODS)
def test_every_network_of_a_method_starts_from_given_weights(method):
    "A momentum encoder that kept random weights would make its keys with them for thousands of steps."
    made = Trainer(small_recipe(method), 6).method
    networks = [m for m in made.modules() if type(m) is type(made.backbone)]
    loaded = []
    made.load_backbone(loaded.append)
    assert {id(m) for m in loaded} == {id(m) for m in networks}
