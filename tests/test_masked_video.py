"""Video: masks and targets equal to the authors' values, clips as views, learning, and what cannot be."""

import sys
import types

import numpy as np
import pytest
import torch
from golden_values import golden
from PIL import Image
from test_masked_maskfeat import falls as falls_on_images
from training_runs import interrupt_at, same, small_recipe

from glsd.backbones import create_backbone
from glsd.data.loading import sample_rng
from glsd.data.toyworld import ToyWorld
from glsd.masked import clips as clips_module
from glsd.masked.clips import ClipFolder, ClipOptions, ToyClips, sample_frames
from glsd.masked.maskfeat import HOGTarget, repeat_mask
from glsd.masked.video import CUBES, cube_mask, middle_frames
from glsd.objectives.method import create_method
from glsd.training import pretrain
from glsd.training.checkpoint import last_checkpoint

SMALL = dict(backbone='mvit_mini', global_size=32, frames=8, frame_stride=1, mask_unit=0)


@pytest.fixture(scope='module')
def values():
    return golden('maskfeat_hog')


def test_cubes_have_the_statistics_of_the_released_code(values):
    z, meta = values
    m, rng = meta['masks']['cube'], np.random.default_rng(0)
    frequency = z['mask_cube_frequency'].numpy()
    area = m['min_block'], m['max_block']
    masks = np.stack([cube_mask(frequency.shape, m['wanted'], rng, area) for _ in range(1000)])
    counts = masks.sum((1, 2, 3))
    assert counts.max() <= m['wanted'] and abs(masks.mean() - m['mean_ratio']) < 0.001
    assert abs(counts.std() - m['std_count']) < 0.5
    assert abs(masks.mean(0) - frequency).max() < 0.07


def test_targets_are_those_of_the_middle_frames(values):
    z, meta = values
    clip, theirs = z['video'], z['video_targets']
    frames = middle_frames(clip, meta['video']['temporal_stride'])

    class Cell:
        hog_cell = 8

    ours = HOGTarget(meta['images']['patch'], Cell)(frames).view(theirs.shape)
    assert ((ours - theirs).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize('kind', CUBES)
@pytest.mark.parametrize('grid', [(2, 2, 2), (4, 4, 4), (8, 7, 7), (2, 3, 5)])
def test_every_kind_hides_the_same_number_each_time(kind, grid):
    rng, n = np.random.default_rng(0), int(np.prod(grid))
    counts = {int(CUBES[kind](grid, max(1, round(0.4 * n)), rng).sum()) for _ in range(10)}
    assert len(counts) == 1 and 0 < counts.pop() < n


def clips(n=8, frames=8, size=40):
    return ToyClips(ToyWorld(n, size), frames)


def batch(method, n=8):
    data = clips(n)
    return method.views([data[i][0] for i in range(n)], [sample_rng(0, 0, i) for i in range(n)])


@pytest.mark.parametrize('backbone', ['mvit_mini', 'vivit_mini', 'vivit_frames_mini'])
def test_the_error_falls(backbone, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr('test_masked_maskfeat.batch_of', batch)
    first, last = falls_on_images(create_method('maskfeat_video', **SMALL | dict(backbone=backbone)), steps=8)
    assert last < 0.9 * first


def test_no_hidden_cube_is_seen():
    method = create_method('maskfeat_video', **SMALL).eval()
    x, hidden = torch.randn(2, 3, 8, 32, 32), method.draw(2)
    inside = repeat_mask(hidden, method.grid, (8, 32, 32)).view(2, 1, 8, 32, 32)
    other = torch.where(inside, torch.randn_like(x), x)
    assert torch.equal(method.predict(x, hidden), method.predict(other, hidden))


def test_goes_on_bit_equal(tmp_path):
    recipe = small_recipe('maskfeat_video', n_images=16)
    pretrain(recipe, tmp_path / 'straight', {}, progress=False)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'cut', {'m': interrupt_at(3)}, progress=False)
    pretrain(recipe, tmp_path / 'cut', {}, progress=False)
    a, b = (last_checkpoint(tmp_path / name) for name in ('straight', 'cut'))
    assert {k: same(a[k], b[k]) for k in a} == dict.fromkeys(a, True)


def test_half_a_batch_on_each_of_two_processes_is_the_whole(monkeypatch):
    "What several processes compute: the mean of their gradients. The masks are those of the whole batch."
    method = create_method('maskfeat_video', **SMALL).double()
    views = batch(method, 4)
    views.crops = [c.double() for c in views.crops]
    masks = method.draw(4)

    def gradient(chosen):
        part = types.SimpleNamespace(crops=[views.crops[0][:, chosen]])
        monkeypatch.setattr(type(method), 'draw', lambda self, n: masks[chosen])
        method.zero_grad()
        method.training_step(part, {})['hog'].backward()
        return [p.grad.clone() for p in method.parameters()]

    whole, first, second = (gradient(s) for s in (slice(0, 4), slice(0, 2), slice(2, 4)))
    for w, a, b in zip(whole, first, second):
        torch.testing.assert_close((a + b) / 2, w, rtol=1e-6, atol=1e-9)


def save_frames(folder, frames):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f'{t:05}.png')


def test_a_folder_of_frames_trains(tmp_path):
    data = clips(4)
    for i in range(4):
        save_frames(tmp_path / 'videos' / f'video{i}', data[i][0])
    recipe = small_recipe('maskfeat_video', data=str(tmp_path / 'videos'), batch_size=2, steps=2)
    run = pretrain(recipe, tmp_path / 'run', {}, progress=False)
    assert [line['step'] for line in run.metrics] == [1, 2]


def test_a_clip_has_one_box_and_one_moment():
    views = ClipOptions(global_size=16, n_global=2, n_local=1, local_size=8, frames=3, frame_stride=2)
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 20, 20)
    multicrop = views.multicrop()
    sample = multicrop.sample(x, np.random.default_rng(0))
    assert [c.shape for c in sample.crops] == [(2, 3, 3, 16, 16), (1, 3, 3, 8, 8)]
    times = sample.crops[0][0, 0, :, 0, 0]
    assert torch.equal(times[1:] - times[:-1], torch.full((2,), 2, dtype=torch.uint8))
    assert multicrop.collate([sample, sample]).crops[0].shape == (2, 2, 3, 3, 16, 16)


def test_frames_from_a_decoder(tmp_path, monkeypatch):
    "With stand-ins for PyAV: a video of three frames, one that is damaged, and no decoder at all."
    for name in 'good.mp4', 'bad.mp4':
        (tmp_path / name).write_bytes(b'-')

    class Frame:
        def to_ndarray(self, format):
            return np.zeros((4, 6, 3), np.uint8)

    class Container:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def decode(self, video):
            return [Frame()] * 3

    def open_(path):
        if 'bad' in path:
            raise OSError('Invalid data found\nwhen processing input')
        return Container()

    stand_in = types.ModuleType('av')
    stand_in.open = open_
    stand_in.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, 'torchcodec', None)
    monkeypatch.setitem(sys.modules, 'av', stand_in)
    monkeypatch.setattr(clips_module, 'find_decoder', lambda path: clips_module._av)
    data = ClipFolder(tmp_path)
    assert data.names == ['bad.mp4', 'good.mp4'] and data[1][0][[0, 2]].shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match=r'bad.mp4 cannot be decoded: Invalid data found$'):
        len(data[0][0])


def test_no_decoder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'a.mp4').write_bytes(b'-')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='videos need PyAV or torchcodec, and neither is installed') as e:
        ClipFolder(tmp_path)
    assert '\n' not in str(e.value)


def test_folders_without_videos_are_one_line(tmp_path):
    with pytest.raises(ValueError, match='neither images nor videos'):
        ClipFolder(tmp_path)
    with pytest.raises(ValueError, match='no such folder'):
        ClipFolder(tmp_path / 'nowhere')


def test_a_video_that_is_too_short_is_one_line():
    with pytest.raises(ValueError, match='a video of 8 frames is too short for a clip of 16, 4 apart'):
        sample_frames(8, 16, 4)
    assert sample_frames(1, 1, 4) == [0]


@pytest.mark.parametrize(
    'values, message',
    [
        (dict(frames=1), 'a clip of 1 frames is shorter than the tubelets of 2 frames of mvit_mini'),
        (dict(frames=5), 'a clip of 5 frames does not divide into the tubelets of 2 frames'),
        (dict(backbone='vit_mini'), 'maskfeat_video needs a backbone for clips'),
        (dict(mask='block'), "no mask 'block' of clips"),
        (dict(mask_unit=12), 'mask_unit=12: units of that many pixels do not fill 4 x 4 tokens of 8'),
        (dict(global_size=36), 'clips of 36 x 36 pixels do not divide into tokens of 8'),
        (dict(mask_ratio=0.999), 'a mask ratio of 0.999 hides all of 64 patches'),
    ],
)
def test_what_cannot_be_is_one_line(values, message):
    with pytest.raises(ValueError) as e:
        create_method('maskfeat_video', **SMALL | values)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_layers_of_a_video_network_are_those_of_images():
    net, x = create_backbone('mvit_mini').eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, last = net.intermediates(x, [0, -1], norm=True)
        assert first.shape == (2, 32, 8, 8)
        torch.testing.assert_close(last.flatten(2).mT, net(x).tokens)
    with pytest.raises(ValueError, match='gives maps of its layers for images only'):
        net.intermediates(torch.zeros(1, 3, 2, 32, 32))
