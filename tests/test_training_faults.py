"What goes wrong in training is named, in one line, and loses nothing."

import copy
import errno
import os
import shutil
import signal
import subprocess

import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import KINDS, QUICK, finite, one_line, same, small_recipe

from glsd.data.loading import LoaderError
from glsd.training import Recipe, Trainer, checkpoint, load_run, pretrain
from glsd.training.checkpoint import (
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from glsd.training.loop import batches, class_names
from glsd.training.metrics import MetricsLog, read_metrics
from glsd.training.monitoring import NotFinite
from glsd.training.replay import replay
from glsd.training.trainer import build_dataset


def broken_at(*steps, term=None):
    "A `Trainer.loss_terms` that gives NaN for a term (without: for the first) at these steps."

    def loss_terms(self, views, values, _terms=Trainer.loss_terms):
        terms = _terms(self, views, values)
        name = term or next(iter(terms))
        if self.done + 1 in steps:
            terms[name] = terms[name] * float('nan')
        return terms

    return loss_terms


def test_loss_stuck_is_named(tmp_path, monkeypatch):
    # a learning rate of nothing and prototypes that are all the same: the outputs stay uniform
    def flat(self, *args, _init=Trainer.__init__, **kwargs):
        _init(self, *args, **kwargs)
        for name, p in self.method.named_parameters():
            if '.last_layer.' in name:
                nn.init.ones_(p)

    monkeypatch.setattr(Trainer, '__init__', flat)
    with pytest.warns(UserWarning, match=r'stuck at ln\(32\) = 3.4657'):
        pretrain(QUICK.replace(lr=0, lr_final=0), tmp_path, progress=False)


def test_a_healthy_run_is_not_accused(tmp_path, recwarn):
    pretrain(QUICK.replace(steps=12), tmp_path, progress=False)
    assert not [w for w in recwarn if 'stuck' in str(w.message)]


@pytest.mark.slow
def test_looking_leaves_no_trace(tmp_path):
    "The stuck check and a monitor that draws numbers change no weight, centre or queue."

    def noisy(method, step, views):
        return {'n': torch.rand(()) + method.outputs(views)[0].pooled.mean()}

    runs = [
        pretrain(
            QUICK.replace(steps=12, monitor_every=every), tmp_path / str(every), {'m': noisy}, progress=False
        )
        for every in (0, 1)
    ]
    a, b = (last_checkpoint(run.path)['method'] for run in runs)
    assert same(a, b)


@pytest.mark.parametrize('term', ['view', 'region'])
def test_non_finite_term_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch, term):
    monkeypatch.setattr(Trainer, 'loss_terms', broken_at(4, term=term))
    with pytest.raises(ValueError, match=f"step 4: '{term}' is nan") as error:
        pretrain(QUICK, tmp_path, progress=False)
    assert one_line(error) and last_checkpoint(tmp_path)['step'] == 2 and len(read_metrics(tmp_path)) == 3
    assert finite(last_checkpoint(tmp_path)['method'])


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(ValueError, match='48 images are fewer than a batch of 64') as error:
        pretrain(QUICK.replace(batch_size=64), tmp_path)
    assert one_line(error)


def test_another_recipe_lists_fields(tmp_path):
    pretrain(QUICK, tmp_path, progress=False)
    with pytest.raises(ValueError, match='lr is 0.01 there, 0.5 here') as error:
        pretrain(QUICK.replace(lr=0.5), tmp_path)
    assert one_line(error) and list_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="method is 'geometric' there, 'dino' here"):
        pretrain(QUICK.replace(method='dino'), tmp_path)
    pretrain(
        QUICK.replace(workers=1, checkpoint_every=1), tmp_path
    )  # what cannot change the weights may change


def test_no_checkpoint_yet_no_recipe_to_keep(tmp_path):
    def fails(method, step, views):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain(QUICK.replace(monitor_every=1), tmp_path, monitors={'m': fails}, progress=False)
    assert not list_checkpoints(tmp_path)
    run = pretrain(QUICK.replace(lr=0.02), tmp_path, progress=False)
    assert run.recipe == Recipe.load(tmp_path / 'recipe.yaml')


def test_another_architecture_lists_keys(tmp_path):
    pretrain(QUICK.replace(steps=1), tmp_path, progress=False)
    state = last_checkpoint(tmp_path)
    renamed = {k.replace('backbone.model.norm', 'backbone.final'): v for k, v in state['method'].items()}
    trainer = Trainer(QUICK, 6)
    with pytest.raises(ValueError, match='missing: .*model.norm.weight.*unexpected: .*final') as error:
        trainer.load_state_dict(dict(state, method=renamed))
    assert one_line(error)
    short = {k: v[:1] if k.endswith('model.norm.bias') else v for k, v in state['method'].items()}
    save_checkpoint(tmp_path, dict(state, method=short))
    with pytest.raises(ValueError, match=r'norm.bias \(1, here 128\)') as error:
        load_run(tmp_path)
    assert one_line(error)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Trojan:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'harm'),)

    torch.save({'step': 1, 'x': Trojan()}, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='x.pt'):
        load_checkpoint(tmp_path / 'x.pt')
    assert not (tmp_path / 'harm').exists()


def keeps_the_last_good_one(out, fill, free):
    pretrain(QUICK.replace(steps=2), out, progress=False)
    good, state = list_checkpoints(out)[-1], last_checkpoint(out)
    fill()
    with pytest.raises(OSError, match='no space left') as error:
        save_checkpoint(out, {**state, 'step': 3})
    assert error.value.errno == errno.ENOSPC and list_checkpoints(out)[-1] == good
    assert not list(good.parent.glob('*.part'))
    free()
    assert load_checkpoint(good)['step'] == 2 and save_checkpoint(out, {**state, 'step': 3}).exists()


def test_full_disk_simulated(tmp_path, monkeypatch):
    def no_space(state, file, _save=torch.save):
        file.write(b'x' * 100)
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError:
            raise RuntimeError('unexpected pos 576 vs 534')  # noqa: B904 as torch does it

    def fill():
        monkeypatch.setattr(checkpoint.torch, 'save', no_space)

    keeps_the_last_good_one(tmp_path, fill, monkeypatch.undo)


def test_full_disk_real(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('needs the right to mount a small disk')
    big = disk / 'big'

    def fill():
        with open(big, 'wb', buffering=0) as f:
            try:
                while f.write(b'\0' * 65536):
                    pass
            except OSError:
                pass

    try:
        keeps_the_last_good_one(disk / 'run', fill, big.unlink)
    finally:
        subprocess.run(['umount', disk], check=True)


def test_full_disk_in_the_log(tmp_path):
    class Small:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    log = MetricsLog(tmp_path)
    log.write(dict(step=1, loss=1.0))
    log.file = Small(log.file)
    with pytest.raises(OSError, match='no space left to write'):
        log.write(dict(step=2, loss=1.0))
    log.close()
    assert [line['step'] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_same_weights_with_workers(tmp_path, workers):
    a = pretrain(QUICK, tmp_path / 'a', progress=False)
    b = pretrain(QUICK.replace(workers=workers), tmp_path / 'b', progress=False)
    assert [line['loss'] for line in a.metrics] == [line['loss'] for line in b.metrics]


def test_bfloat16(tmp_path):
    run = pretrain(QUICK.replace(steps=2, amp=True), tmp_path, progress=False)
    assert run.metrics[-1]['step'] == 2 and next(run.backbone.parameters()).dtype == torch.float32


def test_tensorboard_gets_the_same(tmp_path):
    pretrain(QUICK.replace(steps=2), tmp_path, progress=False)
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    found = [e.value for e in events.Scalars('loss')]
    assert found == pytest.approx([line['loss'] for line in read_metrics(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_data_folder_that_vanishes_is_named_and_the_checkpoint_stays(tmp_path, workers):
    images = tmp_path / 'images'
    images.mkdir()
    for i in range(48):
        Image.effect_noise((32, 32), 50).convert('RGB').save(images / f'{i:02d}.jpg')

    def unmount(method, step, views):
        if step == 3:
            shutil.rmtree(images)
        return {}

    recipe = QUICK.replace(data=str(images), workers=workers, monitor_every=1)
    with pytest.raises((ValueError, OSError), match='images/[0-9]+.jpg') as error:
        pretrain(recipe, tmp_path / 'run', monitors={'m': unmount}, progress=False)
    # a worker is two batches ahead
    assert one_line(error) and last_checkpoint(tmp_path / 'run')['step'] == (4 if workers else 2)


def test_a_worker_that_is_killed_is_named_and_the_checkpoint_stays(tmp_path):
    class Killing:
        def __init__(self, data):
            self.data, self.labels, self.classes, self.calls = data, data.labels, data.classes, 0

        def __len__(self):
            return len(self.data)

        def __getitem__(self, i):
            self.calls += 1
            if self.calls > 36 and torch.utils.data.get_worker_info():
                os.kill(os.getpid(), signal.SIGKILL)
            return self.data[i]

    recipe, data = QUICK.replace(workers=1, checkpoint_every=1), Killing(build_dataset(QUICK))
    with pytest.raises(LoaderError, match='worker.*try fewer workers') as error:
        pretrain(recipe, tmp_path, dataset=data, progress=False)
    assert one_line(error) and 1 <= last_checkpoint(tmp_path)['step'] < 6


def test_checkpoints_by_the_clock(tmp_path):
    pretrain(QUICK.replace(checkpoint_every=1000, checkpoint_minutes=1e-9), tmp_path, progress=False)
    assert [p.name for p in list_checkpoints(tmp_path)] == ['step_00000005.pt', 'step_00000006.pt']


def test_a_full_disk_names_the_folder_and_the_bytes(tmp_path, monkeypatch):
    run = pretrain(QUICK.replace(steps=2), tmp_path, progress=False)

    def no_space(state, file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoint.torch, 'save', no_space)
    line = r'no space left in .*checkpoints: a checkpoint needs [\d,.]+ MB, [\d,.]+ MB are free'
    with pytest.raises(OSError, match=line) as error:
        pretrain(QUICK, tmp_path / 'other', progress=False)
    assert one_line(error) and last_checkpoint(run.path)['step'] == 2


@pytest.mark.parametrize('method', KINDS)
def test_a_step_that_is_not_finite_is_kept_and_left_out_whatever_the_method(tmp_path, monkeypatch, method):
    recipe = small_recipe(method, on_nan='skip')
    monkeypatch.setattr(Trainer, 'loss_terms', broken_at(4))
    run = pretrain(recipe, tmp_path, {}, progress=False)
    skipped = {line['step']: line['skipped'] for line in run.metrics if 'skipped' in line}
    assert list(skipped) == [4] and run.metrics[-1]['loss'] == run.metrics[-1]['loss']
    kept = load_checkpoint(tmp_path / 'not_finite/step_00000004.pt')
    assert kept['step'] == 3 and len(kept['index']) == recipe.batch_size
    assert kept['numbers'][skipped[4]] != kept['numbers'][skipped[4]]  # NaN
    assert finite(last_checkpoint(tmp_path)['method'])
    monkeypatch.undo()
    found = replay(tmp_path)  # without the fault: the same step, and nothing wrong with it
    assert found['step'] == 4 and found['module'] is None and not found['images'] and not found['parameters']
    healthy = {k: v for k, v in kept['numbers'].items() if k in found['terms'] and k != skipped[4]}
    assert healthy == {k: found['terms'][k] for k in healthy}


def test_a_run_that_only_skips_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, 'loss_terms', broken_at(*range(2, 40), term='region'))
    with pytest.raises(ValueError, match="step 11: 'region' is nan"):
        pretrain(QUICK.replace(on_nan='skip', steps=40), tmp_path, progress=False)
    assert len(list((tmp_path / 'not_finite').glob('*.pt'))) == 3


@pytest.mark.parametrize('method', KINDS)
def test_a_skipped_step_leaves_no_trace(monkeypatch, method):
    "Centres, queues, weights and moments after a skipped step are those from before it."
    recipe = small_recipe(method)
    data = build_dataset(recipe)
    trainer = Trainer(recipe, 6, classes=class_names(recipe, data))
    views = next(iter(batches(recipe, data, 0, 1, trainer.method.views)))
    trainer.step(views)
    before = copy.deepcopy(trainer.state_dict())
    monkeypatch.setattr(Trainer, 'loss_terms', broken_at(2))
    with pytest.raises(NotFinite):
        trainer.step(views)
    assert same(before, trainer.state_dict())
    assert all(p.grad is None for p in trainer.method.parameters())
