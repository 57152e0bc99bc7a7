"Every recipe of every scale of every experiment can be made, with networks that have shapes and no values."

from pathlib import Path

import pytest
from PIL import Image

from glsd.experiments import setup
from glsd.training import trainer

NOTEBOOKS = Path(__file__).parents[1] / 'nbs/9_experiments'
# what makes no other network
ALIKE = ['seed', 'per_class', 'steps', 'weights', 'lr', 'warmup', 'n_local', 'drloc_weight', 'drloc_m']
ALIKE += ['n_query', 'query_scale', 'query_weight', 'query_bidirectional']


class Planned(Exception):
    "The plan is made; nothing is run."


def stop_at_the_plan(source, names):
    if 'plan_runs(cells' in source:
        raise Planned(names['cells'])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "train/ and val/ with ten classes of 52 tiny images: more than the largest batch of low_data."
    root = tmp_path_factory.mktemp('images')
    image = Image.new('RGB', (8, 8))
    for part, n in ('train', 52), ('val', 2):
        for c in range(10):
            (root / part / f'class{c}').mkdir(parents=True)
            for i in range(n):
                image.save(root / part / f'class{c}' / f'{i}.png')
    return str(root)


@pytest.fixture
def free_steps(monkeypatch):
    "What a step costs is no part of the plan."
    monkeypatch.setattr(trainer, 'Trainer', lambda *args, **kwargs: None)
    monkeypatch.setattr('glsd.training.Trainer', trainer.Trainer, raising=False)
    monkeypatch.setattr('glsd.experiments.plan.step_seconds', lambda *args: (1.0, 'not tried'))
    for name, value in dict(first_views=None, step_memory=1, timed_step=1.0).items():
        monkeypatch.setattr(setup, name, lambda *args, value=value: value)


def more(notebook, scale):
    "Parameters that a notebook needs beside its data."
    if notebook == 'low_data' and scale != 'ci':
        return dict(sizes=[52])
    if notebook == 'drloc':
        backbones = ['swin_mini', 't2t_mini', 'resnet_mini', 'swin_tiny_w7', 't2t_vit_14', 'resnet50']
        return dict(tables=['2', '4', '5', '16'], weights=dict.fromkeys(backbones, 'some.safetensors'))
    return {}


@pytest.mark.slow
@pytest.mark.parametrize('scale', ['ci', 'gpu', 'paper'])
@pytest.mark.parametrize('notebook', ['low_data', 'local_losses', 'selfpatch', 'adclr', 'drloc'])
def test_every_recipe_can_be_made(run_notebook, tmp_path, folder, free_steps, notebook, scale):
    data = [folder] if notebook == 'drloc' else folder
    parameters = dict(scale=scale, out=str(tmp_path), **more(notebook, scale))
    if scale != 'ci':
        parameters['data'] = data
    with pytest.raises(Planned) as planned:
        run_notebook(NOTEBOOKS / f'{notebook}.ipynb', parameters, after=stop_at_the_plan)
    (cells,) = planned.value.args
    kinds = {}
    for name, recipe in cells.items():
        fields = {k: v for k, v in recipe.to_dict().items() if k not in ALIKE}
        kinds.setdefault(repr(fields), (name, recipe))
    assert kinds
    for name, recipe in kinds.values():
        assert not setup.why_not(recipe), name
        if notebook in ('local_losses', 'drloc'):
            assert recipe.backbone == name.split()[0]
    if notebook == 'local_losses' and scale == 'paper':
        pairs = {(r.backbone, r.method) for _, r in kinds.values()}
        assert {m for b, m in pairs if b == 'vit_small_p16_mean'} == {'vanilla', 'selfpatch'}
        assert ('vit_small_p16', 'selfpatch') not in pairs and ('swin_tiny_w7', 'selfpatch') in pairs
