"""Multi-crop: boxes and pixels as torchvision's, true geometry, one sample from one generator, odd images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from glsd.views.geometry import token_centers
from glsd.views.multicrop import MultiCrop, Views, crop, draw_box
from glsd.views.photometric import Photometric, denormalize


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise_image(h, w, seed=0):
    return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generators(n, seed=0):
    return [np.random.default_rng((seed, i)) for i in range(n)]


@pytest.mark.parametrize('size', [(375, 500), (32, 32), (200, 20)])
@pytest.mark.parametrize('scale', [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_like_torchvisions(size, scale):
    n, rng = 2000, np.random.default_rng(0)
    torch.manual_seed(0)
    ours = np.array([draw_box(size, scale, (3 / 4, 4 / 3), rng) for _ in range(n)], dtype=float)
    image = torch.zeros(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)], dtype=float
    )[:, [1, 0, 3, 2]]
    error = np.sqrt((ours.var(0) + theirs.var(0)) / n)
    assert (abs(ours.mean(0) - theirs.mean(0)) <= 5 * error + 1e-9).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=0.05)
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        np.quantile(ours, quantiles, axis=0),
        np.quantile(theirs, quantiles, axis=0),
        atol=0.04 * max(size) + 1,
    )
    x, y, w, h = ours.T
    assert (x >= 0).all() and (x + w <= size[1]).all() and (w >= 1).all()
    assert (y >= 0).all() and (y + h <= size[0]).all() and (h >= 1).all()


@pytest.mark.parametrize('box', [(10, 20, 130, 140), (0, 0, 200, 150), (50, 60, 58, 70), (199, 0, 200, 150)])
@pytest.mark.parametrize('size', [32, 96])
def test_crops_are_torchvisions(box, size):
    image = F.interpolate(noise_image(40, 50)[None], (150, 200), mode='bicubic')[0]
    x0, y0, x1, y1 = box
    w_geo = torch.tensor([[*box, size, size, 0], [*box, size, size, 1]], dtype=torch.float32)
    ours = crop(image, w_geo).float()
    where = y0, x0, y1 - y0, x1 - x0, [size, size], InterpolationMode.BICUBIC
    tensor = TF.resized_crop(image, *where, antialias=True)
    pil = TF.pil_to_tensor(TF.resized_crop(TF.to_pil_image(image), *where))
    assert (ours[0] - tensor).abs().mean() < 1 and (ours[0] - pil).abs().mean() < 1
    assert torch.equal(ours[1], ours[0].flip(-1))


def test_w_geo_tells_where_every_token_looks():
    y, x = torch.meshgrid(torch.arange(240.0), torch.arange(240.0), indexing='ij')
    compass = torch.stack([x, y, 0 * x]).byte()
    sample = MultiCrop(64, 32).sample(compass, np.random.default_rng(0))
    for crops, w_geo in zip(sample.crops, sample.w_geo):
        grid = (crops.shape[-1] // 16,) * 2
        seen = F.avg_pool2d(crops.float(), 16)[:, :2].flatten(2).transpose(1, 2) + 0.5
        assert (seen - token_centers(w_geo, grid)).abs().max() < 2
    assert {0.0, 1.0} == set(torch.cat(sample.w_geo)[:, 6].tolist())


def test_half_of_the_views_are_flipped():
    m = MultiCrop(32, 16)
    flips = torch.cat([torch.cat(m.draw((50, 50), rng)[0])[:, 6] for rng in generators(500)])
    assert abs(flips.mean() - 0.5) < 0.04


@pytest.mark.parametrize('sizes, B', [((224, 96), 3), ((32, 16), 20)])
def test_a_sample_is_the_same_in_any_batch_and_on_any_number_of_threads(sizes, B):
    m, images = MultiCrop(*sizes), [noise_image(90 + 7 * i, 120 - 3 * i, i) for i in range(B)]
    together = m(images, generators(B))
    for i in (0, B - 1):
        single = m([images[i]], [generators(B)[i]])
        for a, b in zip(together.crops + together.w_geo, single.crops + single.w_geo):
            assert torch.equal(a[:, i : i + 1], b)
    torch.set_num_threads(2)
    again = m(images, generators(B))
    assert all(torch.equal(a, b) for a, b in zip(together.crops + together.w_geo, again.crops + again.w_geo))


def test_memory_layout_of_the_image_does_not_matter():
    image = noise_image(70, 80)
    other = image[None].contiguous(memory_format=torch.channels_last)[0]
    a, b = (MultiCrop(32, 16).sample(i, np.random.default_rng(0)) for i in (image, other))
    assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops))


@pytest.mark.parametrize('shape', [(3, 1, 1), (3, 1, 300), (3, 300, 1), (3, 2, 3), (3, 16, 16), (1, 40, 50)])
def test_small_narrow_and_grey_images(shape):
    image = noise_image(*shape[1:])[: shape[0]]
    views = MultiCrop(32, 16)([image] * 3, generators(3))
    assert views.crops[0].shape == (2, 3, 3, 32, 32) and views.crops[1].shape == (8, 3, 3, 16, 16)
    assert all(c.isfinite().all() for c in views.crops)
    for w in views.w_geo:
        assert (
            (w[..., 2] > w[..., 0]).all() and (w[..., 3] > w[..., 1]).all() and (w[..., 2] <= shape[2]).all()
        )


@pytest.mark.parametrize(
    'image',
    [
        torch.zeros(3, 8, 8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image):
    with pytest.raises(ValueError, match='an image must be uint8') as e:
        MultiCrop(32, 16).sample(image, np.random.default_rng(0))
    assert '\n' not in str(e.value)


def test_views_know_their_samples():
    m = MultiCrop(16, 8, n_local=2)
    samples = [m.sample(noise_image(20, 20, i), rng) for i, rng in enumerate(generators(4))]
    views = m.collate(samples, index=[7, 5, 3, 1], label=np.array([0, -1, 2, 1]))
    assert views.index.dtype == views.label.dtype == torch.long and views.index.tolist() == [7, 5, 3, 1]
    assert (views.batch_size, views.n_views) == (4, 4)
    double = views.to('cpu', copy=True)
    assert torch.equal(double.crops[1], views.crops[1])
    assert double.crops[1].data_ptr() != views.crops[1].data_ptr()


def test_views_need_no_labels():
    crops, w_geo = [torch.zeros(2, 3, 3, 8, 8)], [torch.zeros(2, 3, 7)]
    views = Views(crops, w_geo, torch.arange(3))
    assert views.label is None and views.to('cpu').label is None and views.to('meta').label is None


def test_clips_are_moved_and_all_their_frames_get_the_same_colours():
    m = MultiCrop(16, 8, n_local=2, colour_on_device=True)
    images = [noise_image(20, 20, i) for i in range(3)]
    views = m(images, generators(3))
    stills = [c[:, :, :, None].expand(-1, -1, -1, 4, -1, -1).contiguous() for c in views.crops]
    clips = Views(stills, views.w_geo, views.index, views.label, w_pho=views.w_pho)
    assert (clips.batch_size, clips.n_views) == (3, 4)
    done, expected = clips.to('cpu'), views.to('cpu')
    for clip, image in zip(done.crops, expected.crops):
        assert clip.dtype == torch.float32 and clip.is_contiguous()
        assert all(torch.equal(clip[:, :, :, t], image) for t in range(4))


def test_what_a_loader_pins_is_every_tensor(monkeypatch):
    "Without a GPU nothing can be pinned, so it is the call that is tested here."
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda t: pinned.append(t) or t.clone())
    views = MultiCrop(16, 8, n_query=2, query_size=4, colour_on_device=True)(
        [noise_image(20, 20)], generators(1)
    )
    same = views.pin_memory()
    tensors = [
        *views.crops,
        *views.w_geo,
        *views.w_pho,
        views.index,
        views.label,
        views.queries,
        views.w_query,
    ]
    assert len(pinned) == len(tensors) and {id(t) for t in pinned} == {id(t) for t in tensors}
    assert all(torch.equal(a, b) for a, b in zip(same.crops, views.crops)) and same.w_pho is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_pinned_views_reach_the_device_with_their_colours():
    m = MultiCrop(32, 16, colour_on_device=True)
    views = m([noise_image(40, 50, i) for i in range(4)], generators(4))
    pinned = views.pin_memory()
    assert all(c.is_pinned() for c in pinned.crops)
    there = pinned.to('cuda', non_blocking=True)
    for a, b in zip(there.crops, views.to('cpu').crops):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-4)


def test_queries_change_nothing_and_do_not_depend_on_their_number():
    images = [noise_image(50, 60, i) for i in range(3)]
    without, three, ten = (
        MultiCrop(32, 16, n_query=n, query_size=8)(images, generators(3)) for n in (0, 3, 10)
    )
    for a, b, c in zip(without.crops + without.w_geo, three.crops + three.w_geo, ten.crops + ten.w_geo):
        assert torch.equal(a, b) and torch.equal(b, c)
    assert without.queries is None and without.w_query is None
    assert ten.queries.shape == (10, 3, 3, 8, 8) and ten.w_query.shape == (10, 3, 7)
    assert torch.equal(three.queries, ten.queries[:3]) and torch.equal(three.w_query, ten.w_query[:3])
    assert (ten.n_views, len(ten.crops)) == (10, 2)


def test_a_query_larger_than_a_view_is_one_clear_line():
    with pytest.raises(ValueError, match='MultiCrop: a query of 96 pixels is larger than a global view') as e:
        MultiCrop(64, n_query=10, query_size=96)
    assert '\n' not in str(e.value)


def test_default_colours_of_the_views():
    w_pho = [MultiCrop(32, 16).draw((32, 32), rng)[1] for rng in generators(800)]
    first, second = torch.stack([w[0] for w in w_pho]).unbind(1)
    local = torch.cat([w[1] for w in w_pho])
    blurred, solarized = (
        [(w[:, c] > 0).float().mean().item() for w in (first, second, local)] for c in (9, 10)
    )
    np.testing.assert_allclose(blurred, [1, 0.1, 0.5], atol=0.05)
    np.testing.assert_allclose(solarized, [0, 0.2, 0], atol=0.06)


def test_strength_scales_the_jitter_and_nothing_else():
    full, half = (
        torch.cat([torch.cat(MultiCrop(32, 16, strength=s).draw((32, 32), rng)[1]) for rng in generators(50)])
        for s in (1.0, 0.5)
    )
    torch.testing.assert_close(half[:, 4:7] - 1, (full[:, 4:7] - 1) / 2)
    torch.testing.assert_close(half[:, 7], full[:, 7] / 2)
    assert torch.equal(half[:, [0, 1, 2, 3, 8, 9, 10]], full[:, [0, 1, 2, 3, 8, 9, 10]])


@pytest.mark.parametrize(
    'wrong',
    [
        dict(n_global=0),
        dict(n_local=-1),
        dict(global_scale=(0.0, 1.0)),
        dict(local_scale=(0.4, 0.1)),
        dict(ratio=(2.0, 1.0)),
        dict(global_size=0),
        dict(photometric=[Photometric()]),
        dict(n_query=-1),
        dict(query_scale=(0.5, 1.5)),
        dict(query_size=0),
    ],
)
def test_wrong_settings_are_one_clear_line(wrong):
    with pytest.raises(ValueError, match='MultiCrop: .*' + next(iter(wrong))) as e:
        MultiCrop(**wrong)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('more', [{}, dict(n_query=3, query_size=8)])
def test_colours_on_the_device_are_the_same_bits(more):
    images = [noise_image(50, 60, i) for i in range(5)]
    now, later = (MultiCrop(32, 16, colour_on_device=c, **more)(images, generators(5)) for c in (False, True))
    assert (
        all(c.dtype == torch.uint8 for c in later.crops)
        and now.w_pho is None
        and len(later.w_pho) == 2 + bool(more)
    )
    done = later.to('cpu')
    assert done.w_pho is None and all(
        torch.equal(a, b) for a, b in zip(done.crops + done.w_geo, now.crops + now.w_geo)
    )
    if more:
        assert torch.equal(done.queries, now.queries) and torch.equal(done.w_query, now.w_query)


@pytest.mark.parametrize('on_device', [False, True])
def test_crops_alone_have_the_colours_of_the_image(on_device):
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = [Photometric(p_jitter=1.0)] * 4  # what a method may have chosen
    m = MultiCrop(
        32,
        16,
        n_local=2,
        n_query=1,
        query_size=8,
        crop_only=True,
        photometric=own,
        colour_on_device=on_device,
    )
    views, cropped = (
        m([image], [np.random.default_rng(3)]).finish(),
        m.sample(image, np.random.default_rng(3)),
    )
    for view, plain in zip([*views.crops, views.queries], cropped.crops):
        assert torch.equal(denormalize(view[:, 0]), plain)


def test_turned_views_are_those_of_the_same_chance_turned():
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options, turns = dict(n_local=0, n_global=1, crop_only=True), set()
    for seed in range(12):
        plain, turned = (
            MultiCrop(32, rotate=rotate, **options).sample(image, np.random.default_rng(seed))
            for rotate in (False, True)
        )
        quarter = int(turned.w_geo[0][0, 6] - plain.w_geo[0][0, 6]) // 2
        assert torch.equal(turned.crops[0][0], torch.rot90(plain.crops[0][0], quarter, (1, 2)))
        turns.add(quarter)
    assert turns == {0, 1, 2, 3}
