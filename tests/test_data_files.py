"""Files that are whole or not there, with many writers and full disks; locks that nothing nested can free."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from glsd.data.files import InUseError, atomic_write, file_lock, folder_lock

SPAWN = multiprocessing.get_context('spawn')


def write_often(path, byte, times):
    for _ in range(times):
        with atomic_write(path) as f:
            f.write(bytes([byte]) * 50_000)


@pytest.mark.slow
def test_two_processes_that_write_one_path_leave_one_whole_file_and_readers_never_see_half_of_one(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'\0' * 50_000)
    writers = [SPAWN.Process(target=write_often, args=(path, k, 40)) for k in (1, 2)]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        content = path.read_bytes()
        assert len(content) == 50_000 and len(set(content)) == 1
    for w in writers:
        w.join()
        assert w.exitcode == 0
    assert os.listdir(tmp_path) == ['file'] and path.read_bytes()[0] in (1, 2)


def test_two_writers_in_the_middle_of_the_same_path_do_not_meet(tmp_path):
    with atomic_write(tmp_path / 'file') as a:
        a.write(b'first')
        with atomic_write(tmp_path / 'file') as b:
            b.write(b'second')
        assert (tmp_path / 'file').read_bytes() == b'second'
    assert (tmp_path / 'file').read_bytes() == b'first' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('no')])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises((KeyboardInterrupt, ValueError)):
        with atomic_write(tmp_path / 'file') as f:
            f.write(b'new')
            raise error
    assert (tmp_path / 'file').read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


class FullDisk:
    "A file on a disk with 500 bytes."

    def __init__(self):
        self.size = 0

    def write(self, data):
        self.size += len(data)
        if self.size > 500:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return len(data)

    def flush(self):
        pass


def test_a_full_disk_is_one_line_even_when_torch_hides_it(tmp_path):
    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises(OSError, match='no space left to write .*file; any earlier file there') as e:
        with atomic_write(tmp_path / 'file'):
            torch.save({'w': torch.arange(1000.0)}, FullDisk())
    assert e.value.errno == errno.ENOSPC and '\n' not in str(e.value)
    assert (tmp_path / 'file').read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def locked_elsewhere(folder):
    "Whether another process finds the folder in use."
    attempt = f'from glsd.data.files import folder_lock\nwith folder_lock({str(folder)!r}): pass'
    done = subprocess.run([sys.executable, '-c', attempt], capture_output=True, text=True)
    assert done.returncode == 0 or 'InUseError' in done.stderr, done.stderr
    return done.returncode != 0


def test_a_nested_lock_is_refused_and_frees_nothing(tmp_path):
    with folder_lock(tmp_path):
        for spelling in (tmp_path, str(tmp_path) + '/.', os.path.relpath(tmp_path)):
            with pytest.raises(InUseError, match=f'in use by process {os.getpid()}; wait for it'):
                with folder_lock(spelling):
                    raise AssertionError
        assert locked_elsewhere(tmp_path)
    assert not locked_elsewhere(tmp_path) and os.listdir(tmp_path) == []
    with folder_lock(tmp_path):  # and it can be taken again
        assert os.listdir(tmp_path) == ['lock']


def test_a_lock_in_another_thread_is_refused_too(tmp_path):
    errors = []

    def attempt():
        try:
            with folder_lock(tmp_path):
                pass
        except InUseError as e:
            errors.append(e)

    with folder_lock(tmp_path):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert len(errors) == 1 and locked_elsewhere(tmp_path)


def test_a_lock_is_freed_when_its_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with folder_lock(tmp_path):
            raise KeyboardInterrupt
    assert not locked_elsewhere(tmp_path)


def attempt_in_fork(folder, connection):
    try:
        with folder_lock(folder):
            connection.send('granted')
    except InUseError:
        connection.send('refused')


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_fork_holds_no_lock_and_can_take_it_when_its_parent_has_freed_it(tmp_path):
    fork = multiprocessing.get_context('fork')
    ours, theirs = fork.Pipe()
    with folder_lock(tmp_path):
        child = fork.Process(target=attempt_in_fork, args=(tmp_path, theirs))
        child.start()
        assert ours.recv() == 'refused'
        child.join()
        assert locked_elsewhere(tmp_path)  # the end of the child freed nothing
        sleeper = fork.Process(target=attempt_when_told, args=(tmp_path, theirs, tmp_path / 'go'))
        sleeper.start()
    (tmp_path / 'go').touch()
    assert ours.recv() == 'granted'
    sleeper.join()


def attempt_when_told(folder, connection, go):
    while not go.exists():
        time.sleep(0.01)
    attempt_in_fork(folder, connection)


def take_turns(path, counter, times):
    done = 0
    while done < times:
        try:
            with file_lock(path):
                value = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(value + 1))
                done += 1
        except InUseError:
            pass


@pytest.mark.slow
def test_a_lock_file_that_is_removed_and_made_again_admits_one_process_at_a_time(tmp_path):
    counter = tmp_path / 'counter'
    counter.write_text('0')
    others = [SPAWN.Process(target=take_turns, args=(tmp_path / 'a.lock', counter, 50)) for _ in range(3)]
    for p in others:
        p.start()
    for p in others:
        p.join()
    assert counter.read_text() == '150' and os.listdir(tmp_path) == ['counter']


def test_the_message_names_what_is_locked(tmp_path):
    with file_lock(tmp_path / '.a.lock'):
        with pytest.raises(InUseError, match='^the data set a is in use by process'):
            with file_lock(tmp_path / '.a.lock', 'the data set a'):
                raise AssertionError
