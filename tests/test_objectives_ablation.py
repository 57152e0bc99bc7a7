"DINO's ablation (its Table 7) equals the released code's values; Sinkhorn-Knopp serves DINO and SwAV alike."

from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
from golden_values import doubled, golden
from torch import distributed as dist
from training_runs import in_processes

from glsd.objectives import create_method, list_methods, soft_cross_entropy
from glsd.objectives.ablation import DINO_TABLE_7, AblationLoss, distillation_targets
from glsd.objectives.dino import sinkhorn
from glsd.training import Recipe, Trainer
from glsd.training.loop import batches
from glsd.training.processes import process_group
from glsd.training.trainer import build_dataset

(DINO, META), (CONTRASTIVE, OTHER) = golden('dino_ablation'), golden('contrastive')
DINO, CONTRASTIVE = doubled(DINO), doubled(CONTRASTIVE)
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


def rows_of_all():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()


def half_of_sinkhorn(out):
    with process_group('cpu'):
        rank = dist.get_rank()
        torch.save(sinkhorn(rows_of_all().chunk(2)[rank], 0.1), out / f'{rank}.pt')


def test_sinkhorn_of_two_processes_is_that_of_one(tmp_path):
    in_processes(2, half_of_sinkhorn, tmp_path)
    found = torch.cat([torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)])
    torch.testing.assert_close(found, sinkhorn(rows_of_all(), 0.1))


def batch_first(rows):
    "View by view to image by image: [V*B, K] -> [B, V, K]."
    return rows.unflatten(0, (-1, META['images'])).transpose(0, 1).contiguous()


def sides():
    "Student and teacher outputs with the stored logits, the student's with a gradient."
    student, teacher = DINO['student'].clone().requires_grad_(), DINO['teacher']
    return student, *(NS(logits={'view': batch_first(rows)}) for rows in (student, teacher))


@pytest.mark.parametrize(
    'key, options',
    [
        ('center', {}),
        ('sinkhorn', dict(targets='sinkhorn')),
        ('unofficial_mse_probabilities', dict(compare='mse')),
        ('unofficial_mse_normalised', dict(compare='mse_unit')),
    ],
)
def test_losses_and_gradients_equal_the_stored_ones(key, options):
    rows, student, teacher = sides()
    K, temperature = META['prototypes'], META['teacher_temp']
    term = AblationLoss(K, student_temp=META['student_temp'], center_momentum=META['momentum'], **options)
    term = term.double()
    term.center.copy_(DINO['center'][0])
    loss = term(student, teacher, temperature)
    loss.backward()
    torch.testing.assert_close(loss, DINO[f'{key}_loss'], rtol=1e-6, atol=0.0)
    grad = DINO[f'{key}_grad']
    torch.testing.assert_close(rows.grad, grad, rtol=0.0, atol=1e-6 * float(grad.abs().max()))
    if key == 'center':
        torch.testing.assert_close(term.center, DINO['center_after'][0], **CLOSE)


@pytest.mark.parametrize(
    'targets, key',
    [
        ('center', 'center_targets'),
        ('center', 'dinov2_center_targets'),
        ('sinkhorn_each', 'sinkhorn_targets_each_view'),
    ],
)
def test_targets_equal_the_stored_ones(targets, key):
    logits, center = batch_first(DINO['teacher']), DINO['center'][0]
    found = distillation_targets(logits, META['teacher_temp'], targets, center)
    torch.testing.assert_close(found, batch_first(DINO[key]), **CLOSE)


def test_dinov2s_sums_are_the_same_core_with_other_weights():
    "It adds up what DINO averages; both global views stand against the swapped targets as one long batch."
    student, teacher = batch_first(DINO['student']), batch_first(DINO['teacher'])
    V, T, temps = META['student_views'], META['teacher_views'], (META['student_temp'], META['teacher_temp'])
    targets = distillation_targets(teacher, temps[1], 'sinkhorn').log() * temps[1]

    def total(W):
        return soft_cross_entropy(student, targets, W.expand(len(student), -1, -1).double(), *temps)

    local, swapped = torch.ones(V, T), torch.zeros(V, T)
    local[:T] = 0
    swapped[:T] = torch.eye(T).flip(0)
    torch.testing.assert_close(total(local), DINO['dinov2_local_sum'], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(total(swapped) / T, DINO['dinov2_global_sum'], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(targets='centre'), "targets='centre'; did you mean 'center'"),
        (dict(compare='l1'), "compare='l1'; choose from: ce, mse, mse_unit"),
    ],
)
def test_unknown_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as error:
        create_method('dino_ablation', backbone='vit_mini', **options)
    assert '\n' not in str(error.value)


SMALL = dict(
    n_images=32, image_size=32, global_size=32, local_size=16, out_dim=32, head_hidden=32, head_bottleneck=16,
    batch_size=8, steps=4, lr=1e-2, checkpoint_every=2, device='cpu', drop_path=0.0,
)  # fmt: skip
ROW_NAMES = [name for name, row in DINO_TABLE_7.items() if row['method'] in list_methods()]


def recipe_of(name, **changes):
    row = DINO_TABLE_7[name] | dict(n_local=0 if 'n_local' in DINO_TABLE_7[name] else 1)
    return Recipe(**(dict(backbone='vit_mini', **SMALL) | row | dict(out_dim=32) | changes))


def steps_of(recipe, n):
    trainer = Trainer(recipe, recipe.steps)
    for views in batches(recipe, build_dataset(recipe), 0, n, trainer.method.views):
        log = trainer.step(views)
    return trainer, log


def test_there_are_nine_rows():
    assert len(DINO_TABLE_7) == 9 and len(ROW_NAMES) >= 8


@pytest.mark.parametrize(
    'name', [name for name in ROW_NAMES if DINO_TABLE_7[name]['method'] == 'dino_ablation']
)
def test_each_row_trains(name):
    recipe = recipe_of(name)
    trainer, log = steps_of(recipe, 2)
    assert np.isfinite(log['loss'])
    if recipe.momentum == 0:  # the teacher is the student
        pairs = zip(trainer.method.teacher.parameters(), trainer.method.student.parameters())
        assert all(torch.equal(t, s) for t, s in pairs)


@pytest.mark.parametrize('backbone', ['swin_mini', 'resnet_mini'])
def test_other_backbones_train(backbone):
    recipe = recipe_of('BYOL', backbone=backbone)
    assert np.isfinite(steps_of(recipe, 1)[1]['loss'])


def test_the_predictor_is_trained_and_saved():
    trainer, _ = steps_of(recipe_of('predictor'), 1)
    groups = [p for group in trainer.method.parameter_groups() for p in group['params']]
    predictor = list(trainer.method.objective.terms['view'].predictor.parameters())
    assert all(any(p is q for q in groups) for p in predictor)
    assert any('predictor' in key for key in trainer.method.state_dict())
