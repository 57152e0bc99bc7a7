"LeJEPA, SimDINO and Gram anchoring equal the authors' values, train, go on bit for bit and share a batch."

import numpy as np
import pytest
import torch
from golden_values import close, doubled, golden
from torch import distributed as dist
from training_runs import in_processes, same

from glsd.contrastive.gram import NEGATIVES, gram_loss
from glsd.contrastive.sigreg import bcs_loss, epps_pulley, invariance, lejepa_loss, sigreg
from glsd.contrastive.simdino import coding_rate, compression, expansion, simdino_loss
from glsd.objectives import create_method
from glsd.training import Recipe, Trainer
from glsd.training.loop import batches
from glsd.training.processes import process_group
from glsd.training.trainer import build_dataset

STORED, META = golden('newer')
NEWER = doubled(STORED)


def equal(found, key):
    close(found, NEWER[key], 1e-6)


def test_sigreg_equals_lejepas():
    o, directions = META['sigreg'], NEWER['sigreg_directions']
    z = NEWER['sigreg_projections'].clone().requires_grad_()
    t = torch.linspace(0, o['t_max'], o['points'], dtype=torch.float64)
    equal(2 * o['samples'] * epps_pulley(z @ directions, t), 'sigreg_statistics')
    loss = sigreg(z, directions, o['points'], o['t_max'])
    equal(loss, 'sigreg_loss')
    equal(torch.autograd.grad(loss, z)[0], 'sigreg_grad')
    equal(invariance(z), 'lejepa_invariance')
    loss = lejepa_loss(z, directions, o['lamb'])
    equal(loss, 'lejepa_loss')
    equal(torch.autograd.grad(loss, z)[0], 'lejepa_grad')


def test_the_statistic_equals_eb_jepas():
    o = META['bcs']
    views = [NEWER['sigreg_projections'][v].clone().requires_grad_() for v in o['views']]
    loss = bcs_loss(*views, NEWER['sigreg_directions'], o['weight'], o['points'])
    equal(loss, 'bcs_loss')
    for i, grad in enumerate(torch.autograd.grad(loss, views)):
        equal(grad, f'bcs_grad{i}')


@pytest.mark.parametrize('i', range(len(META['simdino']['cases'])))
def test_simdino_equals_both_versions(i):
    case = META['simdino']['cases'][i]
    s, t = NEWER['simdino_student'].clone().requires_grad_(), NEWER['simdino_teacher']
    options = dict(eps=case['eps'], with_teacher=case['expa_type'] == 1)
    cosine = case['version'] == 1
    torch.testing.assert_close(
        compression(s, t, cosine), NEWER[f'simdino{i}_compression'], rtol=1e-5, atol=1e-8
    )
    equal(expansion(s, t, **options), f'simdino{i}_expansion')
    loss = simdino_loss(s, t, case['coeff'], cosine=cosine, **options)
    equal(loss, f'simdino{i}_loss')
    equal(torch.autograd.grad(loss, s)[0], f'simdino{i}_grad')


def test_gram_equals_dinov3s():
    "Of the gradients some files hold, for each case, the sum of all: their five arrays are one and the same."
    found = []
    for i, case in enumerate(META['gram']):
        negatives = 'drop_teacher' if case['remove_only_teacher_neg'] else 'keep'
        negatives = 'drop' if case['remove_neg'] else negatives
        s = NEWER['gram_student'].clone().requires_grad_()
        loss = gram_loss(s, NEWER['gram_teacher'], case['img_level'], case['apply_norm'], negatives)
        equal(loss, f'gram{i}_loss')
        found.append(torch.autograd.grad(loss, s)[0])
    stored = [NEWER[f'gram{i}_grad'] for i in range(len(found))]
    if all(torch.equal(grad, stored[0]) for grad in stored):
        found = [sum(found)] * len(found)
    for i, grad in enumerate(found):
        equal(grad, f'gram{i}_grad')


@pytest.mark.parametrize('negatives', NEGATIVES)
def test_the_gradient_of_gram_is_that_of_differences(negatives):
    s, t = NEWER['gram_student'].clone().requires_grad_(), NEWER['gram_teacher']
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, t, negatives=negatives), s)


@pytest.mark.parametrize(
    'name, options, words',
    [
        ('lejepa', dict(sigreg_weight=1.0), 'sigreg_weight=1 must lie between 0 and 1'),
        ('simdino', dict(view_eps=0.0), 'view_eps=0.0'),
        ('gram', dict(gram_start=1.0), 'gram_start=1 must lie in'),
        ('gram', dict(gram_every=0.0), 'gram_every=0 above 0'),
    ],
)
def test_bad_options_are_refused_in_one_line(name, options, words):
    with pytest.raises(ValueError, match=words) as error:
        create_method(name, backbone='vit_mini', **{'out_dim': 16, **options} if name == 'gram' else options)
    assert '\n' not in str(error.value)


def test_bad_tensors_are_refused_in_one_line():
    x = torch.zeros(2, 4, 3)
    for call, words in (
        (lambda: sigreg(x, torch.zeros(5, 2)), 'directions'),
        (lambda: gram_loss(x, x[:, :2]), 'do not pair up'),
        (lambda: gram_loss(x, x, negatives='all'), "negatives='all'"),
        (lambda: simdino_loss(x, x, eps=-1.0), 'eps > 0'),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert '\n' not in str(error.value)


OWN = dict(
    lejepa=dict(directions=32, projector_hidden=32, projector_dim=8),
    simdino=dict(view_hidden=32, view_width=16, momentum=0.9),
    gram=dict(out_dim=32, head_hidden=32, head_bottleneck=16, gram_start=0.3, momentum=0.9),
)


def recipe_of(name, **changes):
    small = dict(
        n_images=32, image_size=32, global_size=32, local_size=16, n_local=1, backbone='vit_mini',
        drop_path=0.0, batch_size=8, steps=6, lr=0.02, warmup=0.0, device='cpu',
    )  # fmt: skip
    return Recipe(name, **small | OWN[name] | changes)


def trained(recipe, start=0, end=None, state=None):
    trainer = Trainer(recipe, recipe.steps)
    if state:
        trainer.load_state_dict(state)
    end = end or recipe.steps
    logs = [trainer.step(v) for v in batches(recipe, build_dataset(recipe), start, end, trainer.method.views)]
    return trainer, logs


@pytest.mark.parametrize('backbone', ['vit_mini', 'swin_mini', 'resnet_mini'])
@pytest.mark.parametrize('name', OWN)
def test_terms_are_finite_on_each_backbone(name, backbone):
    _, logs = trained(recipe_of(name, backbone=backbone), end=2)
    assert all(np.isfinite(log['loss']) for log in logs)


@pytest.mark.parametrize('name', ['lejepa', 'simdino'])
def test_the_loss_falls(name):
    _, logs = trained(recipe_of(name, n_images=8, steps=12, lr=0.05))
    assert logs[-1]['loss'] < logs[0]['loss']


@pytest.mark.parametrize('name', OWN)
def test_a_run_that_was_cut_goes_on_bit_for_bit(name):
    recipe = recipe_of(name)
    whole = trained(recipe)[0].state_dict()
    half = trained(recipe, end=3)[0].state_dict()
    assert same(trained(recipe, 3, None, half)[0].state_dict(), whole)


def test_the_anchor_stays_while_the_teacher_moves():
    method = trained(recipe_of('gram'))[0].method
    pairs = zip(method.anchor.parameters(), method.teacher.backbone.parameters())
    assert any(not torch.equal(a, t) for a, t in pairs)
    assert not any('anchor' in name for name, p in method.named_parameters() if p.requires_grad)


# each process has half of the samples; the mean of their gradients is that of one process
def loss_of(w, rank=0, n=1):
    "Of a process's share of the images; the directions are the same."
    g = torch.Generator().manual_seed(0)
    z, A = torch.randn(2, 8, 4, generator=g).double(), torch.randn(4, 3, generator=g).double()
    mine = z.chunk(n, 1)[rank] @ w
    return sigreg(mine, A) - coding_rate(mine).mean()


def half_of_a_step(out):
    with process_group('cpu'):
        rank, w = dist.get_rank(), torch.eye(4).double().requires_grad_()
        loss = loss_of(w, rank, 2)
        loss.backward()
        dist.all_reduce(w.grad)
        torch.save((loss.detach(), w.grad / 2), out / f'{rank}.pt')


def test_two_processes_compute_what_one_does(tmp_path):
    in_processes(2, half_of_a_step, tmp_path)
    w = torch.eye(4).double().requires_grad_()
    loss = loss_of(w)
    loss.backward()
    for rank in (0, 1):
        value, grad = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(grad, w.grad)
