"Each kind of collapse, made on purpose in a real run, is named; and watching a run does not change it."

import math
import warnings

import pytest
import torch
from glsd.training.watching import LivePlot, curves
from torch import nn

from glsd.data.toyworld import ToyWorld
from glsd.evaluation.collapse import collapse_figures
from glsd.evaluation.report import (
    CollapseMonitor,
    collapse_monitor,
    collapse_of_backbone,
    collapse_of_run,
    collapse_picture,
    collapse_report,
)
from glsd.objectives import GeometricLoss, SimilarityLoss, setting
from glsd.training import Recipe, pretrain
from glsd.training.checkpoint import last_checkpoint, read_metrics
from glsd.training.loop import Trainer, batches, build_dataset

setting('similarity_alone')(SimilarityLoss)
setting('geometric_alone')(GeometricLoss)
SMALL = Recipe(
    objective='vanilla',
    backbone='vit_mini',
    n_images=128,
    image_size=32,
    global_size=16,
    n_local=0,
    strength=0.5,
    drop_path=0.0,
    out_dim=64,
    head_hidden=64,
    head_bottleneck=32,
    head_batchnorm=True,
    batch_size=16,
    steps=48,
    lr=0.03,
    momentum=0.9,
    momentum_final=0.9,
    teacher_temp=0.04,
    freeze_last=0.1,
    seed=1,
)
LITTLE = dict(n_images=16, global_size=32, lr=0.1)


def train(looks_at, change=lambda trainer: None, **fields):
    "The reports of a run, at the steps `looks_at`, after `change(trainer)` at its start."
    recipe, reports = SMALL.replace(steps=max(looks_at), **fields), []
    trainer = Trainer(recipe, recipe.steps)
    change(trainer)

    def look(step, objective, student, teacher, terms, temp):
        if step in looks_at:
            reports.append(collapse_report(collapse_figures(student, teacher, objective, temp)))

    for views in batches(recipe, build_dataset(recipe), 0, recipe.steps):
        trainer.step(views, looks=[look])
    return reports


@pytest.mark.parametrize('objective', ['vanilla', 'geometric'])
def test_a_healthy_run_raises_no_alarm_from_the_first_step_on(objective):
    assert [r.kind for r in train([1, 2, 4, 8, 16, 24], objective=objective, lr=0.016)] == ['healthy'] * 6


@pytest.mark.parametrize(
    'word, step, fields',
    [
        ('centring', 48, dict(center_momentum=1.0)),
        ('sharpening', 16, dict(teacher_temp=0.5, teacher_temp_start=0.5)),
    ],
)
def test_each_trick_that_is_left_out_is_named(word, step, fields):
    (report,) = train([step], **fields)
    assert report.kind == 'full collapse' and f'{word} is too weak' in str(report)


def test_similarity_matching_with_little_data_and_geometric_beside_it():
    first, last = train([9, 24], objective='similarity_alone', **LITTLE)
    assert first.kind == 'local collapse' and 'attract' in str(first)
    assert last.kind == 'dimensional collapse'
    assert [r.kind for r in train([9, 24], objective='geometric_alone', **LITTLE)] == ['healthy'] * 2


def constant(trainer):
    for branch in trainer.student, trainer.teacher:
        nn.init.zeros_(branch.backbone.model.norm.weight)
        nn.init.normal_(branch.backbone.model.norm.bias)


def flat_student(trainer):
    for p in trainer.last_layers:
        nn.init.ones_(p)


def test_constant_features():
    (report,) = train([1], constant)
    assert report.kind == 'full collapse' and any(
        'pooled features are the same for all images' in f.seen for f in report.findings
    )


def test_a_student_that_says_nothing():
    (report,) = train([1], flat_student)
    assert [f.kind for f in report.findings] == [
        'stuck'
    ] and 'has not moved from ln(64) = 4.16: the student ignores its input' in str(report)


@pytest.mark.parametrize('part, kind', [('within', 'local collapse'), ('rank', 'dimensional collapse')])
def test_features_alone(part, kind):
    from glsd.backbones import Features
    from glsd.evaluation.collapse import feature_figures

    tokens = (
        torch.randn(64, 1, 96).expand(-1, 16, -1)
        if part == 'within'
        else torch.randn(64, 16, 3) @ torch.randn(3, 96)
    )
    assert collapse_report(feature_figures(Features(tokens.mean(1), tokens, (4, 4)))).kind == kind


def test_features_that_are_not_finite_are_refused():
    def poison(trainer):
        nn.init.constant_(trainer.teacher.backbone.model.norm.bias, float('nan'))

    recipe = SMALL.replace(steps=1)
    trainer = Trainer(recipe, 1)
    poison(trainer)
    student, teacher, _ = trainer.forward(next(batches(recipe, build_dataset(recipe), 0, 1)), 0.04)
    with pytest.raises(ValueError, match='finite') as error:
        collapse_figures(student, teacher, trainer.objective, 0.04)
    assert '\n' not in str(error.value)


def test_in_a_run_it_is_logged_said_once_and_changes_nothing(tmp_path):
    recipe, monitor = (
        SMALL.replace(objective='similarity_alone', steps=12, monitor_every=3, **LITTLE),
        collapse_monitor(),
    )
    with pytest.warns(UserWarning, match='step 12: local collapse') as caught:
        pretrain(recipe, tmp_path / 'watched', monitors={'collapse': monitor}, progress=False)
    assert len([w for w in caught if 'local collapse' in str(w.message)]) == 1
    pretrain(recipe, tmp_path / 'alone', progress=False)
    a, b = (last_checkpoint(tmp_path / name) for name in ('watched', 'alone'))
    for part in 'student', 'teacher', 'objective':
        assert all(torch.equal(a[part][k], b[part][k]) for k in b[part])
    lines = [l for l in read_metrics(tmp_path / 'watched') if 'collapse/tokens/partners' in l]
    assert [l['step'] for l in lines] == [3, 6, 9, 12] and all(
        math.isfinite(v) and v <= 1 for l in lines for k, v in l.items() if k.startswith('collapse/')
    )
    assert (
        LivePlot(12).draw(read_metrics(tmp_path / 'watched'))[:4] == b'\x89PNG'
        and 'collapse/region/kl' in curves(lines)[1]
    )
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator').EventAccumulator(
        str(tmp_path / 'watched' / 'tensorboard')
    )
    events.Reload()
    assert [e.step for e in events.Scalars('collapse/pooled/rank')] == [3, 6, 9, 12]
    assert set(collapse_of_run(tmp_path / 'watched')) == {'heads', 'pooled', 'tokens'}
    assert collapse_of_run(tmp_path / 'watched') == collapse_of_run(tmp_path / 'watched')


def test_pictures_of_runs_and_of_backbones(tmp_path):
    pretrain(
        SMALL.replace(steps=4, monitor_every=2, objective='geometric'),
        tmp_path,
        monitors={'collapse': collapse_monitor()},
        progress=False,
    )
    history = collapse_picture({'a': read_metrics(tmp_path), 'b': read_metrics(tmp_path)})
    assert len(history.axes) == 12 and all(len(axis.lines) == 2 for axis in history.axes)
    assert list(history.axes[0].lines[0].get_xdata()) == [2, 4]
    spectra = collapse_picture(
        {
            'run': collapse_of_run(tmp_path),
            'pixels': collapse_of_backbone(nn.Flatten(), ToyWorld(20, size=32), 32),
        }
    )
    assert [len(axis.lines) for axis in spectra.axes] == [2, 1]


@pytest.mark.parametrize('n', [0, 1])
def test_too_few_images_are_refused(n):
    with pytest.raises(ValueError, match=f'^{n} image.s.: .*at least'):
        collapse_of_backbone(nn.Flatten(), [None] * n, 32)


def test_a_head_that_matched_nothing_has_no_kl(monkeypatch):
    recipe = SMALL.replace(objective='geometric_alone', steps=1)
    trainer = Trainer(recipe, 1)
    student, teacher, _ = trainer.forward(next(batches(recipe, build_dataset(recipe), 0, 1)), 0.04)
    monkeypatch.setattr(
        GeometricLoss,
        'matching',
        lambda self, s, t: torch.zeros(len(s.tokens), s.tokens.shape[1], t.tokens.shape[1]),
    )
    figures = collapse_figures(student, teacher, trainer.objective, 0.04)
    assert 'kl' not in figures['heads']['region'] and 'gap' not in figures['heads']['region']
    assert collapse_report(figures).kind != 'stuck'


def test_a_silent_monitor_is_silent():
    monitor = CollapseMonitor(warn=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        recipe = SMALL.replace(steps=2)
        trainer = Trainer(recipe, 2)
        constant(trainer)
        for views in batches(recipe, build_dataset(recipe), 0, 2):
            trainer.step(views, looks=[monitor.look])
    assert monitor.report.kind == 'full collapse'
