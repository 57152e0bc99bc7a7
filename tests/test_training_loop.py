"What a run shows and what is read of it later: monitors, log, progress, devices."

import warnings

import pytest
import torch
from PIL import Image
from training_runs import KINDS, QUICK, one_line, small_recipe

from glsd.training import load_method, load_run, pretrain
from glsd.training.checkpoint import (
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from glsd.training.loop import batches
from glsd.training.metrics import MetricsLog, MetricsReader, read_metrics
from glsd.training.monitoring import Bar, Curves, LivePlot, draw_panels
from glsd.training.trainer import Trainer, build_dataset


@pytest.mark.parametrize('method', KINDS)
def test_monitors_see_every_kind_of_method(tmp_path, method):
    "In eval mode, without gradients, with the batch of the step; afterwards the method trains on."

    def monitor(method, step, views):
        assert not method.training and not torch.is_grad_enabled()
        features = method.backbone(views.crops[0][0])
        return {'norm': features.pooled.norm(), 'images': len(views.index)}

    run = pretrain(small_recipe(method, monitor_every=2), tmp_path, {'m': monitor}, progress=False)
    assert [line['step'] for line in run.metrics if 'm/norm' in line] == [2, 4, 6]
    assert run.metrics[-1]['m/images'] == 8
    assert set(load_method(tmp_path).state_dict()) == set(last_checkpoint(tmp_path)['method'])


def test_a_run_of_a_gpu_is_read_on_a_cpu(tmp_path):
    "A6: the recipe says cuda, and whoever reads the run has none."
    pretrain(QUICK.replace(steps=1), tmp_path, progress=False)
    path = list_checkpoints(tmp_path)[-1]
    state = torch.load(path, weights_only=True)
    state['recipe']['device'] = 'cuda'
    torch.save(state, path)
    run, method = load_run(tmp_path), load_method(tmp_path)
    assert run.recipe.device == 'cuda'
    assert {p.device.type for p in [*run.backbone.parameters(), *method.parameters()]} == {'cpu'}


def test_a_skipped_first_step_does_not_break_the_picture():
    "A8: and the learning rate, seconds and the reason of a skip are no terms."
    lines = [dict(step=1, skipped='view', lr=0.0, seconds=0.1)]
    live, curves, bar = LivePlot(3), Curves(3), Bar(3)
    for line in lines:
        curves.add([line])
        live.add([line])
        bar.add([line])
    assert curves.names() == ([], []) and draw_panels(curves, '', 3)[:4] == b'\x89PNG'
    step = dict(step=2, loss=3.0, view=1.0, region=2.0, grad_norm=1.0, lr=0.1, momentum=0.9, seconds=0.1)
    for shown in curves, live, bar:
        shown.add([step])
    bar.close()
    assert curves.names() == (['loss', 'view', 'region'], [])
    assert curves.points('loss') == ([2], [3.0]) and draw_panels(curves, '', 3)[:4] == b'\x89PNG'


@pytest.mark.parametrize('steps', [10, 799, 50_000])
def test_a_picture_has_no_more_than_400_points_however_a_log_is_read(steps):
    "A run that goes on reads its whole log at once."
    lines = [dict(step=k, loss=1.0, grad_norm=1.0) for k in range(1, steps + 1)]
    at_once, one_by_one = Curves(steps), Curves(steps)
    at_once.add(lines)
    for line in lines:
        one_by_one.add([line])
    assert at_once.points('loss') == one_by_one.points('loss')
    assert at_once.lines[0]['step'] == 1 and min(steps, 200) <= len(at_once.lines) <= 401


@pytest.mark.parametrize('beside, used', [('val', 8), ('test', 8), ('else', 12)])
def test_a_method_without_labels_leaves_the_test_images_alone(tmp_path, beside, used):
    "Of a folder with train/ and val/ it takes train/; a class may be called train, too."
    for part, n in (('train', 8), (beside, 4)):
        (tmp_path / part / 'c').mkdir(parents=True)
        for k in range(n):
            Image.new('RGB', (32, 32)).save(tmp_path / part / 'c' / f'{k}.png')
    assert len(build_dataset(QUICK.replace(data=str(tmp_path)))) == used


def test_the_log_is_read_once(tmp_path):
    "A11: what has been read is not read again, and a line that is not yet whole waits."
    log = tmp_path / 'metrics.jsonl'
    reader = MetricsReader(tmp_path)
    assert reader.read() == []
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [line['step'] for line in reader.read()] == [1, 2]
    read = reader.position
    log.write_bytes(b'x' * read + b'{"step": 3}\n')  # the lines before are gone: nobody looks at them
    assert [line['step'] for line in reader.read()] == [3] and reader.read() == []
    assert read_metrics(tmp_path) == []


def test_the_log_is_cut_where_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 9):
        log.write(dict(step=step, loss=1.0))
    log.close()
    with open(tmp_path / 'metrics.jsonl', 'ab') as f:
        f.write(b'{"step": 9, "lo')
    MetricsLog(tmp_path, step=6).close()
    assert [line['step'] for line in read_metrics(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize(
    'state, message',
    [
        ({'state_dict': {}}, "it has no 'step'"),
        ({'format': 7, 'step': 1}, 'newer glsd'),
        ([1, 2], 'is not a checkpoint'),
        ({'format': 1, 'step': 1, 'recipe': {}, 'student': {}}, 'is not a checkpoint'),
    ],
)
def test_what_is_no_checkpoint(tmp_path, state, message):
    torch.save(state, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(tmp_path / 'x.pt')
    assert one_line(error) and 'x.pt' in str(error.value)
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        load_checkpoint(tmp_path / 'y.pt')
    with pytest.raises(FileNotFoundError, match='is it the folder of a run'):
        load_run(tmp_path)


@pytest.mark.parametrize('start', [0, 1, 5, 6, 8])
def test_batches_from_anywhere(start):
    "Six batches make an epoch; a run that begins at any step sees what it would have seen."
    data, views = build_dataset(QUICK), Trainer(QUICK, 13).method.views

    def indices(first):
        return [v.index.tolist() for v in batches(QUICK, data, first, 13, views)]

    assert indices(start) == indices(0)[start:]


def test_the_trainer_knows_no_method():
    "Whether a term is stuck, and which monitors a run has, is the method's to say."
    recipe = small_recipe('supervised')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trainer = Trainer(recipe, 6, classes=build_dataset(recipe).classes)
        assert trainer.method.stuck(None, {}) == {} and trainer.settled() == round(0.2 * 6)
