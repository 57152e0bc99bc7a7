"The queue of floor 6: against a deque and the authors' values, on several processes, with bad input."

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from golden_values import close, golden
from torch import distributed as dist
from training_runs import in_processes

from glsd.contrastive.memory_bank import MemoryBank, check_queue
from glsd.objectives.moby import MoBYLoss
from glsd.objectives.moby import enqueue as write_ring
from glsd.training.processes import process_group


@pytest.fixture(scope='module')
def z():
    return golden('contrastive')


@pytest.mark.parametrize('size, batch', [(1, 1), (7, 3), (8, 4), (8, 8), (5, 12), (64, 1)])
def test_it_is_a_deque(size, batch):
    bank, plain = MemoryBank(size, 3), deque(maxlen=size)
    for _ in range(11):
        keys = torch.randn(batch, 3)
        bank.enqueue(keys)
        plain.extend(keys)
        assert bank.filled == len(plain)
        kept = bank.rows.roll(-int(bank.place), 0)[size - len(plain) :]
        assert torch.equal(kept, torch.stack(list(plain)))


def test_it_is_the_queue_of_moco(z):
    arrays, meta = z
    bank = MemoryBank(meta['moco']['queue'], arrays['moco_queue'].shape[0])
    bank.rows.copy_(arrays['moco_queue'].T)
    bank.place.fill_(meta['moco']['pointer'])
    bank.enqueue(F.normalize(arrays['z2'], dim=-1))
    close(bank.rows, arrays['moco_queue_after'].T, 1e-6)
    assert bank.place == meta['moco']['pointer_after']


def test_it_is_the_support_set_of_nnclr(z):
    arrays, meta = z
    bank = MemoryBank(meta['nnclr']['support'], arrays['z1'].shape[1], normalize=True)
    bank.rows.copy_(arrays['nnclr_support'])
    bank.filled.fill_(len(bank.rows))
    for view in '1', '2':
        index, rows = bank.nearest(arrays[f'z{view}'])
        assert torch.equal(index[:, 0], arrays[f'nnclr_index{view}'].long())
        assert torch.equal(rows, bank.rows[index])
    bank.enqueue(arrays['z1'])
    close(bank.rows, arrays['nnclr_support_after'], 1e-6)


def test_moby_has_two_of_them():
    moby, banks = MoBYLoss(queue=11, hidden=8, width=4), [MemoryBank(11, 4) for _ in range(2)]
    for _ in range(5):
        keys = torch.randn(4, 2, 4)
        write_ring(moby.queue, moby.place, keys)
        for view, bank in enumerate(banks):
            bank.enqueue(keys[:, view])
    assert all(torch.equal(b.rows, ring) and b.place == moby.place for b, ring in zip(banks, moby.queue))


@pytest.mark.parametrize('normalize', [False, True])
def test_neighbours(normalize):
    bank, z = MemoryBank(20, 5, normalize), torch.randn(6, 5)
    bank.enqueue(3 * torch.randn(12, 5))
    index, rows = bank.nearest(z, 20)
    cosines = F.cosine_similarity(z[:, None], bank.rows[None], dim=-1)
    assert torch.equal(index[:, :12], cosines[:, :12].argsort(1, descending=True))
    assert index[:, 12:].min() == 12 and rows.shape == (6, 20, 5)


def test_saved_and_gone_on_with():
    first, second = MemoryBank(10, 4), MemoryBank(10, 4)
    first.enqueue(torch.randn(7, 4))
    second.load_state_dict(first.state_dict())
    more = torch.randn(6, 4)
    for bank in first, second:
        bank.enqueue(more)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert not list(first.parameters())


def fill(out):
    with process_group('cpu'):
        torch.manual_seed(0)
        bank, rank, n = MemoryBank(10, 4), dist.get_rank(), dist.get_world_size()
        for keys in torch.randn(5, 6, 4):
            bank.enqueue(keys.chunk(n)[rank])
        if rank == n - 1:
            torch.save(bank.state_dict(), out / f'{n}.pt')
        dist.barrier()


@pytest.mark.slow
def test_two_processes_fill_it_as_one_does(tmp_path):
    for n in 1, 2:
        in_processes(n, fill, tmp_path)
    one, two = (torch.load(tmp_path / f'{n}.pt') for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: MemoryBank(0, 4), 'a queue needs room for at least one key, not 0'),
        (
            lambda: MemoryBank(4, 4).enqueue(torch.zeros(2, 3)),
            'a queue of width 4 takes keys [n, 4], not [2, 3]',
        ),
        (lambda: MemoryBank(4, 4).enqueue(torch.zeros(4)), 'a queue of width 4 takes keys [n, 4], not [4]'),
        (lambda: MemoryBank(4, 4).nearest(torch.zeros(2, 4), 5), 'k=5 neighbours out of a queue of 4'),
        (lambda: check_queue(8, 16), 'recipe: queue=8 is smaller than a batch of 16'),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError) as e:
        call()
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_a_queue_larger_than_the_data_is_a_warning():
    with pytest.warns(UserWarning, match='queue=64 is larger than the data, 48 images'):
        check_queue(64, 8, 48)
    check_queue(60, 8, 64)
