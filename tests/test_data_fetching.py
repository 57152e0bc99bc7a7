"Whole data sets through the scripts: broken downloads, a killed process, a full disk, hostile archives."

import errno
import functools
import http.server
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glsd.data import archives
from glsd.data.archives import FetchError, download, members
from glsd.data.fetching import command, get
from glsd.data.files import InUseError
from glsd.data.folders import ImageFolder, read_image
from glsd.data.layouts import DATASETS, DataSet

SCRIPTS = Path(__file__).parents[1] / 'data_scripts'


def python2_pickle(data, labels):
    "{'data': uint8 array [n, 3072], 'labels': list} as Python 2 wrote it: byte strings, protocol 2."
    text = lambda s: b'U' + bytes([len(s)]) + s
    number = lambda k: b'J' + k.to_bytes(4, 'little', signed=True)
    dtype = b'cnumpy\ndtype\n' + text(b'u1') + b'K\x00K\x01\x87R(K\x03' + text(b'|')
    dtype += b'NNN' + number(-1) + number(-1) + b'K\x00tb'
    array = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + text(b'b')
    array += b'\x87R(K\x01' + number(len(data)) + b'M\x00\x0c\x86' + dtype + b'\x89T'
    array += len(data.tobytes()).to_bytes(4, 'little') + data.tobytes() + b'tb'
    items = b''.join(map(number, labels))
    return b'\x80\x02}(' + text(b'data') + array + text(b'labels') + b'](' + items + b'e' + b'u.'


def cifar_archive(path, n=20):
    rng = np.random.default_rng(0)
    with tarfile.open(path, 'w:gz') as tar:
        for name in [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']:
            data = python2_pickle(rng.integers(0, 256, (n, 3072), np.uint8), [k % 10 for k in range(n)])
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Server(http.server.BaseHTTPRequestHandler):
    "Serves `content`; understands ranges or not; hangs up after `limit` bytes of a response."

    content, limit, ranges, log = b'', None, True, []

    def do_GET(self):
        wanted = self.headers.get('Range') if self.ranges else None
        start = int(wanted[6:-1]) if wanted else 0
        self.log.append(start)
        if wanted and start >= len(self.content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(self.content)}')
            return self.end_headers()
        self.send_response(206 if wanted else 200)
        self.send_header('Content-Length', str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][: self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(content, **options):
        handler = type('Handler', (Server,), dict(content=content, log=[], **options))
        servers.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}/file', handler

    yield start
    for s in servers:
        s.shutdown()


def test_a_broken_download_goes_on_where_it_stopped(serve, tmp_path):
    content = os.urandom(100_000)
    url, server = serve(content, limit=30_000)
    assert download(url, tmp_path / 'a').read_bytes() == content
    assert server.log == [0, 30_000, 60_000, 90_000] and os.listdir(tmp_path) == ['a']


def test_a_part_from_an_earlier_call_is_used(serve, tmp_path):
    content = os.urandom(50_000)
    url, server = serve(content)
    (tmp_path / 'a.part').write_bytes(content[:20_000])
    assert download(url, tmp_path / 'a').read_bytes() == content and server.log == [20_000]


@pytest.mark.parametrize('size, log', [(50_000, [50_000]), (60_000, [60_000, 0])])
def test_a_part_that_is_whole_or_too_long(serve, tmp_path, size, log):
    content = os.urandom(50_000)
    url, server = serve(content)
    (tmp_path / 'a.part').write_bytes((content + bytes(10_000))[:size])
    assert download(url, tmp_path / 'a').read_bytes() == content and server.log == log


def test_a_server_without_ranges_starts_over(serve, tmp_path):
    content = os.urandom(50_000)
    url, server = serve(content, ranges=False)
    (tmp_path / 'a.part').write_bytes(bytes(20_000))
    assert download(url, tmp_path / 'a').read_bytes() == content


def test_a_server_that_brings_nothing_ends_it_and_keeps_the_part(serve, tmp_path):
    url, server = serve(os.urandom(50_000), limit=0)
    (tmp_path / 'a.part').write_bytes(bytes(20_000))
    with pytest.raises(FetchError, match='20000 bytes are kept') as e:
        download(url, tmp_path / 'a')
    assert '\n' not in str(e.value) and len(server.log) == 1 and os.listdir(tmp_path) == ['a.part']


def test_a_wrong_sum_removes_the_part(serve, tmp_path):
    url, _ = serve(b'something else')
    with pytest.raises(FetchError, match='md5'):
        download(url, tmp_path / 'a', md5='0' * 32)
    assert os.listdir(tmp_path) == []


def test_not_found(serve, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(FetchError, match='404'):
            download(f'http://127.0.0.1:{server.server_port}/x', tmp_path / 'a')
    finally:
        server.shutdown()


def test_cifar10_pixels_and_labels_survive(tmp_path, serve, monkeypatch):
    archive = cifar_archive(tmp_path / 'a.tar.gz')
    url, server = serve(archive.read_bytes(), limit=150_000)
    data = DATASETS['cifar10']._replace(md5=archives.md5sum(archive), counts=dict(train=100, val=20))
    monkeypatch.setitem(DATASETS, 'cifar10', data)
    out = get('cifar10', tmp_path / 'root', url)  # verified, over a connection that breaks
    assert len(server.log) > 1 and os.listdir(tmp_path / 'root') == ['cifar10']
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)[13].reshape(3, 32, 32)
    assert (read_image(out / 'train/cat' / 'data_batch_1_00013.png').numpy() == pixels).all()
    assert len(ImageFolder(out / 'train')) == 100
    assert np.bincount(ImageFolder(out / 'val').labels).tolist() == [2] * 10


def test_a_number_of_images_that_differs_is_refused_without_no_verify(tmp_path, monkeypatch):
    archive = cifar_archive(tmp_path / 'a.tar.gz')
    monkeypatch.setitem(DATASETS, 'cifar10', DATASETS['cifar10']._replace(md5=archives.md5sum(archive)))
    with pytest.raises(FetchError, match='instead of'):
        get('cifar10', tmp_path / 'root', archive)
    assert os.listdir(tmp_path / 'root') == []


def script(name, *args):
    return [sys.executable, str(SCRIPTS / f'{name}.py'), *map(str, args)]


def run(name, *args):
    return subprocess.run(script(name, *args), capture_output=True, text=True)


def test_killed_while_unpacking_then_called_again(tmp_path):
    archive, root = cifar_archive(tmp_path / 'a.tar.gz', n=2000), tmp_path / 'root'
    process = subprocess.Popen(script('cifar10', '--root', root, '--source', archive, '--no-verify'))
    while process.poll() is None and len(list(root.rglob('*.png'))) < 50:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, 'it was not killed in the middle'
    assert not (root / 'cifar10').exists()
    small = cifar_archive(tmp_path / 'b.tar.gz', n=10)
    assert command('cifar10', ['--root', str(root), '--source', str(small), '--no-verify']) == 0
    assert len(ImageFolder(root / 'cifar10/train')) == 50 and os.listdir(root) == ['cifar10']
    stamp = (root / 'cifar10').stat().st_mtime_ns
    assert get('cifar10', root) == root / 'cifar10'  # no source, no network
    assert (root / 'cifar10').stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    'name, source, message',
    [
        ('cifar10', 'nowhere', 'no such archive or folder'),
        ('cifar10', 'text.txt', 'md5'),
        ('tiny_imagenet', 'http://127.0.0.1:1/a.zip', 'without a network'),
        ('imagenet_subsets', None, 'account'),
    ],
)
def test_wrong_input_ends_with_one_line(tmp_path, name, source, message, capsys):
    (tmp_path / 'text.txt').write_text('no archive')
    source = source and (source if '://' in source else str(tmp_path / source))
    assert command(name, ['--root', str(tmp_path / 'root'), *(['--source', source] if source else [])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and not list((tmp_path / 'root').glob('*'))


@pytest.mark.parametrize('name', ['tiny_imagenet', 'imagenet_subsets'])
def test_every_script_is_a_command(tmp_path, name):
    r = run(name, '--root', tmp_path, '--source', tmp_path / 'nowhere')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'nowhere' in r.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    archive = tmp_path / 'a.zip'
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('tiny-imagenet-200/train/n00000001/images/n00000001_0.JPEG', b'x')

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(archives.shutil, 'copyfileobj', full)
    with pytest.raises(FetchError, match='disk .* is full') as e:
        get('tiny_imagenet', tmp_path / 'root', archive, verify=False)
    assert '\n' not in str(e.value) and os.listdir(tmp_path / 'root') == []


def test_a_folder_of_the_users_is_never_overwritten(tmp_path):
    (tmp_path / 'cifar10').mkdir()
    (tmp_path / 'cifar10/mine.txt').write_text('mine')
    with pytest.raises(FetchError, match='already exists'):
        get('cifar10', tmp_path, cifar_archive(tmp_path / 'a.tar.gz', 10), verify=False)
    assert (tmp_path / 'cifar10/mine.txt').read_text() == 'mine'


def test_an_archive_that_the_user_keeps_in_the_root_stays(tmp_path):
    archive = cifar_archive(tmp_path / 'cifar-10-python.tar.gz', 10)
    get('cifar10', tmp_path, tmp_path, verify=False)
    assert archive.exists() and (tmp_path / 'cifar10/train').is_dir()


def test_a_pickle_that_calls_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    data = pickle.dumps({b'data': Harmful()})
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        info = tarfile.TarInfo('data_batch_1')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(FetchError, match='system'):
        get('cifar10', tmp_path / 'root', tmp_path / 'a.tar', verify=False)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('name', ['../evil.JPEG', '/evil.JPEG', 'train/../../evil.JPEG', 'a\\..\\..\\evil'])
def test_paths_that_lead_out_are_refused_in_zips_too(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr(name, b'!')
    with pytest.raises(FetchError, match='points outside'):
        list(members(tmp_path / 'a.zip'))


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        info = tarfile.TarInfo('train')
        info.type, info.linkname = kind, '/etc'
        tar.addfile(info)
    with pytest.raises(FetchError, match='a link'):
        list(members(tmp_path / 'a.tar'))


def test_imagenet_lists_do_not_depend_on_how_the_images_come(tmp_path):
    pixel = io.BytesIO()
    Image.new('RGB', (2, 2)).save(pixel, 'JPEG')
    names = {w: [f'{w}_{k}.JPEG' for k in range(205)] for w in ('n00000002', 'n00000001')}  # not in order
    with tarfile.open(tmp_path / 'ILSVRC2012_img_train.tar', 'w') as outer:
        for w, files in names.items():
            (tmp_path / 'full' / w).mkdir(parents=True)
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode='w') as inner:
                for f in reversed(files):
                    (tmp_path / 'full' / w / f).write_bytes(pixel.getvalue())
                    info = tarfile.TarInfo(f)
                    info.size = len(pixel.getvalue())
                    inner.addfile(info, io.BytesIO(pixel.getvalue()))
            info = tarfile.TarInfo(f'{w}.tar')
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    outs = []
    for k, source in enumerate([tmp_path, tmp_path / 'full']):
        with pytest.warns(UserWarning, match='no val images'):
            outs.append(get('imagenet_subsets', tmp_path / f'{k}', source, verify=False))
    for p in (1, 2, 5, 10, 20):
        lists = [(out / f'train_{p}pct.txt').read_text() for out in outs]
        assert lists[0] == lists[1] and len(lists[0].split()) == 20 * p
        assert len(ImageFolder(outs[0] / 'train', files=outs[0] / f'train_{p}pct.txt').classes) == 2
    with pytest.raises(FetchError, match='instead of'):
        get('imagenet_subsets', tmp_path / 'v', tmp_path / 'full')


class Paused:
    "A data set whose `lay_out` writes one image, and waits for `go` before the second."

    def __init__(self, monkeypatch):
        self.begun, self.go = threading.Event(), threading.Event()
        entry = DataSet('paused.zip', '', None, dict(train=2), self.lay_out)
        monkeypatch.setitem(DATASETS, 'paused', entry)

    def lay_out(self, source, out):
        (out / 'train/a').mkdir(parents=True)
        Image.new('RGB', (2, 2)).save(out / 'train/a/0.png')
        self.begun.set()
        assert self.go.wait(60)
        Image.new('RGB', (2, 2)).save(out / 'train/a/1.png')


def test_a_second_call_for_the_same_data_set_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    paused, results = Paused(monkeypatch), []
    (tmp_path / 'source').mkdir()
    first = threading.Thread(
        target=lambda: results.append(get('paused', tmp_path / 'root', tmp_path / 'source'))
    )
    first.start()
    assert paused.begun.wait(60)
    with pytest.raises(InUseError, match=f'paused is in use by process {os.getpid()}; wait for it') as e:
        get('paused', tmp_path / 'root', tmp_path / 'source')
    assert '\n' not in str(e.value)
    paused.go.set()
    first.join()
    assert results == [tmp_path / 'root/paused'] and len(ImageFolder(results[0] / 'train')) == 2
    assert get('paused', tmp_path / 'root') == results[0] and os.listdir(tmp_path / 'root') == ['paused']


@pytest.mark.slow
def test_a_second_process_for_the_same_data_set_is_refused_by_one_line(tmp_path):
    archive, root = cifar_archive(tmp_path / 'a.tar.gz', n=1000), tmp_path / 'root'
    first = subprocess.Popen(script('cifar10', '--root', root, '--source', archive, '--no-verify'))
    while first.poll() is None and not list(root.rglob('*.png')):
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)  # it is in the middle, and stays there
    second = run('cifar10', '--root', root, '--source', archive, '--no-verify')
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and second.stderr.count('\n') == 1
    assert f'cifar10 is in use by process {first.pid}; wait for it' in second.stderr
    assert first.wait() == 0
    assert len(ImageFolder(root / 'cifar10/train')) == 5000 and os.listdir(root) == ['cifar10']


def test_two_downloads_of_one_file_do_not_mix(serve, tmp_path):
    content, errors = os.urandom(200_000), []
    url, server = serve(content, limit=20_000)
    started = threading.Barrier(4)

    def call():
        started.wait()
        try:
            download(url, tmp_path / 'a')
        except InUseError as e:
            errors.append(e)

    calls = [threading.Thread(target=call) for _ in range(4)]
    for c in calls:
        c.start()
    for c in calls:
        c.join()
    assert (tmp_path / 'a').read_bytes() == content and os.listdir(tmp_path) == ['a']
    assert server.log == list(range(0, 200_000, 20_000)) and len(errors) <= 3


@pytest.mark.parametrize('name, match', [('cifar100', 'did you mean cifar10'), ('', 'unknown data set')])
def test_an_unknown_name_is_one_line_and_makes_no_folder(tmp_path, name, match):
    with pytest.raises(ValueError, match=match):
        get(name, tmp_path / 'root')
    assert not (tmp_path / 'root').exists()
