"Loading with real worker processes, over one epoch and over a whole run, and what happens when one exits."

import math
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data.folders import ImageFolder
from glsd.data.loading import LoaderError, eval_crop, eval_loader, make_loader, step_indices, step_loader
from glsd.data.toyworld import ToyWorld
from glsd.views.multicrop import MultiCrop, Views
from glsd.views.photometric import normalize

pytestmark = pytest.mark.filterwarnings(
    'ignore:The image decoding', 'ignore:This DataLoader', 'ignore:Truncated File'
)

MULTICROP = MultiCrop(global_size=32, local_size=16, n_local=2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for k in range(14):
        (root / f'c{k % 2}').mkdir(exist_ok=True)
        h, w = rng.integers(1, 60, 2)
        name = f'c{k % 2}/{k:02}.{"jpg" if k % 3 else "png"}'
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(root / name)
    return root


def tensors(views):
    return [*views.crops, *views.w_geo, views.index, views.label]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_same_views_with_any_workers_start_threads(folder):
    ds = ImageFolder(folder)
    reference = list(make_loader(ds, MULTICROP, 4, seed=3, epoch=2))
    assert len(reference) == 3
    for workers in (0, 1, 3):
        for start in (0, 2):
            got = list(make_loader(ds, MULTICROP, 4, seed=3, epoch=2, workers=workers, start=start))
            assert len(got) == 3 - start and all(map(same, reference[start:], got))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert all(map(same, reference, make_loader(ds, MULTICROP, 4, seed=3, epoch=2)))
    finally:
        torch.set_num_threads(threads)


def test_epochs_cover_every_image_once(folder):
    for epoch in range(3):
        loader = make_loader(ImageFolder(folder), MULTICROP, 4, epoch=epoch, drop_last=False)
        seen = torch.cat([v.index for v in loader])
        assert sorted(seen.tolist()) == list(range(14))


class Killed:
    "A data set whose image 5 ends the process that reads it."

    labels, classes = np.zeros(8, np.int64), ['x']

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 40, 40, dtype=torch.uint8), 0


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(LoaderError) as e:
        list(make_loader(Killed(), MULTICROP, 2, workers=1))
    assert '\n' not in str(e.value) and 'fewer workers' in str(e.value)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_file_is_one_line(folder, tmp_path, workers):
    Image.new('RGB', (30, 30)).save(tmp_path / 'good.png')
    (tmp_path / 'bad.png').write_bytes((tmp_path / 'good.png').read_bytes()[:60])
    for loader in (
        make_loader(ImageFolder(tmp_path), MULTICROP, 2, workers=workers),
        eval_loader(ImageFolder(tmp_path), 16, workers=workers),
    ):
        with pytest.raises(ValueError, match='bad.png') as e:
            list(loader)
        assert '\n' not in str(e.value)


class Buggy(Killed):
    def __getitem__(self, i):
        return self.no_such_thing


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bug_in_a_data_set_keeps_its_traceback(workers):
    with pytest.raises(AttributeError, match='no_such_thing'):
        list(make_loader(Buggy(), MULTICROP, 2, workers=workers))


def test_too_few_images(folder):
    with pytest.raises(ValueError, match='14 images are fewer than a batch of 15'):
        make_loader(ImageFolder(folder), MULTICROP, 15)
    assert len(make_loader(ImageFolder(folder), MULTICROP, 15, drop_last=False)) == 1
    for start in (-1, 4):
        with pytest.raises(ValueError, match='the epoch has 3'):
            make_loader(ImageFolder(folder), MULTICROP, 4, start=start)
    with pytest.raises(ValueError, match='14 images are fewer than a batch of 15'):
        step_loader(ImageFolder(folder), MULTICROP, 15, 0, 0, 3)


def test_parts_that_are_not_equal(folder):
    for make in (
        lambda **k: make_loader(ImageFolder(folder), MULTICROP, 4, **k),
        lambda **k: step_loader(ImageFolder(folder), MULTICROP, 4, 0, 0, 3, **k),
    ):
        with pytest.raises(ValueError, match='a batch of 4 cannot be shared equally by 3 processes') as e:
            make(world_size=3)
        assert '\n' not in str(e.value)


def test_eval_loader_keeps_order_and_shape_for_any_image(folder):
    ds = ImageFolder(folder)
    crops, labels, index = map(torch.cat, zip(*eval_loader(ds, 24, batch_size=5, workers=2)))
    assert crops.shape == (14, 3, 24, 24) and index.tolist() == list(range(14))
    assert labels.tolist() == ds.labels.tolist()


def test_eval_loader_takes_the_constants_of_published_weights(folder):
    ds, half = ImageFolder(folder), (0.5, 0.5, 0.5)
    config = dict(mean=half, std=half, crop_pct=1.0, interpolation='bilinear')  # timm's names
    crops, _, _ = next(iter(eval_loader(ds, 24, batch_size=5, **config)))
    for crop, i in zip(crops, range(5)):
        expected = normalize(eval_crop(ds[i][0], 24, 1.0, 'bilinear')[None], half, half)[0]
        assert torch.equal(crop, expected)
    assert not torch.equal(crops, next(iter(eval_loader(ds, 24, batch_size=5)))[0])


def one_loader_an_epoch(dataset, batch_size, seed, start, steps, rank=0, world_size=1):
    "The batches of steps `start` to `steps` - 1 as training made them before `step_loader`."
    per_epoch = len(dataset) // batch_size
    for epoch in range(start // per_epoch, math.ceil(steps / per_epoch)):
        first = start % per_epoch if epoch == start // per_epoch else 0
        options = dict(seed=seed, epoch=epoch, start=first, rank=rank, world_size=world_size)
        loader = make_loader(dataset, MULTICROP, batch_size, **options)
        yield from islice(loader, steps - epoch * per_epoch - first)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('start, steps', [(0, 8), (2, 7), (3, 9), (4, 5), (5, 5)])
def test_one_loader_for_a_run_gives_the_batches_of_one_an_epoch(folder, workers, start, steps):
    "Three batches an epoch: over its border, from its middle, within it, and nothing at all."
    ds = ImageFolder(folder)
    expected = list(one_loader_an_epoch(ds, 4, 3, start, steps))
    loader = step_loader(ds, MULTICROP, 4, 3, start, steps, workers=workers)
    got = list(loader)
    assert len(loader) == len(got) == len(expected) == steps - start
    assert all(map(same, expected, got))
    for step, views in zip(range(start, steps), got):
        epoch, indices = step_indices(ds, 4, 3, step)
        assert epoch == step // 3 and indices.tolist() == views.index.tolist()


def test_processes_share_every_step(folder):
    ds = ImageFolder(folder)
    whole = list(step_loader(ds, MULTICROP, 4, 0, 2, 5))
    parts = [list(step_loader(ds, MULTICROP, 4, 0, 2, 5, rank=r, world_size=2)) for r in (0, 1)]
    for views, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(views.index, torch.cat([a.index, b.index]))
        assert all(torch.equal(x, torch.cat([y, z], 1)) for x, y, z in zip(views.crops, a.crops, b.crops))
    for rank in (0, 1):
        assert all(map(same, parts[rank], one_loader_an_epoch(ds, 4, 0, 2, 5, rank, 2)))


def test_a_data_set_with_an_order_of_its_own_is_visited_in_it():
    world = ToyWorld(12, 16)
    world.order = lambda seed, epoch: np.roll(np.arange(12), epoch)
    seen = [v.index.tolist() for v in step_loader(world, MULTICROP, 5, 0, 0, 4)]
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [11, 0, 1, 2, 3], [4, 5, 6, 7, 8]]


class ProcessOf:
    "A data set whose labels are the processes that read them."

    labels, classes = np.zeros(8, np.int64), ['x']

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.zeros(3, 20, 20, dtype=torch.uint8), os.getpid()


def test_workers_live_for_the_whole_run():
    seen = torch.cat([v.label for v in step_loader(ProcessOf(), MULTICROP, 4, 0, 0, 10, workers=2)])
    assert len(set(seen.tolist())) == 2 and os.getpid() not in seen.tolist()  # five epochs, two processes


def test_errors_in_a_run_are_one_line():
    with pytest.raises(LoaderError, match='fewer workers'):
        list(step_loader(Killed(), MULTICROP, 2, 0, 0, 8, workers=1))
    with pytest.raises(AttributeError, match='no_such_thing'):
        list(step_loader(Buggy(), MULTICROP, 2, 0, 0, 8, workers=1))


def test_nothing_is_pinned_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(Views, 'pin_memory', lambda views: 1 / 0)
    assert len(list(step_loader(ToyWorld(8, 16), MULTICROP, 4, 0, 0, 3, pin_memory=True))) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('workers', [0, 2])
def test_pinned_batches_are_the_same(workers):
    world = ToyWorld(8, 16)
    plain = list(step_loader(world, MULTICROP, 4, 0, 0, 3, workers=workers))
    for pinned, views in zip(
        step_loader(world, MULTICROP, 4, 0, 0, 3, workers=workers, pin_memory=True), plain, strict=True
    ):
        assert all(c.is_pinned() for c in pinned.crops) and same(pinned, views)
        there = pinned.to('cuda', non_blocking=True)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there.crops, views.crops))
