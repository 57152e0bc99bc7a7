"Loading with real worker processes, and what happens when one of them dies."

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data.folders import ImageFolder
from glsd.data.loading import LoaderError, eval_loader, make_loader
from glsd.views.multicrop import MultiCrop

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
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(
            root / f'c{k % 2}/{k:02}.{"jpg" if k % 3 else "png"}'
        )
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
        seen = torch.cat(
            [v.index for v in make_loader(ImageFolder(folder), MULTICROP, 4, epoch=epoch, drop_last=False)]
        )
        assert sorted(seen.tolist()) == list(range(14))


class Dies:
    "A data set whose image 5 kills the process that asks for it."

    labels, classes = np.zeros(8, np.int64), ['x']

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 40, 40, dtype=torch.uint8), 0


def test_a_dying_worker_is_one_line():
    with pytest.raises(LoaderError) as e:
        list(make_loader(Dies(), MULTICROP, 2, workers=1))
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


class Buggy(Dies):
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


def test_eval_loader_keeps_order_and_shape_for_any_image(folder):
    ds = ImageFolder(folder)
    crops, labels, index = map(torch.cat, zip(*eval_loader(ds, 24, batch_size=5, workers=2)))
    assert (
        crops.shape == (14, 3, 24, 24)
        and index.tolist() == list(range(14))
        and labels.tolist() == ds.labels.tolist()
    )
