"Tar shards as a data set: the same bits however they are read, and one line for what is wrong with them."

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data.folders import ImageError, ImageFolder, Subset, balanced_subset, save_list
from glsd.data.loading import eval_loader, make_loader
from glsd.data.packing import write_shards
from glsd.data.shards import INDEX, PLAN, ShardFolder, open_images
from glsd.data.tars import ShardError, split_name
from glsd.data.toyworld import ToyWorld
from glsd.views.multicrop import MultiCrop

pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader', 'ignore:The image decoding')
MULTICROP = MultiCrop(global_size=32, local_size=16, n_local=2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for k in range(37):
        (root / f'c{k % 3}').mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20 + k, 24, 3), np.uint8))
        image.save(root / f'c{k % 3}/{k:02}.{"jpg" if k % 2 else "png"}')
    return root


@pytest.fixture
def shards(folder, tmp_path):
    return write_shards(folder, tmp_path / 'shards', per_shard=5)


def tensors(views):
    return [*views.crops, *views.w_geo, views.index, views.label]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def one_line(error):
    return '\n' not in str(error.value)


def pack(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.parent


def png(value=0):
    out = io.BytesIO()
    Image.new('RGB', (9, 7), (value, 0, 0)).save(out, 'PNG')
    return out.getvalue()


def test_the_same_images_and_labels_as_the_folder(folder, shards):
    ds = ImageFolder(folder)
    assert len(shards) == 37 and len(shards.shards) == 8 and shards.classes == ds.classes
    assert sorted(map(int, shards.keys())) == list(range(37))
    for i, k in enumerate(map(int, shards.keys())):
        assert torch.equal(shards[i][0], ds[k][0]) and shards[i][1] == shards.labels[i] == ds[k][1]
        assert shards.read(i) == (folder / ds.files[k]).read_bytes()  # nothing was compressed again


def test_same_views_with_any_workers_start_and_processes(shards):
    # files are open when workers are forked
    reference = list(make_loader(shards, MULTICROP, 4, seed=3, epoch=2))
    assert torch.cat([v.index for v in reference]).tolist() == shards.order(3, 2)[:36].tolist()
    fresh = ShardFolder(shards.root)
    for workers in (0, 1, 3):
        for start in (0, 7):
            got = list(make_loader(fresh, MULTICROP, 4, seed=3, epoch=2, workers=workers, start=start))
            assert len(got) == 9 - start and all(map(same, reference[start:], got))
    parts = [list(make_loader(shards, MULTICROP, 4, seed=3, epoch=2, rank=r, world_size=2)) for r in (0, 1)]
    for whole, *halves in zip(reference, *parts):
        assert torch.equal(whole.index, torch.cat([h.index for h in halves]))
        for k, crops in enumerate(whole.crops):
            assert torch.equal(crops, torch.cat([h.crops[k] for h in halves], 1))


def test_order_is_a_function_of_seed_and_epoch_that_stays_in_its_window(shards):
    shards.window = 3
    orders = {(s, e): shards.order(s, e) for s in (0, 1) for e in (0, 1)}
    assert len({o.tobytes() for o in orders.values()}) == 4
    for (s, e), order in orders.items():
        assert sorted(order) == list(range(37)) and (order == shards.order(s, e)).all()
        assert len(set(shards.shard[order[:10]])) <= 3
        assert len(set(shards.shard[order[-5:]])) <= 2
    shards.window = 1
    switches = (np.diff(shards.shard[shards.order(0, 0)]) != 0).sum()
    assert switches == 7  # each of 8 shards is left once


def test_images_of_a_window_are_mixed(shards):
    shards.window, first = 8, []
    for epoch in range(200):
        first.append(shards.order(0, epoch)[0])
    assert len(set(first)) > 30  # any image can come first


def test_evaluation_subsets_and_spawned_readers_work_as_with_a_folder(folder, shards):
    crops, labels, _ = map(torch.cat, zip(*eval_loader(shards, 16, batch_size=10)))
    ds = Subset(ImageFolder(folder), [int(k) for k in shards.keys()])
    theirs = next(iter(eval_loader(ds, 16, batch_size=37)))
    assert torch.equal(crops, theirs[0]) and torch.equal(labels, theirs[1])
    part = balanced_subset(shards, 4)
    assert np.bincount(part.labels).tolist() == [4, 4, 4]
    views = next(iter(make_loader(part, MULTICROP, 12)))
    assert sorted(views.label.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    shards[0]
    again = pickle.loads(pickle.dumps(shards))
    assert torch.equal(again[5][0], shards[5][0])


def test_a_run_on_shards_that_is_interrupted_goes_on_to_the_same_weights(shards, tmp_path):
    from glsd.training import Recipe, pretrain

    recipe = Recipe(
        data=str(shards.root),
        global_size=32,
        local_size=16,
        n_local=1,
        backbone='vit_mini',
        out_dim=32,
        head_hidden=16,
        head_bottleneck=8,
        batch_size=12,
        steps=5,
        checkpoint_every=1,
        device='cpu',
    )
    whole = pretrain(recipe, tmp_path / 'whole', progress=False)

    class Interrupted(Exception):
        pass

    def stop(method, step, views):
        if step == 2:
            raise Interrupted
        return {}

    monitored = recipe.replace(monitor_every=2)
    with pytest.raises(Interrupted):
        pretrain(monitored, tmp_path / 'cut', progress=False, monitors={'stop': stop})
    rest = pretrain(recipe, tmp_path / 'cut', progress=False)
    for (name, a), b in zip(whole.backbone.state_dict().items(), rest.backbone.state_dict().values()):
        assert torch.equal(a, b), name

    from glsd.training.interruptions import batch_of
    from glsd.training.loop import batches

    multicrop = recipe.create_method().views
    for step, views in enumerate(batches(recipe, shards, 0, 5, multicrop), 1):  # what a replay would be given
        epoch, index = batch_of(recipe, shards, step)
        assert epoch == (step - 1) // 3 and index.tolist() == views.index.tolist()


def test_tarfile_reads_ours_by_the_convention_of_webdataset(shards):
    read = 0
    for name in shards.shards:
        with tarfile.open(shards.root / name) as tar:
            members = [(split_name(m.name), tar.extractfile(m).read()) for m in tar]
        for ((key, ext), data), ((key_of_label, cls), label) in zip(members[::2], members[1::2], strict=True):
            assert key == key_of_label and ext in ('jpg', 'png') and cls == 'cls'
            assert data == shards.read(read) and int(label) == shards.labels[read]
            read += 1
    assert read == 37


def test_the_webdataset_package_reads_ours_and_we_read_its(shards, tmp_path):
    wds = pytest.importorskip('webdataset')
    theirs = list(wds.WebDataset([str(shards.root / s) for s in shards.shards], shardshuffle=False))
    assert [s['__key__'] for s in theirs] == shards.keys()
    assert [int(s['cls']) for s in theirs] == shards.labels.tolist()
    (tmp_path / 'theirs').mkdir()
    with wds.TarWriter(str(tmp_path / 'theirs/000000.tar')) as out:
        for k in range(3):
            out.write({'__key__': f'sample{k}', 'png': png(k), 'cls': 2 * k})
    back = ShardFolder(tmp_path / 'theirs')
    assert back.labels.tolist() == [0, 2, 4] and [int(back[k][0][0, 0, 0]) for k in range(3)] == [0, 1, 2]


def test_same_images_same_bytes_and_writing_goes_on(folder, shards, tmp_path, monkeypatch):
    import glsd.data.packing as module

    write, calls = module._write_shard, []

    def full(f, dataset, indices):
        calls.append(len(indices))
        if len(calls) == 4:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        write(f, dataset, indices)

    monkeypatch.setattr(module, '_write_shard', full)
    out = tmp_path / 'again'
    with pytest.raises(OSError):
        write_shards(folder, out, per_shard=5)
    assert sorted(p.name for p in out.iterdir()) == ['000000.tar', '000001.tar', '000002.tar', PLAN]
    with pytest.raises(ShardError, match='000003.tar is missing, of 8 shards'):
        ShardFolder(out)
    calls.clear()
    monkeypatch.setattr(module, '_write_shard', lambda *args: (calls.append(1), write(*args)))
    write_shards(folder, out, per_shard=5)
    assert len(calls) == 5
    for name in shards.shards:
        assert (out / name).read_bytes() == (shards.root / name).read_bytes()


def test_writing_elsewhere_is_refused(folder, shards, tmp_path):
    for bad in [dict(per_shard=6), dict(seed=1)]:
        with pytest.raises(ValueError, match='shards of other images') as e:
            write_shards(folder, shards.root, **{'per_shard': 5, **bad})
        assert one_line(e)
    with pytest.raises(ValueError, match='is not empty'):
        write_shards(folder, folder)
    with pytest.raises(ValueError, match='per_shard is 0'):
        write_shards(folder, tmp_path / 'x', per_shard=0)


@pytest.mark.parametrize('keep', ['inside an image', 'between members', 'nothing'])
def test_a_truncated_tar_is_named_with_its_last_member(shards, keep):
    path = shards.root / '000002.tar'
    with tarfile.open(path) as tar:
        members = list(tar)
    ends = {'inside an image': members[4].offset_data + 9, 'between members': members[5].offset, 'nothing': 0}
    path.write_bytes(path.read_bytes()[: ends[keep]])
    with pytest.raises(ShardError, match='000002.tar') as e:
        ShardFolder(shards.root)
    assert one_line(e) and (members[4].name in str(e.value)) == (keep != 'nothing')


def test_a_stale_index_is_made_again_or_refused(shards, folder, tmp_path):
    grown = tmp_path / 'grown'
    pack(grown / 'a.tar', {'0.png': png(1), '0.cls': b'0'})
    assert len(ShardFolder(grown)) == 1 and (grown / INDEX).is_file()
    pack(grown / 'b.tar', {'0.png': png(2), '0.cls': b'1'})  # a new shard
    assert ShardFolder(grown).labels.tolist() == [0, 1]
    pack(grown / 'a.tar', {'0.png': png(3), '0.cls': b'0', '1.png': png(4), '1.cls': b'5'})  # one that grew
    ds = ShardFolder(grown)
    assert ds.labels.tolist() == [0, 5, 1] and [int(ds[i][0][0, 0, 0]) for i in range(3)] == [3, 4, 2]
    (grown / 'b.tar').unlink()  # one that is gone
    with pytest.raises(ShardError, match='b.tar is missing') as e:
        ShardFolder(grown)
    assert one_line(e)
    (grown / INDEX).unlink()
    assert len(ShardFolder(grown)) == 2
    (grown / INDEX).write_bytes(b'PK\x03\x04 cut')
    assert len(ShardFolder(grown)) == 2


def test_a_shard_that_changes_while_it_is_open_is_found_on_reading(tmp_path):
    root = pack(tmp_path / 's/a.tar', {'0.png': png(1), '1.png': png(2)})
    ds, size = ShardFolder(root), (root / 'a.tar').stat().st_size
    pack(root / 'a.tar', {'7.png': png(1), '1.png': png(2)})
    assert (root / 'a.tar').stat().st_size == size
    with pytest.raises(ShardError, match='has changed') as e:
        ds[0]
    assert one_line(e) and 'a.tar: 0.png' in str(e.value)
    assert int(ds[1][0][0, 0, 0]) == 2 and ShardFolder(root).keys() == ['7', '1']


def test_a_folder_that_cannot_be_written_keeps_its_index_in_memory(tmp_path, monkeypatch):
    import glsd.data.shards as module

    root = pack(tmp_path / 's/a.tar', {'0.png': png(1)})

    def refuse(*_):
        raise PermissionError(30, 'Read-only file system')

    monkeypatch.setattr(module, 'atomic_write', refuse)
    assert len(ShardFolder(root)) == 1 and not (root / INDEX).exists()


@pytest.mark.parametrize(
    'members, message',
    [
        ({'a.png': png(), 'a.cls': b'0', 'b.png': png()}, 'b has no label'),
        ({'a.png': png(), 'b.cls': b'0'}, 'b has a label, but no image'),
        ({'a.png': png(), 'a.cls': b'cat'}, 'a.cls holds no whole number'),
        ({'a.png': png(), 'a.json': b'[1]'}, 'a.json holds no whole number'),
        ({'a.txt': b'x'}, 'no image in the 1 shards'),
    ],
)
def test_odd_members_are_named(tmp_path, members, message):
    with pytest.raises(ShardError, match=message) as e:
        ShardFolder(pack(tmp_path / 's/000000.tar', members))
    assert one_line(e)


def test_a_member_that_is_no_image_and_folders_without_shards(tmp_path, folder):
    ds = ShardFolder(pack(tmp_path / 's/000000.tar', {'a/b.jpg': b'<html>', 'a/c.png': png()[:40]}))
    for i, name in enumerate(['a/b.jpg', 'a/c.png']):
        with pytest.raises(ImageError, match=f'000000.tar: {name}') as e:
            ds[i]
        assert one_line(e)
    with pytest.raises(ShardError, match='no shards in') as e:
        ShardFolder(folder)
    with pytest.raises(FileNotFoundError, match='no such folder'):
        ShardFolder(tmp_path / 'nowhere')
    assert isinstance(open_images(folder), ImageFolder)
    assert isinstance(open_images(tmp_path / 's'), ShardFolder)
    (tmp_path / 's/000000.tar').unlink()
    with pytest.raises(ShardError, match='is gone'):
        ShardFolder.__getitem__(_without_files(ds), 0)


def _without_files(ds):
    ds._open.clear()
    return ds


def test_the_command_packs_a_folder(folder, tmp_path, capsys):
    from glsd.cli import main

    assert main(['data', 'shard', str(folder), '--root', str(tmp_path / 'out'), '--per-shard', '10']) == 0
    assert '37 images in 4 shards' in capsys.readouterr().out and len(ShardFolder(tmp_path / 'out')) == 37
    assert main(['data', 'shard', str(folder), '--root', str(folder)]) == 2
    assert capsys.readouterr().err.count('\n') == 1


KINDS = ['folder', 'list', 'shards', 'toy world', 'part of a folder', 'part of shards', 'part of a part']


@pytest.fixture
def kinds(folder, shards, tmp_path):
    "A data set of every kind, made anew at each call."
    (tmp_path / 'list.txt').write_text(''.join(f'{f}\n' for f in ImageFolder(folder).files[::2]))
    return {
        'folder': lambda: ImageFolder(folder),
        'list': lambda: ImageFolder(folder, files=tmp_path / 'list.txt'),
        'shards': lambda: ShardFolder(shards.root),
        'toy world': lambda: ToyWorld(24, 16),
        'part of a folder': lambda: balanced_subset(ImageFolder(folder), 4),
        'part of shards': lambda: balanced_subset(ShardFolder(shards.root), 4),
        'part of a part': lambda: Subset(balanced_subset(ShardFolder(shards.root), 4), [5, 0, 3]),
    }


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_data_set_offers_the_same(kinds, kind):
    ds = kinds[kind]()
    assert len(ds) == len(ds.labels) > 0 and ds.labels.dtype == np.int64
    assert all(isinstance(c, str) for c in ds.classes) and ds.labels.max() < len(ds.classes)
    for i in (0, len(ds) - 1):
        image, label = ds[i]
        assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
        assert type(label) is int and label == ds.labels[i]
    assert ds.fingerprint() == kinds[kind]().fingerprint() == pickle.loads(pickle.dumps(ds)).fingerprint()
    assert len(ds.fingerprint()) == 16 and int(ds.fingerprint(), 16) >= 0
    views = next(iter(make_loader(ds, MULTICROP, 3)))
    crops, labels, _ = next(iter(eval_loader(ds, 16, 3)))
    assert views.batch_size == len(crops) == 3 and labels.tolist() == ds.labels[:3].tolist()


def test_fingerprints_tell_all_kinds_apart(kinds):
    assert len({make().fingerprint() for make in kinds.values()}) == len(KINDS)


@pytest.mark.parametrize('kind', KINDS)
def test_features_of_every_kind_are_cached_until_the_data_change(kinds, kind, tmp_path, monkeypatch):
    from glsd.backbones import create_backbone
    from glsd.evaluation import frozen

    extracted, extract = [], frozen.extract
    monkeypatch.setattr(frozen, 'extract', lambda *args, **kw: (extracted.append(1), extract(*args, **kw))[1])
    backbone = create_backbone('vit_mini').eval()
    for _ in range(2):
        features, labels = frozen.cached_extract(backbone, kinds[kind](), 16, tmp_path / 'cache')
    assert len(extracted) == 1 and len(features) == len(kinds[kind]())
    assert labels.tolist() == kinds[kind]().labels.tolist()


def test_a_shard_that_changes_changes_the_fingerprint(shards):
    before = shards.fingerprint()
    os.utime(shards.root / '000003.tar', ns=(0, 0))
    assert ShardFolder(shards.root).fingerprint() != before


@pytest.mark.parametrize('kind', KINDS)
def test_a_list_is_saved_or_refused_in_one_line(kinds, kind, folder, tmp_path):
    ds, path = kinds[kind](), tmp_path / 'saved.txt'
    if 'folder' in kind or kind == 'list':
        save_list(ds, path)
        again = ImageFolder(folder, files=path)
        assert all(torch.equal(again[i][0], ds[i][0]) for i in (0, len(ds) - 1)) and len(again) == len(ds)
    else:
        with pytest.raises(ValueError, match='a list holds paths of image files.*write_shards') as e:
            save_list(ds, path)
        assert one_line(e) and not path.exists()


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_can_be_packed(kinds, kind, tmp_path):
    ds = kinds[kind]()
    packed = write_shards(ds, tmp_path / 'packed', per_shard=7)
    assert packed.classes == ds.classes and len(packed) == len(ds)
    for i, k in enumerate(map(int, packed.keys())):
        assert torch.equal(packed[i][0], ds[k][0]) and packed[i][1] == ds[k][1]


def test_packing_another_toy_world_into_the_same_folder_is_refused(tmp_path):
    "The labels are the same ones; the images are not."
    write_shards(ToyWorld(24, 16), tmp_path / 'out', per_shard=8)
    with pytest.raises(ValueError, match='shards of other images'):
        write_shards(ToyWorld(24, 16, seed=1), tmp_path / 'out', per_shard=8)


def test_what_a_killed_call_leaves_does_not_stop_the_next(folder, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / f'.{PLAN}.123-0a1b2c3d.part').write_text('{"ima')
    assert len(write_shards(folder, out, per_shard=10)) == 37
    (out / '.000001.tar.123-0a1b2c3d.part').write_bytes(b'half')
    assert len(ShardFolder(out)) == 37
