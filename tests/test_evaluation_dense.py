"""Dense nearest neighbours: void pixels, own mask sizes, perfect tokens, odd grids, and folders that are
not in order."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.backbones import Features, create_backbone
from glsd.cli import main
from glsd.data import ToyWorld
from glsd.evaluation.dense import dense_nn, dense_picture
from glsd.evaluation.memory import Memory
from glsd.evaluation.segmentation import (
    MaskFolder,
    ToySegmentation,
    check_mask,
    class_iou,
    new_confusion,
    token_shares,
)
from glsd.evaluation.token_matching import PixelPatches


class Listed:
    "A data set from a list of (image, mask)."

    def __init__(self, pairs, n_classes, void=None):
        self.pairs, self.void, self.classes = pairs, void, [f'c{i}' for i in range(n_classes)]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


def flags(n, h, w, n_classes=3, seed=0, tile=8):
    "Images of tiles whose colour is their class, so that a pixel patch knows everything."
    g, out = torch.Generator().manual_seed(seed), []
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    for _ in range(n):
        classes = torch.randint(n_classes, (h // tile, w // tile), generator=g)
        mask = classes.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        out.append((colours[mask].permute(2, 0, 1).contiguous(), mask))
    return out


def run(memory, queries, size, backbone=None, **options):
    return dense_nn(backbone or PixelPatches(8), memory, queries, size, progress=False, **options)


def test_perfect_tokens_reach_the_ceiling():
    r = run(Listed(flags(6, 32, 48), 3), Listed(flags(3, 32, 48, seed=1), 3), (32, 48), k=5)
    assert r['miou'] == pytest.approx(r['ceiling']) and r['grid'] == [4, 6] and r['mask_size'] == [32, 48]
    json.dumps(r, allow_nan=False)


def test_void_neither_teaches_nor_counts():
    pairs, queries = flags(6, 32, 32), flags(3, 32, 32, seed=1)
    clean = run(Listed(pairs, 3), Listed(queries, 3), 32, k=5)
    half = [(i, m.clone()) for i, m in queries]
    for _, m in half:
        m[:16] = 255
    r = run(Listed(pairs, 3, 255), Listed(half, 3, 255), 32, k=5)
    assert sum(map(sum, r['confusion'])) == 3 * 16 * 32 and sum(map(sum, clean['confusion'])) == 3 * 32 * 32
    lies = [(i, torch.where(torch.arange(32)[:, None] < 16, 255, m)) for i, m in pairs]
    taught = Memory(PixelPatches(8), Listed(lies, 3, 255), 32, progress=False)
    assert len(taught.keys) == 6 * 8 and torch.allclose(taught.values.sum(1), torch.ones(48))


def test_masks_of_several_sizes_are_counted_at_their_own():
    small, large = flags(3, 32, 32), flags(2, 64, 64, tile=16)
    r = run(Listed(small + large, 3), Listed(small[:1] + large[:1], 3), 32, k=5)
    assert r['mask_size'] == 'own' and sum(map(sum, r['confusion'])) == 32 * 32 + 64 * 64


def test_a_class_that_nobody_meets_is_none_and_left_out_of_the_mean():
    r = run(Listed(flags(6, 32, 32), 4), Listed(flags(3, 32, 32, seed=1), 4), 32, k=5)
    assert r['iou']['c3'] is None
    assert r['miou'] == pytest.approx(np.mean([r['iou'][f'c{i}'] for i in range(3)]))


def test_one_matrix_is_the_sum_of_many():
    a, b, counts = torch.randint(5, (2, 50, 50)), torch.randint(4, (2, 50, 50)), new_confusion(4, void=4)
    for predicted, truth in zip(b, a):
        counts.update(predicted, truth)
    m = counts.compute()
    for truth in range(4):
        for predicted in range(4):
            assert m[truth, predicted] == ((a == truth) & (b == predicted)).sum()
    for c in range(4):
        either = (((a == c) | (b == c)) & (a != 4)).sum()
        assert class_iou(m)[c] == pytest.approx(float(100 * ((a == c) & (b == c)).sum() / either))


def test_shares_of_a_grid_that_does_not_divide_sum_to_one():
    shares = token_shares(torch.randint(5, (45, 60)), (7, 11), 5)
    assert shares.shape == (77, 5) and torch.allclose(shares.sum(1), torch.ones(77))


@pytest.mark.parametrize('name', ['vit_mini', 'swin_mini'])
def test_batches_and_workers_change_nothing(name):
    torch.manual_seed(0)
    net, kinds = create_backbone(name).train(), dict(size=32, shapes=('disc',), textures=('bars', 'rings'))
    memory = ToySegmentation(ToyWorld(12, **kinds))
    queries = ToySegmentation(ToyWorld(6, split='val', **kinds))
    one = run(memory, queries, 32, net, memory_size=100)
    two = run(memory, queries, 32, net, memory_size=100, batch_size=5, workers=1)
    assert net.training and one['memory'] == two['memory'] == 96
    assert one['miou'] == pytest.approx(two['miou'], abs=0.5)


def test_what_it_refuses():
    toy = Listed(flags(2, 32, 32), 3)
    bad = Listed([(i, m + 5) for i, m in flags(2, 32, 32)], 3)
    void = Listed([(i, m * 0 + 9) for i, m in flags(2, 32, 32)], 3, 9)
    with pytest.raises(ValueError, match='holds the number'):
        run(bad, toy, 32, k=2)
    with pytest.raises(ValueError, match='holds the number'):
        run(toy, bad, 32, k=2)
    with pytest.raises(ValueError, match='no pixel of the memory'):
        run(void, toy, 32, k=2)
    with pytest.raises(ValueError, match='no pixel of the query'):
        run(toy, void, 32, k=2)
    with pytest.raises(ValueError, match='must be from 1 to 32'):
        run(toy, toy, 32, k=33)
    with pytest.raises(ValueError, match='different classes'):
        run(toy, Listed(toy.pairs, 4), 32)
    with pytest.raises(ValueError, match='the only class'):
        run(Listed(toy.pairs, 1), Listed(toy.pairs, 1), 32)
    with pytest.raises(ValueError, match='no query images'):
        run(toy, Listed([], 3), 32)
    with pytest.raises(ValueError, match='no memory images'):
        run(Listed([], 3), toy, 32)

    class Pooled(torch.nn.Module):
        def forward(self, x):
            return Features(x.mean((2, 3)), None, None)

    with pytest.raises(ValueError, match='returns no tokens'):
        run(toy, toy, 32, Pooled())


def save(root, pairs, void=None):
    for part in ('images', 'masks'):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(pairs):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f'images/{i}.png')
        Image.fromarray(mask.byte().numpy()).save(root / f'masks/{i}.png')


def test_a_folder_is_what_was_saved(tmp_path):
    pairs = flags(3, 32, 48)
    save(tmp_path / 'train', pairs)
    ds = MaskFolder(tmp_path, 'train', classes=('red', 'green', 'blue'))
    assert ds.void == 3
    for i, (image, mask) in enumerate(pairs):
        assert torch.equal(ds[i][0], image) and torch.equal(ds[i][1], mask)
    indexed = Image.fromarray(pairs[0][1].byte().numpy(), mode='P')
    indexed.putpalette([0, 0, 0, 9, 9, 9, 200, 1, 1])
    indexed.save(tmp_path / 'train/masks/0.png')
    assert torch.equal(ds[0][1], pairs[0][1])
    fig = dense_picture({'pixels': PixelPatches(8)}, ds, ds, (32, 48), images=(0, 2), k=2, progress=False)
    assert len(fig.axes) == 2 * 3


def test_names_in_a_file_and_sizes_that_are_no_square(tmp_path):
    for split in 'train', 'val':
        save(tmp_path / split, flags(3, 32, 48))
    (tmp_path / 'classes.txt').write_text('red\ngreen\nblue\n')
    out = tmp_path / 'dense.json'
    main(
        ['evaluate', 'dense-nn', 'random:vit_mini', '--data', str(tmp_path), '--size', '32,48', '--k', '2']
        + ['--out', str(out)]
    )
    (found,) = json.loads(out.read_text())['backbones'].values()
    assert set(found['iou']) == {'red', 'green', 'blue'} and found['grid'] == [4, 6]
    assert out.with_suffix('.png').stat().st_size > 1000
    (tmp_path / 'classes.txt').write_text('red\n\nblue')
    with pytest.raises(ValueError, match='classes.txt must name one class per line'):
        MaskFolder(tmp_path, 'train')


def test_a_broken_mask_is_named(tmp_path):
    save(tmp_path / 'train', flags(2, 32, 32))
    (tmp_path / 'train/masks/1.png').write_bytes(b'no image')
    ds = MaskFolder(tmp_path, 'train')
    with pytest.raises(ValueError, match='masks/1.png'):
        ds[1]
    with pytest.raises(ValueError, match='masks/1.png'):
        run(ds, ds, 32)


class Counts(PixelPatches):
    "Counts the images that it sees."

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize('options', [dict(k=33), dict(k=0), dict(memory_size=1), dict(k=3, memory_size=2)])
def test_cheap_mistakes_are_found_before_any_features(options):
    net, toy = Counts(8), Listed(flags(2, 32, 32), 3)
    with pytest.raises(ValueError, match='memory') as e:
        run(toy, toy, 32, net, **options)
    assert '\n' not in str(e.value) and net.seen == 1  # one empty image, for the grid


def test_masks_that_hold_no_class_and_files_that_do_not_fit(tmp_path):
    check_mask(torch.tensor([0, 2, 9]), 3, 9)
    for mask, void in ((torch.tensor([0, 9]), None), (torch.tensor([0, 7]), 9), (torch.tensor([-1]), 9)):
        with pytest.raises(ValueError, match='a mask holds the number'):
            check_mask(mask, 3, void)
    save(tmp_path / 'val', flags(2, 32, 32))
    with pytest.raises(FileNotFoundError, match='a split has images/ and masks/'):
        MaskFolder(tmp_path, 'train')
    Image.new('RGB', (32, 32)).save(tmp_path / 'val/masks/0.png')
    with pytest.raises(ValueError, match='a mask in colours'):
        MaskFolder(tmp_path, 'val')[0]
    Image.new('L', (16, 32)).save(tmp_path / 'val/masks/0.png')
    with pytest.raises(ValueError, match=r'has \[32, 16\] pixels, its image'):
        MaskFolder(tmp_path, 'val')[0]
    (tmp_path / 'val/masks/1.png').unlink()
    with pytest.raises(ValueError, match='1 of 2 images in .* have no mask'):
        MaskFolder(tmp_path, 'val')


def test_images_as_the_backbone_wants_them():
    "Colours that only a network with the right mean tells apart."

    class Signs(PixelPatches):
        mean, std = (0.5,) * 3, (0.5,) * 3

        def forward(self, x):
            assert x.min() >= -1 and x.max() <= 1
            return super().forward(x)

    toy = Listed(flags(4, 32, 32), 3)
    assert run(toy, toy, 32, Signs(8), k=2)['miou'] == pytest.approx(run(toy, toy, 32, k=2)['ceiling'])
