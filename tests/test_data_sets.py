"The data sets of the GLSD paper in miniature: from archives, from folders, damaged, hostile, interrupted."

import errno
import functools
import gzip
import http.server
import io
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import timm.data
from PIL import Image

from glsd.cli import main, make_parser
from glsd.data import IMAGENET100, archives, fetching
from glsd.data.archives import FetchError, md5sum, members
from glsd.data.fetching import command, get
from glsd.data.files import InUseError
from glsd.data.folders import ImageFolder
from glsd.data.layouts import DATASETS

pytestmark = pytest.mark.filterwarnings('ignore:The image decoding')

SCRIPTS = Path(__file__).parents[1] / 'data_scripts'
NEW = ['food101', 'nct_crc', 'imagenet1k', 'imagenet100']
DISHES = ['apple_pie', 'waffles']
TISSUES = ['ADI', 'BACK', 'TUM']
WNIDS = [
    'n02119789',
    'n02086240',
    'n01440764',
    'n01558993',
]  # as the devkit numbers them; the 2nd and 4th of the 100
LABELS = [2, 4, 1, 2, 3, 4]  # of the validation images


def encoded(kind, **options):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8), 'teal').save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, TIFF = encoded('JPEG'), encoded('TIFF')


def tar_of(files, path=None, mode='w'):
    "A tar of {name: bytes}, on disk or as bytes."
    buffer = io.BytesIO()
    with tarfile.open(path, mode) if path else tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path or buffer.getvalue()


def zip_of(files, path):
    with zipfile.ZipFile(path, 'w') as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def food101_files(n=3):
    "{name: bytes} of the archive: `n` training images and one test image of each class."
    files = {f'food-101/images/{c}/{k}.jpg': JPEG for c in DISHES for k in range(n + 1)}
    files |= {
        'food-101/images/._0.jpg': b'',
        'food-101/README.txt': b'',
        'food-101/meta/._train.txt': b'\xb0',
    }
    for name, numbers in dict(train=range(1, n + 1), test=range(1)).items():
        files[f'food-101/meta/{name}.txt'] = '\n'.join(f'{c}/{k}' for c in DISHES for k in numbers).encode()
    return files


def nct_crc_files(folder, n):
    return {f'{folder}/{c}/{c}-TCGA-{k}.tif': TIFF for c in TISSUES for k in range(n)}


def devkit_files():
    text = b'\0'.join(w.encode() for w in WNIDS)
    packed = zlib.compress(text)
    mat = bytes(128) + struct.pack('<II', 15, len(packed)) + packed
    labels = '\n'.join(map(str, LABELS)).encode()
    files = {'data/meta.mat': mat, 'data/ILSVRC2012_validation_ground_truth.txt': labels}
    return {f'ILSVRC2012_devkit_t12/{name}': data for name, data in files.items()}


def train_files(n=3):
    return {w: {f'{w}_{k}.JPEG': JPEG for k in range(n)} for w in WNIDS}


def val_files():
    return {f'ILSVRC2012_val_{k:08}.JPEG': JPEG for k in range(1, len(LABELS) + 1)}


def archives_of(name, folder):
    "Writes the miniature archives of a data set -> the main one."
    folder.mkdir(parents=True, exist_ok=True)
    if name == 'food101':
        return tar_of(food101_files(), folder / 'food-101.tar.gz', 'w:gz')
    if name == 'nct_crc':
        zip_of(nct_crc_files('CRC-VAL-HE-7K', 1), folder / 'CRC-VAL-HE-7K.zip')
        return zip_of(nct_crc_files('NCT-CRC-HE-100K', 3), folder / 'NCT-CRC-HE-100K.zip')
    tar_of(val_files(), folder / 'ILSVRC2012_img_val.tar')
    tar_of(devkit_files(), folder / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz')
    classes = {f'{w}.tar': tar_of(files) for w, files in train_files().items()}
    return tar_of(classes, folder / 'ILSVRC2012_img_train.tar')


COUNTS = dict(
    food101=dict(train=6, val=2),
    nct_crc=dict(train=9, val=3),
    imagenet1k=dict(train=12, val=6),
    imagenet100=dict(train=6, val=4),
)
CLASSES = dict(
    food101=DISHES,
    nct_crc=TISSUES,
    imagenet1k=sorted(WNIDS),
    imagenet100=['n01558993', 'n02086240'],
)


def as_published(name, archive, monkeypatch):
    "Makes the miniature the published one: its sums and numbers are those that are checked."
    data = DATASETS[name]
    others = {file: md5sum(archive.parent / file) for file in data.others}
    data = data._replace(md5=md5sum(archive), others=others, counts=COUNTS[name])
    monkeypatch.setitem(DATASETS, name, data)


def check(name, out):
    "Whether the miniature is laid out, every image readable and in its class."
    assert {p.name for p in out.iterdir()} == {'train', 'val', 'dataset.json'}
    for split, n in COUNTS[name].items():
        ds = ImageFolder(out / split)
        assert ds.classes == CLASSES[name] and len(ds) == n
        assert all(image.shape == (3, 8, 8) for image, _ in ds)
    assert not [p for p in out.rglob('.*')]


@pytest.mark.parametrize('name', NEW)
def test_verified_from_the_archive_or_the_folder_that_it_is_in(name, tmp_path, monkeypatch):
    archive = archives_of(name, tmp_path / 'in')
    as_published(name, archive, monkeypatch)
    check(name, get(name, tmp_path / '1', archive))
    check(name, get(name, tmp_path / '2', tmp_path / 'in'))
    assert os.listdir(tmp_path / '1') == [name] and len(os.listdir(tmp_path / 'in')) >= 1


def unpack(archive, folder):
    for name, open_ in members(archive):
        archives.copy_out(open_, folder / name)


@pytest.mark.parametrize('name, part', [('food101', ''), ('food101', 'food-101'), ('nct_crc', '')])
def test_from_an_unpacked_folder(name, part, tmp_path, monkeypatch):
    archive = archives_of(name, tmp_path / 'in')
    as_published(name, archive, monkeypatch)
    for path in (tmp_path / 'in').iterdir():
        unpack(path, tmp_path / 'out')
    check(name, get(name, tmp_path / 'root', tmp_path / 'out' / part))


def test_nct_crc_from_one_folder_and_the_other_archive(tmp_path, monkeypatch):
    as_published('nct_crc', archives_of('nct_crc', tmp_path), monkeypatch)
    unpack(tmp_path / 'NCT-CRC-HE-100K.zip', tmp_path)
    (tmp_path / 'NCT-CRC-HE-100K.zip').unlink()
    check('nct_crc', get('nct_crc', tmp_path / 'root', tmp_path / 'NCT-CRC-HE-100K'))


def test_nct_crc_does_not_take_the_images_without_normalisation(tmp_path):
    zip_of(nct_crc_files('NCT-CRC-HE-100K-NONORM', 3), tmp_path / 'a.zip')
    with pytest.raises(FetchError, match='no training images'):
        get('nct_crc', tmp_path / 'root', tmp_path / 'a.zip', verify=False)


@pytest.mark.parametrize('name', ['imagenet1k', 'imagenet100'])
@pytest.mark.parametrize('train', ['tars', 'folders', 'both', 'no train/'])
@pytest.mark.parametrize('val', ['tar', 'flat', 'folders'])
def test_imagenet_from_what_people_have(name, train, val, tmp_path, monkeypatch):
    have = tmp_path / 'have'
    as_published(name, archives_of(name, have), monkeypatch)
    (have / 'ILSVRC2012_img_train.tar').unlink()
    for w, files in train_files().items():
        for name_, data in files.items() if train != 'tars' else ():
            archives.copy_out(functools.partial(io.BytesIO, data), have / 'train' / w / name_)
        if train in ('tars', 'both'):
            (have / 'train').mkdir(exist_ok=True)
            tar_of(files, have / 'train' / f'{w}.tar')
    if val == 'flat':
        unpack(have / 'ILSVRC2012_img_val.tar', have / 'val')
        unpack(have / 'ILSVRC2012_devkit_t12.tar.gz', have)
    if val == 'folders':
        for (image, data), label in zip(val_files().items(), LABELS):
            archives.copy_out(functools.partial(io.BytesIO, data), have / 'val' / WNIDS[label - 1] / image)
    if val != 'tar':
        (have / 'ILSVRC2012_img_val.tar').unlink()
        (have / 'ILSVRC2012_devkit_t12.tar.gz').unlink()
    out = get(name, tmp_path / 'root', have / 'train' if train == 'no train/' else have)
    check(name, out)
    linked = next((out / 'train').rglob('*.JPEG')).stat().st_nlink == 2
    assert linked == (train != 'tars')


def test_imagenet100_of_a_finished_imagenet1k(tmp_path, monkeypatch):
    archive = archives_of('imagenet1k', tmp_path / 'in')
    for name in ('imagenet1k', 'imagenet100'):
        as_published(name, archive, monkeypatch)
    whole = get('imagenet1k', tmp_path, archive)
    check('imagenet100', get('imagenet100', tmp_path, whole))


def test_every_validation_image_is_in_its_class(tmp_path):
    out = get('imagenet1k', tmp_path / 'root', archives_of('imagenet1k', tmp_path), verify=False)
    expected = {f'ILSVRC2012_val_{k:08}.JPEG': WNIDS[label - 1] for k, label in enumerate(LABELS, 1)}
    assert {p.name: p.parent.name for p in (out / 'val').rglob('*.JPEG')} == expected


def test_imagenet100_is_a_hundred_of_the_thousand():
    thousand = timm.data.ImageNetInfo('imagenet-1k').label_names()
    assert len(thousand) == 1000 and len(set(IMAGENET100)) == 100 and set(IMAGENET100) < set(thousand)
    assert IMAGENET100 == sorted(IMAGENET100)


def test_numbers_and_sums_look_like_what_is_published():
    published = dict(food101=(75_750, 25_250), nct_crc=(100_000, 7_180), imagenet1k=(1_281_167, 50_000))
    published |= dict(imagenet100=(126_689, 5_000), imagenet_subsets=(200_000, 50_000))
    for name, (train, val) in published.items():
        assert DATASETS[name].counts == dict(train=train, val=val)
        assert all(re.fullmatch('[0-9a-f]{32}', md5) for md5 in DATASETS[name].archives.values())
    assert not [
        name for name, data in DATASETS.items() if 'imagenet' in name and data.url and 'tiny' not in name
    ]


@pytest.mark.parametrize('field', ['train', 'val'])
@pytest.mark.parametrize('name', NEW)
def test_one_image_too_few(name, field, tmp_path, monkeypatch):
    archive = archives_of(name, tmp_path / 'in')
    as_published(name, archive, monkeypatch)
    counts = COUNTS[name] | {field: COUNTS[name][field] + 1}
    monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(counts=counts))
    with pytest.raises(FetchError, match='images instead of') as e:
        get(name, tmp_path / 'root', archive)
    assert '\n' not in str(e.value) and os.listdir(tmp_path / 'root') == []


def test_a_missing_class_is_named(tmp_path, monkeypatch, capsys):
    as_published('nct_crc', archives_of('nct_crc', tmp_path), monkeypatch)
    files = {name: data for name, data in nct_crc_files('NCT-CRC-HE-100K', 3).items() if '/BACK/' not in name}
    archive = zip_of(files, tmp_path / 'NCT-CRC-HE-100K.zip')
    monkeypatch.setitem(DATASETS, 'nct_crc', DATASETS['nct_crc']._replace(md5=md5sum(archive)))
    assert command('nct_crc', ['--root', str(tmp_path / 'root'), '--source', str(archive)]) == 2
    error = capsys.readouterr().err
    assert 'none of class BACK in train' in error and error.count('\n') == 1


@pytest.mark.parametrize('name', ['nct_crc', 'imagenet1k', 'imagenet100', 'imagenet_subsets'])
def test_an_archive_that_is_missing_is_named_before_anything_is_read(name, tmp_path, monkeypatch):
    archive = archives_of(name, tmp_path)
    other = next(iter(DATASETS[name].others))
    (tmp_path / other).unlink()
    monkeypatch.setattr(fetching, 'md5sum', lambda path: pytest.fail('hours of work'))
    with pytest.raises(FetchError, match=f'{other} must lie beside'):
        get(name, tmp_path / 'root', archive)


def test_without_verification_a_missing_split_is_a_warning(tmp_path):
    archive = archives_of('nct_crc', tmp_path)
    (tmp_path / 'CRC-VAL-HE-7K.zip').unlink()
    with pytest.warns(UserWarning, match='no val images'):
        out = get('nct_crc', tmp_path / 'root', archive, verify=False)
    assert len(ImageFolder(out / 'train')) == 9 and not (out / 'val').exists()


@pytest.mark.parametrize('name', NEW)
def test_a_wrong_archive(name, tmp_path, capsys):
    archives_of(name, tmp_path)
    wrong = zip_of({'cats/1.jpg': JPEG}, tmp_path / 'wrong.zip')
    for argv, message in (([], 'is not the published file'), (['--no-verify'], 'no training images')):
        assert command(name, ['--root', str(tmp_path / 'root'), '--source', str(wrong), *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1 and os.listdir(tmp_path / 'root') == []


@pytest.mark.parametrize('name', NEW)
def test_truncated_anywhere(name, tmp_path, monkeypatch):
    archive = archives_of(name, tmp_path / 'in')
    as_published(name, archive, monkeypatch)
    whole, refused = archive.read_bytes(), 0
    for k in range(1, 9):
        archive.write_bytes(whole[: len(whole) * k // 9])
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(md5=md5sum(archive)))
        try:
            check(name, get(name, tmp_path / f'{k}', archive))  # only zeros behind the last image are missing
        except FetchError as e:
            assert '\n' not in str(e) and os.listdir(tmp_path / f'{k}') == []
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize('labels', [b'1\n2\n', b'0\n' * 6, b'5\n' * 6, b'one\n' * 6])
def test_labels_that_do_not_fit_the_images(labels, tmp_path):
    archive = archives_of('imagenet1k', tmp_path)
    files = devkit_files() | {'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt': labels}
    tar_of(files, tmp_path / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz')
    with pytest.raises(FetchError, match='broken or not what it should be'):
        get('imagenet1k', tmp_path / 'root', archive, verify=False)
    assert os.listdir(tmp_path / 'root') == []


def rewritten(name, folder, extra):
    "The miniature of a data set with one more member, made by `extra(tar)` or by `extra(zip)`."
    archive = archives_of(name, folder)
    if name == 'nct_crc':
        with zipfile.ZipFile(archive, 'a') as z:
            extra(z)
        return archive
    plain = folder / archive.name
    if archive.suffix == '.gz':
        plain.write_bytes(gzip.decompress(archive.read_bytes()))
    with tarfile.open(plain, 'a') as tar:
        extra(tar)
    return plain


def add_path(archive):
    name = 'food-101/images/apple_pie/../../../../../evil.jpg'
    if isinstance(archive, zipfile.ZipFile):
        archive.writestr(name, JPEG)
    else:
        archive.addfile(tarfile.TarInfo(name))


def add_link(archive):
    info = tarfile.TarInfo('food-101/images/apple_pie/9.jpg')
    info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
    archive.addfile(info)


def add_holes(archive):
    info = tarfile.TarInfo('food-101/images/apple_pie/9.jpg')
    info.type = tarfile.GNUTYPE_SPARSE
    archive.addfile(info)


def add_bomb(archive):
    if isinstance(
        archive, zipfile.ZipFile
    ):  # one that lies: a small file, and a gigabyte in the table of contents
        archive.writestr('NCT-CRC-HE-100K/ADI/ADI-9.tif', TIFF)
        archive.filelist[-1].file_size = 2**31
    else:
        info = tarfile.TarInfo('n00000001.tar')
        info.size = 2**31
        archive.fileobj.write(info.tobuf())
        archive.offset += 512


IN_TARS = [add_path, add_bomb, add_link, add_holes]
HOSTILE = [(name, add) for name in NEW for add in (IN_TARS[:2] if name == 'nct_crc' else IN_TARS)]


@pytest.mark.parametrize('name, add', HOSTILE)
def test_hostile_archives_are_refused(name, add, tmp_path, monkeypatch):
    (tmp_path / 'a/b/c/d').mkdir(parents=True)
    archive = rewritten(name, tmp_path / 'a/b/c/d/in', add)
    with pytest.raises(FetchError, match='points outside|holds a link or|far more than its size') as e:
        get(name, tmp_path / 'a/b/c/d/root', archive, verify=False)
    assert '\n' not in str(e.value) and os.listdir(tmp_path / 'a/b/c/d/root') == []
    assert not list(tmp_path.rglob('*evil*'))


def test_a_hostile_tar_inside_the_tar(tmp_path):
    archives_of('imagenet1k', tmp_path)
    for k, inner in enumerate(
        [tar_of({'../n02119789_0.JPEG': JPEG}), tar_of({'x_0.JPEG': JPEG}, mode='w:gz')]
    ):
        archive = tar_of({'n02119789.tar': inner}, tmp_path / 'a.tar')
        with pytest.raises(FetchError, match=['points outside', 'broken'][k]):
            get('imagenet1k', tmp_path / 'root', archive, verify=False)


def test_lists_that_name_strange_places_write_nothing_there(tmp_path):
    files = food101_files() | {'food-101/meta/train.txt': b'../../evil/1\n/etc/2\napple_pie/1'}
    out = get('food101', tmp_path / 'root', tar_of(files, tmp_path / 'a.tar'), verify=False)
    assert ImageFolder(out / 'train').files == ['apple_pie/1.jpg']


def test_an_encrypted_zip_is_one_line(tmp_path, monkeypatch):
    archive = archives_of('nct_crc', tmp_path)
    data = bytearray(archive.read_bytes())
    for at in [m.start() for m in re.finditer(b'PK\x01\x02', data)]:
        data[at + 8] |= 1
    for at in [m.start() for m in re.finditer(b'PK\x03\x04', data)]:
        data[at + 6] |= 1
    archive.write_bytes(data)
    with pytest.raises(FetchError, match='encrypted'):
        get('nct_crc', tmp_path / 'root', archive, verify=False)


@pytest.mark.parametrize('name', NEW)
def test_a_full_disk_leaves_nothing(name, tmp_path, monkeypatch):
    archive, copied = archives_of(name, tmp_path / 'in'), []

    def copy(f, out):
        copied.append(out.write(f.read()))
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(archives.shutil, 'copyfileobj', copy)
    with pytest.raises(FetchError, match='disk .* is full') as e:
        get(name, tmp_path / 'root', archive, verify=False)
    assert '\n' not in str(e.value) and os.listdir(tmp_path / 'root') == []


def interrupted(name, root, archive, monkeypatch, after=4):
    "Calls `get`, which is interrupted while it writes image number `after` -> the images that are there."

    def copy(f, out):
        out.write(f.read(10))
        out.flush()
        if len(images(root)) == after:
            raise KeyboardInterrupt
        out.write(f.read())

    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, 'copyfileobj', copy)
        assert command(name, ['--root', str(root), '--source', str(archive), '--no-verify']) == 2
    return images(root)


def images(root):
    "{'train/CLASS/FILE': (inode, time)} of the finished images below a folder; written again, it is another."
    files = [p for p in root.rglob('[!.]*.[Jjt]*') if p.suffix != '.json']
    return {'/'.join(p.parts[-3:]): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize('name', NEW)
def test_an_interrupted_call_goes_on(name, tmp_path, monkeypatch, capsys):
    archive, root = archives_of(name, tmp_path / 'in'), tmp_path / 'root'
    as_published(name, archive, monkeypatch)
    there = interrupted(name, root, archive, monkeypatch)
    assert len(there) == 4 and not (root / name).exists() and 'resumes from here' in capsys.readouterr().err
    out = get(name, root, archive)
    check(name, out)
    assert there.items() <= images(out).items()  # not written again
    assert os.listdir(root) == [name]


@pytest.mark.parametrize('name', NEW)
def test_a_file_that_a_power_failure_left_empty_is_written_again(name, tmp_path, monkeypatch):
    archive, root = archives_of(name, tmp_path / 'in'), tmp_path / 'root'
    interrupted(name, root, archive, monkeypatch)
    first = min(p for p in root.rglob('[!.]*.[Jjt]*'))
    first.write_bytes(b'')
    check(name, get(name, root, archive, verify=False))


def test_after_an_interrupted_call_another_archive_starts_afresh(tmp_path, monkeypatch):
    archive, root = archives_of('food101', tmp_path / 'in'), tmp_path / 'root'
    interrupted('food101', root, archive, monkeypatch)
    other = tar_of(food101_files(1), tmp_path / 'other.tar')
    out = get('food101', root, other, verify=False)
    assert len(ImageFolder(out / 'train')) == 2 and os.listdir(root) == ['food101']


def test_a_mistyped_source_does_not_lose_what_an_interrupted_call_wrote(tmp_path, monkeypatch):
    archive, root = archives_of('food101', tmp_path / 'in'), tmp_path / 'root'
    there = interrupted('food101', root, archive, monkeypatch)
    with pytest.raises(FileNotFoundError):
        get('food101', root, tmp_path / 'in/food-102.tar.gz')
    assert there == images(root)


@pytest.mark.slow
def test_a_killed_script_goes_on(tmp_path, monkeypatch):
    inner = {f'{w}.tar': tar_of({f'{w}_{k}.JPEG': JPEG for k in range(3000)}) for w in WNIDS}
    archives_of('imagenet1k', tmp_path)
    archive, root = tar_of(inner, tmp_path / 'ILSVRC2012_img_train.tar'), tmp_path / 'root'
    script = [
        sys.executable,
        str(SCRIPTS / 'imagenet1k.py'),
        '--root',
        root,
        '--source',
        archive,
        '--no-verify',
    ]
    process = subprocess.Popen(script)
    while process.poll() is None and len(list(root.rglob('n*.JPEG'))) < 500:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it was not killed in the middle'
    there = images(root)
    assert subprocess.run(script, capture_output=True).returncode == 0
    now = images(root)
    assert len(now) == 12_006 and there.items() <= now.items() and os.listdir(root) == ['imagenet1k']


@pytest.mark.parametrize('name', NEW)
def test_a_second_call_at_the_same_time_is_refused(name, tmp_path, monkeypatch):
    archive, begun, go = archives_of(name, tmp_path / 'in'), threading.Event(), threading.Event()

    def copy(f, out):
        begun.set()
        assert go.wait(60)
        out.write(f.read())

    monkeypatch.setattr(archives.shutil, 'copyfileobj', copy)
    first = threading.Thread(target=get, args=(name, tmp_path / 'root', archive, False))
    first.start()
    assert begun.wait(60)
    with pytest.raises(InUseError, match=f'{name} is in use by process {os.getpid()}; wait for it'):
        get(name, tmp_path / 'root', archive, verify=False)
    go.set()
    first.join()
    check(name, tmp_path / 'root' / name)


def test_both_archives_come_from_a_mirror_and_go(tmp_path, monkeypatch):
    archive = archives_of('nct_crc', tmp_path / 'in')
    as_published('nct_crc', archive, monkeypatch)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'in')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/'
    monkeypatch.setitem(DATASETS, 'nct_crc', DATASETS['nct_crc']._replace(url=url))
    try:
        check('nct_crc', get('nct_crc', tmp_path / '1', f'{url}NCT-CRC-HE-100K.zip'))
        check('nct_crc', get('nct_crc', tmp_path / '2'))  # as from its own address
    finally:
        server.shutdown()
        server.server_close()
    assert os.listdir(tmp_path / '1') == os.listdir(tmp_path / '2') == ['nct_crc']


def test_a_download_that_was_not_checked_is_not_taken_for_one_that_was(tmp_path, monkeypatch):
    as_published('food101', archives_of('food101', tmp_path / 'in'), monkeypatch)
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root/.food-101.tar.gz').write_bytes(b'what a mirror gave')
    with pytest.raises(FetchError, match='without a network'):
        get('food101', tmp_path / 'root', 'http://127.0.0.1:1/food-101.tar.gz')


def tiff_with_a_broken_tag():
    "An RGB TIFF with a tag of somebody's own that points behind the end of the file."
    data = bytearray(encoded('TIFF', tiffinfo={65000: 'x' * 100}))
    at = data.index(struct.pack('<HHI', 65000, 2, 101))
    data[at + 8 : at + 12] = struct.pack('<I', 10**6)
    return bytes(data)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's words on the tag
def test_a_tiff_with_a_broken_tag_is_an_image_and_a_truncated_one_is_not(tmp_path):
    for name, data in dict(good=tiff_with_a_broken_tag(), bad=TIFF[: len(TIFF) // 2]).items():
        (tmp_path / f'{name}.tif').write_bytes(data)
    ds = ImageFolder(tmp_path, on_error='skip')
    assert ds.files == ['good.tif'] and ds[0][0].shape == (3, 8, 8)


def test_every_data_set_has_a_script_and_the_command_names_it(capsys):
    names = {p.stem for p in SCRIPTS.glob('*.py')}
    assert names == set(DATASETS)
    with pytest.raises(SystemExit):
        make_parser(['data']).parse_args(['data', '-h'])
    described = capsys.readouterr().out
    assert all(re.search(rf'\b{name}\b', described) for name in names)


@pytest.mark.parametrize('name', NEW)
def test_the_script_and_the_command_end_with_one_line_and_2(name, tmp_path, monkeypatch, capsys):
    argv = ['--root', str(tmp_path / 'root'), '--source', str(tmp_path / 'nowhere')]
    monkeypatch.setattr(sys, 'argv', [name, *argv])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(SCRIPTS / f'{name}.py'), run_name='__main__')
    assert e.value.code == 2 and main(['data', 'get', name, *argv]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 2 and error.count('nowhere') == 2


def test_the_command_takes_what_is_not_published(tmp_path, capsys):
    archive = archives_of('food101', tmp_path)
    argv = ['data', 'get', 'food101', '--root', str(tmp_path / 'root'), '--source', str(archive)]
    assert main(argv) == 2 and '--no-verify' in capsys.readouterr().err
    assert main([*argv, '--no-verify']) == 0
    check('food101', tmp_path / 'root/food101')


@pytest.mark.parametrize('name', ['imagenet1k', 'imagenet100'])
def test_imagenet_is_never_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'download', lambda *args: pytest.fail('a download'))
    with pytest.raises(FetchError, match='account'):
        get(name, tmp_path / 'root')
