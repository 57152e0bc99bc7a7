"""Compiled backbones: the same loss, the same names in a checkpoint, one line without a compiler; colours
that wait for the device."""

import numpy as np
import pytest
import torch

from glsd.training import trainer as training
from glsd.training.recipe import Recipe
from glsd.training.trainer import Trainer, compile_backbones
from glsd.views.multicrop import MultiCrop

SMALL = dict(
    backbone='vit_mini', global_size=16, local_size=8, n_local=2, batch_size=2, out_dim=32, head_hidden=16,
    head_bottleneck=8, drop_path=0.0, warmup=0.0, steps=10, device='cpu',
)  # fmt: skip


def small_trainer():
    return Trainer(Recipe('geometric', **SMALL), 10)


def small_views(step, **options):
    generators = [torch.Generator().manual_seed(2 * step + i) for i in range(2)]
    images = [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=g) for g in generators]
    rngs = [np.random.default_rng((step, i)) for i in range(2)]
    return MultiCrop(16, 8, n_local=2, **options)(images, rngs)


@pytest.mark.slow
@pytest.mark.parametrize(
    'backend',
    [
        'aot_eager',
        pytest.param(
            'inductor',
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason='compiling takes minutes on a CPU'
            ),
        ),
    ],
)
def test_losses_agree_with_and_without_compile(backend):
    plain, compiled = small_trainer(), small_trainer()
    backbones = compiled.method.student.backbone, compiled.method.teacher.backbone
    compile_backbones(*backbones, backend=backend)
    for step in range(2):
        a, b = (t.step(small_views(step))['loss'] for t in (plain, compiled))
        assert abs(a / b - 1) < 1e-4
    plain.load_state_dict(compiled.state_dict())  # same names: a run may be cut with it and go on without
    assert plain.done == 2


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(ValueError, match=r'compile=True needs a C\+\+ compiler') as e:
        compile_backbones(small_trainer().method.student.backbone)
    assert '\n' not in str(e.value)


def test_a_step_on_uint8_views_is_the_same_step():
    a, b = (small_trainer().step(small_views(0, colour_on_device=c)) for c in (False, True))
    assert a == b


@pytest.mark.parametrize('method', ['geometric', 'supervised'])
def test_the_recipe_reaches_views_and_backbones(monkeypatch, method):
    seen = []
    monkeypatch.setattr(training, 'compile_backbones', lambda *backbones: seen.extend(backbones))
    changes = dict(compile=True, colour_on_device=True)
    recipe = Recipe(
        method, backbone='vit_mini', global_size=16, batch_size=2, steps=10, device='cpu', **changes
    )
    made = Trainer(recipe, 10, classes=['a', 'b']).method
    wanted = [made.backbone] if method == 'supervised' else [made.student.backbone, made.teacher.backbone]
    assert seen == wanted and made.views.colour_on_device
