"""Runs of the first format can still be read and go on.

golden/format1_checkpoint.json is the structure of real checkpoints of that format, written at step 8 of 12:
keys, shapes, types, recipes and optimiser groups; the numbers are drawn here."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import finite, one_line

from glsd.training import Recipe, export_backbone, load_method, load_run, pretrain
from glsd.training.checkpoint import FORMAT, last_checkpoint, saved_recipe
from glsd.training.weights import load_start

GOLDEN = json.loads((Path(__file__).parent / 'golden/format1_checkpoint.json').read_text())
DISTILLATION = dict(
    data='toyworld-shared', n_images=48, image_size=32, global_size=32, local_size=16, n_local=1,
    local_scale=(0.1, 0.4),
    drop_path=0.2, out_dim=32, head_hidden=32, head_bottleneck=16, head_batchnorm=True, batch_size=8,
    steps=12, lr=1e-2, momentum=0.9, checkpoint_every=4,
)  # fmt: skip
SWIN, VIT = (dict(DISTILLATION, backbone=name) for name in ('swin_mini', 'vit_mini'))
RECIPES = dict(  # what the recipes of the files mean, in words of today
    vanilla=Recipe('vanilla', **SWIN),
    geometric=Recipe('geometric', **SWIN, region_search='teacher'),
    moby=Recipe('moby', **SWIN, view_hidden=32, view_width=16, view_queue=64),
    ibot=Recipe('ibot', **VIT, patch_ratio=0.4),
    drloc=Recipe('drloc', **SWIN),
    selfpatch=Recipe('selfpatch', **VIT),
    supervised=Recipe(
        'supervised', data='toyworld-shared', backbone='swin_mini', n_images=48, n_test=16, image_size=32,
        global_size=32, batch_size=8, steps=12, lr=1e-2, drloc_weight=0.5, drloc_m=16, drloc_hidden=16,
        checkpoint_every=4,
    ),
)  # fmt: skip


def drawn(kind: str, name: str = '') -> torch.Tensor:
    "A tensor of a type and shape, such as 'float32 3x4'."
    dtype, _, shape = kind.partition(' ')
    size = [int(n) for n in shape.split('x')] if shape else []
    if dtype == 'int64':
        return torch.zeros(size, dtype=torch.int64)
    x = 0.05 * torch.randn(size)
    return x.abs() + 0.5 if 'running_var' in name else x


def filled(part: dict) -> dict:
    backbone = GOLDEN['backbones'][part['backbone']] if part['backbone'] else {}
    kinds = {f'backbone.{k}': v for k, v in backbone.items()} | part['others']
    return {k: drawn(kind, k) for k, kind in kinds.items()}


def optimizer(part: dict) -> dict:
    moments = {int(i): kind for i, kind in part['moments'].items()}
    state = {
        i: dict(step=torch.tensor(8.0), exp_avg=drawn(kind), exp_avg_sq=drawn(kind).square())
        for i, kind in moments.items()
    }
    groups, first = [], 0
    for group in part['param_groups']:
        numbers = list(range(first, first + group['params']))
        groups.append(dict(group, params=numbers, betas=tuple(group['betas'])))
        first += group['params']
    return dict(state=state, param_groups=groups)


def write_old_run(folder: Path, name: str, **changes) -> Path:
    "A folder as the first format left it."
    state = dict(GOLDEN['checkpoints'][name])
    for part in 'student', 'teacher', 'objective':
        state[part] = filled(state[part])
    if name == 'supervised':  # the backbone that was kept was the student's own
        state['teacher'] = {k: state['student'][k] for k in state['teacher']}
    state['optimizer'] = optimizer(state['optimizer'])
    state.update(changes)
    (folder / 'checkpoints').mkdir(parents=True)
    torch.save(state, folder / 'checkpoints/step_00000008.pt')
    return folder


@pytest.mark.parametrize('name', RECIPES)
def test_an_old_run_is_read_and_goes_on(tmp_path, name):
    folder = write_old_run(tmp_path / 'run', name)
    old = torch.load(folder / 'checkpoints/step_00000008.pt', weights_only=True)
    run = load_run(folder)
    assert run.recipe == RECIPES[name]
    kept = old['student' if name == 'supervised' else 'teacher']
    assert all(torch.equal(v, kept[f'backbone.{k}']) for k, v in run.backbone.state_dict().items())
    method = load_method(folder)
    assert len(method.state_dict()) == len(last_checkpoint(folder)['method'])
    pretrain(RECIPES[name], folder, {}, progress=False)
    state = last_checkpoint(folder)
    assert state['step'] == 12 and state['format'] == FORMAT and finite(state['method'])
    assert len(state['optimizer']['state']) == len(old['optimizer']['state'])


def test_fields_that_are_free_may_differ(tmp_path):
    folder = write_old_run(tmp_path / 'run', 'supervised')
    pretrain(RECIPES['supervised'].replace(n_test=3, monitor_every=2, workers=1), folder, progress=False)
    assert last_checkpoint(folder)['step'] == 12


def test_another_recipe_is_refused(tmp_path):
    folder = write_old_run(tmp_path / 'run', 'geometric')
    with pytest.raises(ValueError, match="region_search is 'teacher' there, 'student' here") as error:
        pretrain(RECIPES['geometric'].replace(region_search='student'), folder, {}, progress=False)
    assert one_line(error)


def test_it_is_exported_and_started_from(tmp_path):
    folder = write_old_run(tmp_path / 'run', 'geometric')
    export_backbone(folder, tmp_path / 'a.safetensors')
    backbone = load_run(folder).backbone
    wanted = {k: v.clone() for k, v in backbone.state_dict().items()}
    for weights in folder, tmp_path / 'a.safetensors':
        for p in backbone.parameters():
            torch.nn.init.zeros_(p)
        load_start(backbone, weights)
        assert all(torch.equal(v, wanted[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize('name', GOLDEN['exported'])
def test_recipes_in_exported_files(name):
    assert saved_recipe(GOLDEN['exported'][name], 'a file') == RECIPES[name]


def test_a_field_that_never_was_is_named(tmp_path):
    recipe = dict(GOLDEN['checkpoints']['geometric']['recipe'], dropout=0.1)
    folder = write_old_run(tmp_path / 'run', 'geometric', recipe=recipe)
    path = str(folder / 'checkpoints')
    with pytest.raises(ValueError) as error, pytest.warns(UserWarning, match="no field 'dropout'"):
        load_run(folder)
    assert path in str(error.value) and one_line(error)


def test_before_formats_had_numbers(tmp_path):
    folder = write_old_run(tmp_path / 'run', 'geometric')
    path = folder / 'checkpoints/step_00000008.pt'
    state = torch.load(path, weights_only=True)
    del state['format']
    del state['recipe']['drop_path']  # a field at its default
    torch.save(state, path)
    assert load_run(folder).recipe == RECIPES['geometric'].replace(drop_path=0.1)
