"Every recipe of every scale of every experiment can be made, with networks that have shapes and no values."

from pathlib import Path

import pytest
from PIL import Image

from glsd.experiments import setup
from glsd.masked.dvae import save_tokenizer
from glsd.objectives.method import create_method
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
    if 'plan_runs(study.cells' in source:
        raise Planned(names['study'].cells)


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
    if notebook in ('dilo', 'looc') and scale == 'ci':
        return dict(images=16 if notebook == 'dilo' else 64)  # looc has 64 classes
    if notebook == 'low_data' and scale != 'ci':
        return dict(sizes=[52])
    if notebook == 'drloc':
        backbones = ['swin_mini', 't2t_mini', 'resnet_mini', 'swin_tiny_w7', 't2t_vit_14', 'resnet50']
        return dict(tables=['2', '4', '5', '16'], weights=dict.fromkeys(backbones, 'some.safetensors'))
    return {}


@pytest.fixture(scope='module')
def made_before(tmp_path_factory):
    "What rows of masked methods build on, without training."
    words = create_method('dvae', backbone='dvae_mini', n_codes=16, code_dim=4, decoder_width=4)
    words.counts.fill_(1)
    path = tmp_path_factory.mktemp('words') / 'words.safetensors'
    save_tokenizer(words, path)
    features = 'random:vit_mini_p4'
    given = dict(tokenizer=str(path), dino=features, supervised=features, teacher='a run')
    needs = dict(
        local_losses=['tokenizer'],
        mae=['tokenizer'],
        beit=['tokenizer'],
        maskfeat=['tokenizer', 'dino', 'supervised'],
    )
    return {k: {name: given[name] for name in v} for k, v in (needs | dict(deit=['teacher'])).items()}


@pytest.fixture
def planned(run_notebook, tmp_path, folder, free_steps, made_before):
    def planned(notebook, scale, **given):
        "The cells that a notebook plans at a scale: name -> Recipe."
        given |= more(notebook, scale) | made_before.get(notebook, {})
        if scale != 'ci':
            given['data'] = [folder] if notebook == 'drloc' else folder
        parameters = dict(scale=scale, out=str(tmp_path), **given)
        with pytest.raises(Planned) as plan:
            run_notebook(NOTEBOOKS / f'{notebook}.ipynb', parameters, after=stop_at_the_plan)
        return plan.value.args[0]

    return planned


ABLATIONS = 'mae', 'beit', 'maskfeat', 'deit', 'dino_ablation', 'nnclr', 'looc', 'dilo', 'contrastive'


@pytest.mark.slow
@pytest.mark.parametrize('scale', ['ci', 'laptop', 'paper'])
@pytest.mark.parametrize('notebook', ABLATIONS)
def test_every_recipe_of_an_ablation_can_be_made(planned, notebook, scale):
    rows = {name.rsplit(' s', 1)[0]: recipe for name, recipe in planned(notebook, scale, seeds=1).items()}
    assert len(rows) >= (2 if scale == 'ci' else 4)
    chosen = list(rows.items())[:: len(rows) // 3 if scale == 'paper' else 1]  # large networks take seconds
    for name, recipe in chosen:
        assert not setup.why_not(recipe), name


@pytest.mark.slow
@pytest.mark.parametrize('scale', ['ci', 'gpu', 'paper'])
@pytest.mark.parametrize('notebook', ['low_data', 'local_losses', 'selfpatch', 'adclr', 'drloc'])
def test_every_recipe_can_be_made(planned, notebook, scale):
    kinds = {}
    for name, recipe in planned(notebook, scale).items():
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
