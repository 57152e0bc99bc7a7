"Image files as they are found in the wild, through the class that training uses."

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data import folders
from glsd.data.folders import (
    ImageError,
    ImageFolder,
    Subset,
    balanced_subset,
    list_images,
    read_image,
    save_list,
    to_rgb,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore:The image decoding', 'ignore:This DataLoader', 'ignore:Truncated File'
)


def picture(h=20, w=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def mean_error(path, image):
    expected = torch.tensor(np.array(image.convert('RGB'))).int()
    return (read_image(path).permute(1, 2, 0).int() - expected).abs().float().mean()


@pytest.mark.parametrize(
    'orientation, back',
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_every_exif_orientation_is_shown_upright(tmp_path, orientation, back, suffix):
    image, exif = picture().resize((30, 20)), Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(back)  # what the camera saved, such that showing it by its tag gives `image`
    stored.save(tmp_path / f'a.{suffix}', exif=exif, quality=100, subsampling=0)
    assert mean_error(tmp_path / f'a.{suffix}', image) < (1 if suffix == 'png' else 6)


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('L', 'png'),
        ('L', 'jpg'),
        ('LA', 'png'),
        ('P', 'gif'),
        ('P', 'png'),
        ('RGBA', 'webp'),
        ('1', 'bmp'),
        ('RGBA', 'tiff'),
    ],
)
def test_modes_equal_pillows_conversion_where_nothing_is_transparent(tmp_path, mode, suffix):
    image = picture().convert('RGB').convert(mode)
    image.save(tmp_path / f'a.{suffix}', **({'lossless': True} if suffix == 'webp' else {}))
    assert mean_error(tmp_path / f'a.{suffix}', Image.open(tmp_path / f'a.{suffix}')) == 0


def test_adobe_cmyk_is_not_inverted(tmp_path):
    image = Image.new('RGB', (16, 16), (200, 40, 90))
    image.convert('CMYK').save(tmp_path / 'a.jpg', quality=100)
    assert mean_error(tmp_path / 'a.jpg', image) < 3


@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, suffix):
    values = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    assert (read_image(tmp_path / f'a.{suffix}')[1].numpy() == np.arange(256).reshape(16, 16)).all()


def test_transparent_palette_shows_white(tmp_path):
    image = Image.new('P', (4, 4), 0)
    image.putpalette([255, 0, 255, 0, 0, 255])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / 'a.png', transparency=0)
    assert read_image(tmp_path / 'a.png')[:, 0, 0].tolist() == [0, 0, 255]
    assert (read_image(tmp_path / 'a.png')[:, 1:] == 255).all()


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_thin_images(tmp_path, size, suffix):
    picture().resize(size).save(tmp_path / f'a.{suffix}')
    assert tuple(read_image(tmp_path / f'a.{suffix}').shape) == (3, size[1], size[0])


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'gif', 'webp', 'tif'])
def test_a_file_cut_anywhere_is_refused_by_name_or_decoded_whole(tmp_path, suffix):
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, {'jpg': 'JPEG', 'tif': 'TIFF'}.get(suffix, suffix.upper()))
    whole, refused = buffer.getvalue(), 0
    (tmp_path / f'whole.{suffix}').write_bytes(whole)
    expected = read_image(tmp_path / f'whole.{suffix}')
    for n in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / f'cut.{suffix}').write_bytes(whole[:n])
        try:
            assert torch.equal(read_image(tmp_path / f'cut.{suffix}'), expected), n
        except ImageError as e:
            refused += 1
            assert f'cut.{suffix}' in str(e) and '\n' not in str(e)
    assert refused > 30


def test_skipping_leaves_labels_and_lists_consistent(tmp_path):
    for c in 'ab':
        (tmp_path / c).mkdir()
        for k in range(4):
            picture(seed=k).save(tmp_path / c / f'{k}.png')
    (tmp_path / 'a/1.png').write_bytes((tmp_path / 'a/1.png').read_bytes()[:300])
    (tmp_path / 'b/9.jpg').write_text('nothing')
    with pytest.warns(UserWarning, match='2 of 9 images'):
        ds = ImageFolder(tmp_path, on_error='skip')
    assert len(ds) == 7 and len(ds.skipped) == 2 and ds.labels.tolist() == [0] * 3 + [1] * 4
    save_list(balanced_subset(ds, 3), tmp_path / 'list.txt')
    again = ImageFolder(tmp_path, files=tmp_path / 'list.txt')
    assert 'a/1.png' not in again.files and len(again) == 6
    for i in range(6):
        again[i]


def test_only_unreadable_images_is_an_error(tmp_path):
    (tmp_path / 'a.jpg').write_text('nothing')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='no image below'):
        ImageFolder(tmp_path, on_error='skip')


def test_links_and_circles(tmp_path):
    (tmp_path / 'store').mkdir()
    (tmp_path / 'set').mkdir()
    picture().save(tmp_path / 'store/x.png')
    os.symlink(tmp_path / 'store', tmp_path / 'set/c1')
    os.symlink(tmp_path / 'set', tmp_path / 'set/round')
    assert list_images(tmp_path / 'set') == ['c1/x.png']


def test_subsets_are_nested_for_any_seed_and_differ_between_seeds(tmp_path):
    class Labels:
        labels, classes = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40)), list('abcde')

    for seed in range(5):
        sets = [set(balanced_subset(Labels, n, seed).indices) for n in range(1, 41)]
        assert all(a < b for a, b in zip(sets, sets[1:])) and len(sets[-1]) == 200
    assert set(balanced_subset(Labels, 5, 0).indices) != set(balanced_subset(Labels, 5, 1).indices)


@pytest.fixture
def tree(tmp_path):
    "Two classes of three images, and a list of two of them."
    for name in ['a/0.png', 'a/1.png', 'a/2.png', 'b/0.png', 'b/1.png', 'b/2.png']:
        (tmp_path / 'set' / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(list(tmp_path.rglob('*.png')))).save(tmp_path / 'set' / name)
    (tmp_path / 'list.txt').write_text('a/0.png\nb/2.png\n')
    return tmp_path


@pytest.mark.parametrize(
    'make, error, message',
    [
        (
            lambda t: to_rgb(Image.fromarray(np.zeros((4, 4), np.float32))),
            ValueError,
            'floats of unknown range',
        ),
        (lambda t: to_rgb(Image.fromarray(np.full((4, 4), 10**6, np.int32))), ValueError, '32 bits'),
        (lambda t: ImageFolder(t / 'sets'), FileNotFoundError, 'no such folder: .*sets'),
        (lambda t: ImageFolder(t / 'set/a/0.png'), FileNotFoundError, 'no such folder'),
        (lambda t: ImageFolder(t / 'set', on_error='ignore'), ValueError, "on_error is 'raise' or 'skip'"),
        (lambda t: ImageFolder(t / 'set', files=['a/9.png']), FileNotFoundError, 'a/9.png is in the list'),
        (lambda t: ImageFolder(t / 'set', files=t / 'lost.txt'), FileNotFoundError, 'no such list of images'),
        (lambda t: ImageFolder(t / 'set', files=[]), ValueError, 'no image below'),
        (lambda t: balanced_subset(ImageFolder(t / 'set'), 0), ValueError, 'at least one image per class'),
        (
            lambda t: balanced_subset(ImageFolder(t / 'set'), 4),
            ValueError,
            'class a has 3 images, fewer than',
        ),
        (lambda t: balanced_subset(ImageFolder(t / 'set/a'), 1), ValueError, 'needs labels'),
    ],
)
def test_what_is_wrong_is_one_clear_line(tree, make, error, message):
    with pytest.raises(error, match=message) as e:
        make(tree)
    assert '\n' not in str(e.value)


def test_a_list_is_written_whole_beside_an_old_one(tree, monkeypatch):
    ds = ImageFolder(tree / 'set')
    save_list(Subset(Subset(ds, [5, 1, 0]), [2, 0]), tree / 'list.txt')
    assert (tree / 'list.txt').read_text() == 'a/0.png\nb/2.png\n'
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_list(ds, tree / 'list.txt')
    assert (tree / 'list.txt').read_text() == 'a/0.png\nb/2.png\n'
    assert sorted(os.listdir(tree)) == ['list.txt', 'set']


def test_fingerprints_follow_what_a_folder_would_deliver(tree):
    def fingerprints():
        ds = ImageFolder(tree / 'set')
        listed = ImageFolder(tree / 'set', files=tree / 'list.txt')
        return [
            d.fingerprint() for d in (ds, listed, Subset(ds, [0, 5]), Subset(ds, [5, 0]), Subset(ds, [0]))
        ]

    before = fingerprints()
    assert fingerprints() == before and len(set(before)) == 5
    os.utime(tree / 'set/a/1.png', ns=(0, 0))  # not in the list
    after = fingerprints()
    assert after[1] == before[1] and not {after[k] for k in (0, 2, 3, 4)} & set(before)
    (tree / 'set/b/2.png').rename(tree / 'set/a/9.png')
    assert ImageFolder(tree / 'set').fingerprint() not in before + after


def test_small_images_are_decoded_once_and_large_folders_are_not_kept(tmp_path, monkeypatch):
    Image.new('RGB', (8, 8), (10, 20, 30)).save(tmp_path / 'a.png')
    small, large = ImageFolder(tmp_path), ImageFolder(tmp_path)
    first = small[0][0]
    monkeypatch.setattr(folders, 'KEPT', 8 * 8 * 3 - 1)
    large[0]
    (tmp_path / 'a.png').unlink()
    assert torch.equal(small[0][0], first)
    with pytest.raises(FileNotFoundError):
        large[0]
