"Each kind of collapse, made on purpose in a real run, is named; and watching a run does not change it."

import math
import warnings

import pytest
import torch
from torch import nn

from glsd.backbones import Features, TimmBackbone
from glsd.data.toyworld import ToyWorld
from glsd.evaluation.collapse import feature_figures
from glsd.evaluation.report import collapse_report
from glsd.evaluation.watching import (
    CollapseMonitor,
    collapse_monitor,
    collapse_of_backbone,
    collapse_of_run,
    collapse_picture,
    figures_of,
)
from glsd.objectives import Geometric, GeometricLoss, Similarity, SimilarityLoss, register_method
from glsd.training import Recipe, pretrain, read_metrics
from glsd.training.checkpoint import last_checkpoint
from glsd.training.loop import batches
from glsd.training.trainer import Trainer, build_dataset


@register_method('similarity_alone')
class SimilarityAlone(Similarity):
    terms = (SimilarityLoss,)


@register_method('geometric_alone')
class GeometricAlone(Geometric):
    terms = (GeometricLoss,)


SMALL = Recipe(
    'dino',
    backbone='vit_mini',
    data='toyworld-shared',
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


def train(looks_at, change=lambda method: None, **fields):
    "The reports of a run, after the steps `looks_at`; `change(method)` comes before the first."
    recipe, reports = SMALL.replace(steps=max(looks_at), **fields), []
    trainer = Trainer(recipe, recipe.steps)
    change(trainer.method)
    for views in batches(recipe, build_dataset(recipe), 0, recipe.steps, trainer.method.views):
        trainer.step(views)
        if trainer.done in looks_at:
            with torch.no_grad():
                reports.append(collapse_report(figures_of(trainer.method, views)))
    return reports


def first_batch(method, recipe=SMALL):
    return next(batches(recipe, build_dataset(recipe), 0, 1, method.views))


@pytest.mark.parametrize('method', ['dino', 'geometric'])
def test_a_healthy_run_raises_no_alarm_from_the_first_step_on(method):
    assert [r.kind for r in train([1, 2, 4, 8, 16, 24], method=method, lr=0.016)] == ['healthy'] * 6


@pytest.mark.parametrize(
    'word, step, fields',
    [
        ('centring', 64, dict(center_momentum=1.0, lr=0.1)),
        ('sharpening', 16, dict(teacher_temp=0.5, teacher_temp_start=0.5)),
    ],
)
def test_each_trick_that_is_left_out_is_named(word, step, fields):
    (report,) = train([step], **fields)
    assert report.kind == 'full collapse' and f'{word} is too weak' in str(report)


def test_similarity_matching_with_little_data_and_geometric_beside_it():
    first, last = train([9, 24], method='similarity_alone', **LITTLE)
    assert first.kind == 'local collapse' and 'attract' in str(first)
    assert last.kind == 'dimensional collapse'
    assert [r.kind for r in train([9, 24], method='geometric_alone', **LITTLE)] == ['healthy'] * 2


def constant(method):
    for branch in method.student, method.teacher:
        nn.init.zeros_(branch.backbone.model.norm.weight)
        nn.init.normal_(branch.backbone.model.norm.bias)


def flat_student(method):
    for name, p in method.student.named_parameters():
        if '.last_layer.' in name:
            nn.init.ones_(p)


def untrained(change):
    "The report of a method before its first step."
    torch.manual_seed(0)
    method = SMALL.create_method()
    change(method)
    with torch.no_grad():
        return collapse_report(figures_of(method, first_batch(method)))


def test_constant_features():
    report = untrained(constant)
    assert report.kind == 'full collapse'
    assert any('pooled features are the same for all images' in f.seen for f in report.findings)


def test_a_student_that_says_nothing():
    report = untrained(flat_student)
    assert [f.kind for f in report.findings] == ['stuck']
    assert 'has not moved from ln(64) = 4.16: the student ignores its input' in str(report)


def test_features_alone():
    alike = torch.randn(64, 1, 96).expand(-1, 16, -1)
    flat = torch.randn(64, 16, 3) @ torch.randn(3, 96)
    for tokens, kind in ((alike, 'local collapse'), (flat, 'dimensional collapse')):
        assert collapse_report(feature_figures(Features(tokens.mean(1), tokens, (4, 4)))).kind == kind


def test_features_that_are_not_finite_are_refused():
    def poison(method):
        nn.init.constant_(method.teacher.backbone.model.norm.bias, float('nan'))

    with pytest.raises(ValueError, match='finite') as error:
        untrained(poison)
    assert '\n' not in str(error.value)


def test_in_a_run_it_is_logged_said_once_and_changes_nothing(tmp_path):
    recipe = SMALL.replace(method='similarity_alone', steps=24, monitor_every=6, **LITTLE)
    monitor = collapse_monitor()
    with pytest.warns(UserWarning, match='local collapse') as caught:
        pretrain(recipe, tmp_path / 'watched', monitors={'collapse': monitor}, progress=False)
    assert len([w for w in caught if 'local collapse' in str(w.message)]) == 1
    pretrain(recipe, tmp_path / 'unwatched', monitors={}, progress=False)
    a, b = (last_checkpoint(tmp_path / name)['method'] for name in ('watched', 'unwatched'))
    assert all(torch.equal(a[k], b[k]) for k in b)
    lines = [l for l in read_metrics(tmp_path / 'watched') if 'collapse/tokens/partners' in l]
    assert [l['step'] for l in lines] == [6, 12, 18, 24]
    logged = [v for l in lines for k, v in l.items() if k.startswith('collapse/')]
    assert all(math.isfinite(v) and v <= 1 for v in logged)
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = reader.EventAccumulator(str(tmp_path / 'watched' / 'tensorboard'))
    events.Reload()
    assert [e.step for e in events.Scalars('collapse/pooled/rank')] == [6, 12, 18, 24]
    assert set(collapse_of_run(tmp_path / 'watched')) == {'heads', 'pooled', 'tokens'}
    assert collapse_of_run(tmp_path / 'watched') == collapse_of_run(tmp_path / 'watched')


def test_pictures_of_runs_and_of_backbones(tmp_path):
    recipe = SMALL.replace(steps=4, monitor_every=2, method='geometric')
    pretrain(recipe, tmp_path, monitors={'collapse': collapse_monitor()}, progress=False)
    history = collapse_picture({'a': read_metrics(tmp_path), 'b': read_metrics(tmp_path)})
    assert len(history.axes) == 12 and all(len(axis.lines) == 2 for axis in history.axes)
    assert list(history.axes[0].lines[0].get_xdata()) == [2, 4]
    pixels = collapse_of_backbone(nn.Flatten(), ToyWorld(20, size=32), 32)
    spectra = collapse_picture({'run': collapse_of_run(tmp_path), 'pixels': pixels})
    assert [len(axis.lines) for axis in spectra.axes] == [2, 1]


@pytest.mark.parametrize('n', [0, 1])
def test_too_few_images_are_refused(n):
    with pytest.raises(ValueError, match=f'^{n} image.s.: .*at least'):
        collapse_of_backbone(nn.Flatten(), [None] * n, 32)


def test_a_head_that_matched_nothing_has_no_kl(monkeypatch):
    def nothing(self, s, t):
        return torch.zeros(len(s.tokens), s.tokens.shape[1], t.tokens.shape[1])

    method = SMALL.replace(method='geometric_alone').create_method()
    monkeypatch.setattr(GeometricLoss, 'matching', nothing)
    with torch.no_grad():
        figures = figures_of(method, first_batch(method))
    assert 'kl' not in figures['heads']['region'] and 'gap' not in figures['heads']['region']
    assert collapse_report(figures).kind != 'stuck'


def test_a_silent_monitor_is_silent():
    monitor, method = CollapseMonitor(warn=False), SMALL.create_method()
    constant(method)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('error')
        for step in (1, 2):
            monitor(method, step, first_batch(method))
    assert monitor.report.kind == 'full collapse'


def test_a_method_without_heads_or_tokens_has_features_all_the_same():
    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = TimmBackbone(nn.Flatten(), 16, (0.5,) * 3, (0.5,) * 3)
            self.views = SMALL.create_method().views

    method = Vectors()
    figures = figures_of(method, first_batch(method))
    assert list(figures) == ['pooled'] and collapse_report(figures).kind == 'healthy'


def test_backbones_are_looked_at_with_their_own_mean():
    seen = []

    class Shows(nn.Flatten):
        mean, std = (0.5,) * 3, (0.5,) * 3

        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    collapse_of_backbone(Shows(), ToyWorld(6, size=32), 32)
    assert seen[0].min() >= -1 and seen[0].max() <= 1


def test_what_nobody_has_trained_gets_no_advice_on_training():
    figures = feature_figures(torch.ones(9, 8))
    report = collapse_report(figures, trained=False)
    assert report.kind == collapse_report(figures).kind == 'full collapse'
    assert 'lower lr' in str(collapse_report(figures)) and 'lr' not in str(report)
    assert 'these weights are untrained' in str(report) and str(report).count('\n') == 0
