"What a recipe takes, what it refuses in one line, and what it is on the disk."

from __future__ import annotations  # the types of this file's method are texts

from dataclasses import dataclass

import pytest
import yaml
from training_runs import files_named_by, one_line

from glsd.objectives.method import Method, list_methods
from glsd.training import Recipe
from glsd.training.recipe import FORMAT


@pytest.mark.parametrize('method', list_methods())
def test_saved_whole_and_loaded_equal(tmp_path, method):
    recipe = Recipe(method, steps=7, lr=1e-7, warmup=1 / 3, **files_named_by(method))
    recipe.save(tmp_path / 'r.yaml')
    assert Recipe.load(tmp_path / 'r.yaml') == recipe
    values = yaml.safe_load((tmp_path / 'r.yaml').read_text())
    assert values.pop('format') == FORMAT == 3 and values.keys() == recipe.to_dict().keys()
    fields = {*vars(recipe.run), *vars(recipe.views), *vars(recipe.options), 'method'}
    assert values.keys() == fields


def test_a_changed_default_changes_no_saved_recipe(tmp_path, monkeypatch):
    "A15: what an old run was must not depend on today's defaults."
    from glsd.training.options import RunOptions

    Recipe(steps=7).save(tmp_path / 'r.yaml')
    monkeypatch.setattr(
        RunOptions.__init__, '__defaults__', tuple([1] * len(RunOptions.__init__.__defaults__))
    )
    assert Recipe.load(tmp_path / 'r.yaml').weight_decay == 0.04


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(lr='fast'), "lr must be a number, not 'fast'"),
        (dict(lr=True), 'lr must be a number, not True'),
        (dict(lr=None), 'lr must be a number'),
        (dict(batch_size=64.5), 'batch_size must be a whole number'),
        (dict(batch_size=[64]), 'batch_size must be a whole number'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(warmup=10), 'warmup must be a share between 0 and 1'),
        (dict(local_scale=(0.4, 0.05)), 'local_scale must be two shares'),
        (dict(teacher_temp=0), 'teacher_temp must be greater than 0'),
        (dict(head_batchnorm='maybe'), 'head_batchnorm must be true or false'),
        (dict(momentum=float('nan')), 'momentum must be a share'),
        (dict(lr=float('inf')), 'lr must be at least 0'),
        (dict(on_nan='go'), "on_nan must be 'stop' or 'skip'"),
        (dict(fsdp=True, compile=True), 'fsdp and compile do not go together'),
        (dict(batchsize=64), "no field 'batchsize'; did you mean 'batch_size'"),
        (dict(n_locals=4), "did you mean 'n_local'"),
        (dict(arch='vit_mini'), "did you mean 'backbone'"),
        (dict(learning_rate=1), "did you mean 'lr'"),
        (dict(objectiv='dino'), "did you mean 'method'"),
    ],
)
def test_nonsense_is_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe('geometric', **wrong)
    assert one_line(error)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(drloc_weight=-1), 'drloc_weight must be at least 0'),
        (dict(smoothing=2), 'smoothing must be a share'),
        (dict(global_scale=(1, 0.08)), 'global_scale must be two shares'),
        (dict(drloc_variant='l2'), 'l2'),
        (dict(batch_size=33), 'batch_size must be even to mix pairs'),
        (dict(n_local=2), 'one crop of an image'),
        (dict(n_global=2), 'one crop of an image'),
    ],
)
def test_nonsense_for_supervised_training_is_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe('supervised', **wrong)
    assert one_line(error)


@pytest.mark.parametrize('text', ['lr: 2e-3\nbatchsize: 64', '- lr\n- 2', 'lr: [1', 'lr: {}', 'format: 9'])
def test_what_is_no_recipe_names_the_file(tmp_path, text):
    (tmp_path / 'mine.yaml').write_text(text)
    with pytest.raises(ValueError, match='mine.yaml|lr must be') as error:
        Recipe.load(tmp_path / 'mine.yaml')
    assert one_line(error)
    with pytest.raises(FileNotFoundError, match='no recipe at .*yours.yaml'):
        Recipe.load(tmp_path / 'yours.yaml')


def test_values_as_text_and_of_other_types():
    assert Recipe(lr='2e-3', steps=200.0, amp='yes') == Recipe(lr=0.002, steps=200, amp=True)
    assert Recipe(global_scale='(.4, 1.)') == Recipe(global_scale=[0.4, 1]) == Recipe()


def test_recipes_of_the_second_format_keep_their_toy_world(tmp_path):
    Recipe('dino', lr=0.01).save(tmp_path / 'r.yaml')
    text = (tmp_path / 'r.yaml').read_text()
    (tmp_path / 'r.yaml').write_text(text.replace('format: 3', 'format: 2'))
    assert Recipe.load(tmp_path / 'r.yaml') == Recipe('dino', lr=0.01, data='toyworld-shared')


def test_another_method_keeps_what_it_has():
    recipe = Recipe('geometric', out_dim=128, region_search='teacher', steps=3)
    other = recipe.replace(method='dino')
    assert other == Recipe('dino', out_dim=128, steps=3)


class Typed(Method):
    "A method in a file whose annotations are texts, with an option of a type of its own."

    @dataclass(frozen=True)
    class Options(Method.Options):
        width: int = 4
        names: list | None = None


def test_a_method_of_another_file():
    recipe = Recipe('test_training_recipe:Typed', width='8', names=['a'])
    assert recipe.width == 8 and recipe.names == ['a'] and Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match='width must be a whole number'):
        recipe.replace(width='wide')


def test_recipes_of_the_first_format():
    world = dict(data='toyworld-shared')  # the only toy world that there was
    old = dict(objective='moby', objective_options=dict(hidden=32, queue=64), n_query=10, lr=0.01)
    assert Recipe.from_dict(old) == Recipe('moby', view_hidden=32, view_queue=64, lr=0.01, **world)
    assert Recipe.from_dict(dict(objective='vanilla')) == Recipe('vanilla', **world)
    searched = Recipe.from_dict(dict(objective_options={'search': 'teacher'}))
    assert searched == Recipe(region_search='teacher', **world)
    adclr = Recipe.from_dict(dict(objective='adclr', n_query=3))
    assert adclr == Recipe('adclr', n_query=3, **world)
    assert Recipe.from_dict(dict(objective='vanilla', data='photos')).data == 'photos'
    with pytest.raises(ValueError, match='no field'):
        Recipe.from_dict(dict(objective='moby', dropout=0.1))


def test_another_method_keeps_what_was_given_also_where_it_is_a_default():
    first = Recipe('geometric', backbone='swin_tiny_w7', out_dim=512, region_search='teacher')
    other = first.replace(method='selfpatch')
    assert other.backbone == 'swin_tiny_w7' and other.out_dim == 512
    assert first.replace(method='supervised').lr == Recipe('supervised').lr  # nobody gave one
    assert first.replace(seed=1).replace(seed=0) == first
