"""Copy and paste: what stays as it was, where masks come from, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import interrupt_at, same

from glsd.contrastive import dilo as D
from glsd.data.loading import sample_rng
from glsd.data.toyworld import ToyWorld
from glsd.objectives.method import create_method
from glsd.training import Recipe, pretrain
from glsd.training.checkpoint import last_checkpoint
from glsd.views.multicrop import MultiCrop

WORLD = ToyWorld(n=24, size=40, seed=1, shared_nuisances=True)
SIZES = dict(global_size=32, local_size=16, n_local=3)
SMALL = dict(
    data='toyworld-shared', n_images=24, image_size=32, global_size=32, backbone='resnet_mini', batch_size=8,
    steps=6, lr=1e-2, lr_batch=8, warmup=0.1, checkpoint_every=2, projector_hidden=16, projector_dim=8,
    superpixels=40, p_paste=0.5,
)  # fmt: skip


def middle(image):
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    mask[10:30, 10:30] = True
    return mask


def sample(image=WORLD[3][0], seed=0, **options):
    given = dict(foreground=middle) | options
    return D.PastingMultiCrop(**SIZES, **given).sample(image, sample_rng(seed, 0, 3))


def test_views_that_are_not_pasted_are_those_of_multicrop_to_the_bit():
    plain = MultiCrop(**SIZES).sample(WORLD[3][0], sample_rng(0, 0, 3))
    for p in 0.0, 0.4, 1.0:
        ours = sample(p_paste=p)
        assert all(torch.equal(a, b) for a, b in zip(ours.w_geo, plain.w_geo))
        assert all(torch.equal(a, b) for a, b in zip(ours.w_pho, plain.w_pho))
        same_crops = [bool((a == b).all()) for x, y in zip(ours.crops, plain.crops) for a, b in zip(x, y)]
        assert {0.0: all, 0.4: any, 1.0: lambda x: not any(x)}[p](same_crops)
        assert p != 0.4 or not all(same_crops)


def test_the_object_is_where_it_was():
    "Without blending, a crop of the pasted image equals the plain crop well inside of the object."
    image = WORLD[3][0]
    everything = sample(image, p_paste=1.0, blend='none', background='grey')
    plain = MultiCrop(**SIZES).sample(image, sample_rng(0, 0, 3))
    marked = image.clone()
    marked[:, 14:26, 14:26] = 255 - marked[:, 14:26, 14:26]  # four pixels inside of the mask's edge
    where = sample(marked, p_paste=1.0, blend='none', background='grey')
    plain_marked = MultiCrop(**SIZES).sample(marked, sample_rng(0, 0, 3))
    for a, b, c, d in zip(everything.crops, plain.crops, where.crops, plain_marked.crops):
        changed = (b.int() - d.int()).abs() > 8  # where the mark shows
        assert torch.equal(changed, (a.int() - c.int()).abs() > 8)


def test_the_share_of_pasted_views():
    plain = MultiCrop(**SIZES)
    ours = D.PastingMultiCrop(**SIZES, p_paste=0.3, foreground=middle)
    pasted, n = 0, 0
    for i in range(150):
        a, b = (m.sample(WORLD[i % 24][0], sample_rng(1, i, i)) for m in (plain, ours))
        pasted += sum(not torch.equal(x, y) for p, q in zip(a.crops, b.crops) for x, y in zip(p, q))
        n += 5
    assert abs(pasted / n - 0.3) < 0.06


@pytest.mark.parametrize('background', D.BACKGROUNDS)
@pytest.mark.parametrize('blend', D.BLENDS)
def test_the_same_draw_gives_the_same_view(background, blend):
    options = dict(p_paste=1.0, background=background, blend=blend, pool=WORLD)
    a, b, c = sample(**options), sample(**options), sample(seed=1, **options)
    assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops))
    assert not torch.equal(a.crops[0], c.crops[0])


@pytest.mark.parametrize('share', ['nothing', 'everything'])
def test_images_without_an_object_stay_as_they_are(share):
    mask = torch.full((40, 40), share == 'everything')
    plain = MultiCrop(**SIZES).sample(WORLD[3][0], sample_rng(0, 0, 3))
    assert torch.equal(sample(p_paste=1.0, foreground=lambda x: mask).crops[0], plain.crops[0])


def test_grey_images_and_workers():
    grey = WORLD[3][0][:1]
    multicrop = D.PastingMultiCrop(**SIZES, p_paste=1.0, superpixels=40)
    copy = pickle.loads(pickle.dumps(multicrop))
    a, b = (m.sample(grey, sample_rng(0, 0, 3)) for m in (multicrop, copy))
    assert torch.equal(a.crops[0], b.crops[0]) and a.crops[0].shape == (2, 3, 32, 32)


def test_masks_of_a_folder(tmp_path):
    D.save_masks(WORLD, tmp_path, lambda i, image: middle(image))
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    D.save_masks(WORLD, tmp_path, lambda i, image: 1 / 0)  # all are there
    assert kept == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} and len(kept) == 24
    masks = D.Foregrounds(str(tmp_path))
    assert torch.equal(masks(WORLD[0][0]), middle(WORLD[0][0]))
    with pytest.raises(ValueError) as e:
        masks(255 - WORLD[0][0])
    assert str(e.value).startswith('no mask for an image of 40 x 40 pixels in') and '\n' not in str(e.value)
    path = tmp_path / f'{D.image_key(WORLD[1][0])}.png'
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r'a mask of \[3, 5\] for an image of \[40, 40\]'):
        masks(WORLD[1][0])


def test_memory_is_bounded():
    masks = D.Foregrounds('gs', n=20, keep=450)  # 200 bytes a mask
    for i in range(4):
        masks(WORLD[i][0])
    assert len(masks.known) == 2 and torch.equal(masks(WORLD[3][0]), D.Foregrounds('gs', 20)(WORLD[3][0]))


def test_other_backgrounds_from_a_folder(tmp_path):
    for i in range(3):
        Image.fromarray(WORLD[i][0].permute(1, 2, 0).numpy()).save(tmp_path / f'{i}.png')
    multicrop = create_method('dilo', backbone='resnet_mini', background=str(tmp_path)).views
    assert multicrop.background == 'images' and len(multicrop.pool) == 3


def test_a_run_that_was_cut_goes_on_bit_equal(tmp_path):
    recipe = Recipe('dilo', **SMALL)
    pretrain(recipe, tmp_path / 'straight', {}, progress=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'cut', {'m': interrupt_at(3)}, progress=False)
    pretrain(recipe.replace(workers=1), tmp_path / 'cut', {}, progress=False)
    a, b = (last_checkpoint(tmp_path / name) for name in ('straight', 'cut'))
    assert same(a['method'], b['method']) and same(a['optimizer'], b['optimizer'])


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(p_paste=1.5), 'p_paste=1.5 is a share of the views'),
        (dict(blend='poisson'), "no blend 'poisson'; choose from: none, gaussian, mix"),
        (dict(blend_sigma=0.0), 'blend_sigma=0.0 must be positive'),
        (dict(superpixels=1), 'blend_sigma=1.0 must be positive, superpixels=1 at least 2'),
        (dict(foreground='masks/of/nobody'), "foreground 'masks/of/nobody' is neither a folder of masks nor"),
        (dict(background='meadow'), "background 'meadow' is neither a folder of images nor grey or texture"),
        (dict(background='images'), "background='images' needs a pool of images: name their folder instead"),
    ],
)
def test_bad_options_are_one_line(options, message):
    for call in (lambda: Recipe('dilo', **options), lambda: D.PasteViews(**options).multicrop()):
        with pytest.raises(ValueError) as e:
            call()
        assert message in str(e.value) and '\n' not in str(e.value)


def test_bad_pictures_are_one_line():
    image, mask = WORLD[0][0], middle(WORLD[0][0])
    with pytest.raises(ValueError, match='image, mask and background must be of one size'):
        D.paste(image, mask[:10], image)
    with pytest.raises(ValueError, match="background 'sky' is none of grey, texture, images"):
        D.draw_background('sky', (8, 8), np.random.default_rng(0))
