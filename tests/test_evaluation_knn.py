"""What the chapter cannot show about k-NN: exactness under ties and odd sizes, the bound on memory, bad
data sets."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from glsd.backbones import TimmBackbone, create_backbone
from glsd.data import Subset, ToyWorld
from glsd.evaluation.extraction import evaluating, extract, transform_of
from glsd.evaluation.knn import knn_accuracy, knn_monitor, knn_picture, nearest, top, vote


def unit(n, d=8):
    return F.normalize(torch.randn(n, d), dim=1)


@pytest.mark.parametrize('k', [1, 16, 17, 199, 900])
@pytest.mark.parametrize('m', [900, 1024, 5000])
def test_nearest_is_brute_force(k, m):
    q, b = unit(37), unit(m)
    expected = (q.double() @ b.double().T).sort(descending=True)
    for sizes in (dict(), dict(chunk=5), dict(block=300), dict(chunk=8, block=16 * k + 3)):
        s, i = nearest(q, b, k, **sizes)
        torch.testing.assert_close(s.double(), expected.values[:, :k], atol=1e-6, rtol=0)
        far = expected.values[:, :k].diff().abs().amin(1) > 1e-6 if k > 1 else torch.ones(37, dtype=bool)
        assert (i[far] == expected.indices[far, :k]).all()


def test_ties_give_k_different_neighbours():
    """Every anchor five times: cosines are those of brute force, no index comes twice, and each index has
    the cosine it claims."""
    q, b = unit(9), unit(200).repeat(5, 1)
    for k in (3, 20, 60):
        s, i = nearest(q, b, k, block=700)
        torch.testing.assert_close(s, (q @ b.T).topk(k).values)
        torch.testing.assert_close(s, (q @ b.T).gather(1, i))
        assert all(len(set(row)) == k for row in i.tolist())


def test_the_largest_in_one_group():
    "All of the largest in one group, or in the columns that are too few for one."
    s = torch.zeros(1, 16 * 40 + 5)
    s[0, 7::40][:16] = torch.arange(1.0, 17)
    s[0, -5:] = 100 + torch.arange(5.0)
    assert top(s, 21)[0].tolist() == [[104, 103, 102, 101, 100, *range(16, 0, -1)]]


class Largest(TorchDispatchMode):
    "The most bytes that any one tensor made in here holds."

    bytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(
                    self.bytes, t.untyped_storage().nbytes() if t._base is None and not f.is_view else 0
                )
        return out


def test_memory_does_not_grow_with_the_bank():
    peak = []
    for m in (2_000, 8_000, 32_000):
        q, b = unit(300), unit(m)
        with Largest() as found:
            nearest(q, b, 20, chunk=64, block=1000)
        peak.append(found.bytes)
    assert peak[0] == peak[1] == peak[2] == 64 * 1000 * 4


def test_many_k_are_those_of_one():
    x, y = torch.randn(400, 8), torch.arange(400) % 3
    t, u = torch.randn(150, 8), torch.arange(150) % 3
    for dtype in (torch.float32, torch.float16):
        together = knn_accuracy(x.to(dtype), y, t.to(dtype), u, k=(1, 7, 50), chunk=3)
        assert together == {k: knn_accuracy(x.to(dtype), y, t.to(dtype), u, k=k)[k] for k in (1, 7, 50)}


def test_vote_is_the_sum_of_exponentials():
    s, y = torch.rand(50, 30).sort(descending=True).values, torch.randint(4, (50, 30))
    sums = torch.stack([((s / 0.07).exp() * (y == c)).sum(1) for c in range(4)], 1)
    assert (vote(s, y, [30], 4)[30] == sums.argmax(1)).all()


class Flat(torch.nn.Flatten):
    "The pixels, or a network that diverged."

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


def without_labels(ds):
    ds = Subset(ds, range(len(ds)))
    ds.labels = np.full(len(ds), -1)
    return ds


def renamed(ds):
    ds = Subset(ds, range(len(ds)))
    ds.classes = ['other', *ds.classes[1:]]
    return ds


def one_class(ds):
    return Subset(ds, np.flatnonzero(ds.labels == 3))


@pytest.mark.parametrize(
    'call',
    [
        lambda a, b, k: knn_monitor(a, b, 16, k),
        lambda a, b, k: knn_picture({'pixels': Flat()}, a, b, 16, k=k),
    ],
)
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda a, b: (without_labels(a), b, 5), '48 of 48 training images have no label'),
        (lambda a, b: (a, without_labels(b), 5), '24 of 24 test images have no label'),
        (lambda a, b: (one_class(a), one_class(b), 2), 'all training images are of class 3'),
        (
            lambda a, b: (Subset(a, np.flatnonzero(a.labels > 1)), b, 5),
            'class 0 has test images but no training image',
        ),
        (lambda a, b: (a, b, 49), 'k = 49 is more than the 48 training images'),
        (lambda a, b: (Subset(a, []), b, 1), 'no training images'),
        (lambda a, b: (a, renamed(b), 5), 'differ in their classes .12 and 12.: disc bars'),
        (lambda a, b: (a, Subset(b, []), 1), 'no test images'),
    ],
)
def test_bad_data_in_one_line_and_at_once(call, change, message):
    a, b, k = change(ToyWorld(48, 16), ToyWorld(24, 16, 'val'))
    with pytest.raises(ValueError, match=message) as e:
        call(a, b, k)
    assert '\n' not in str(e.value)


def test_a_network_that_diverged_is_named():
    a, b = ToyWorld(48, 16), ToyWorld(24, 16, 'val')
    with pytest.raises(ValueError, match='48 of 48 training features are not finite'):
        knn_monitor(a, b, 16, 5)(SimpleNamespace(backbone=Flat(float('nan'))), 0)
    with pytest.raises(ValueError, match='not finite'):
        knn_picture({'x': Flat(float('inf'))}, a, b, 16)


def test_picture_takes_chosen_queries_and_large_images():
    fig = knn_picture(
        {'a': Flat(), 'b': Flat(2.0)}, ToyWorld(48, 40), ToyWorld(24, 16, 'val'), 16, queries=[5, 5, 23], k=2
    )
    assert [len(f.axes) for f in fig.subfigs] == [9, 9]
    fig.canvas.draw()
    colours = [[ax.spines['top'].get_edgecolor() for ax in f.axes] for f in fig.subfigs]
    assert (
        colours[0] == colours[1] and colours[0][:3] == colours[0][3:6]
    )  # the same query twice; a factor changes no cosine


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(k=301), 'k = 301 is more than the 300 training images'),
        (dict(k=0), 'k must be 1 or more'),
        (dict(k=[]), 'k must be whole numbers'),
        (dict(k=['ten']), "k must be whole numbers, not \\['ten'\\]"),
        (dict(k=[2.5]), 'k must be whole numbers'),
        (dict(train_labels=-1), '300 of 300 training images have no label'),
        (dict(test_feats=torch.zeros(0, 8), test_labels=torch.zeros(0, dtype=torch.long)), 'no test images'),
        (dict(test_feats=torch.zeros(60, 3)), 'training features have 8 dimensions, test features 3'),
        (dict(train_feats=torch.zeros(299, 8)), '299 training features, but labels'),
        (dict(train_feats=torch.zeros(300)), r'training features must be \[n, d\]'),
        (dict(train_labels=0, test_labels=0), 'all training images are of class 0'),
        (dict(test_labels=7), 'class 7 has test images but no training image'),
    ],
)
def test_bad_features_in_one_line(change, message):
    given = dict(train_feats=torch.randn(300, 8), train_labels=torch.arange(300) % 5)
    given |= dict(test_feats=torch.randn(60, 8), test_labels=torch.arange(60) % 5, k=5)
    for name, value in change.items():
        fill = name.endswith('labels') and isinstance(value, int)
        given[name] = torch.full_like(given[name], value) if fill else value
    with pytest.raises(ValueError, match=message) as e:
        knn_accuracy(**given)
    assert '\n' not in str(e.value)


def test_a_backbone_that_forgot_to_pool_is_named():
    with pytest.raises(
        ValueError, match=r'the backbone returned \[48, 8, 2, 2\] for 48 images, not \[48, d\]'
    ):
        extract(torch.nn.Conv2d(3, 8, 8, stride=8), ToyWorld(48, 16), 16)


def test_images_as_the_backbone_wants_them():
    "Its own mean, std, crop share and interpolation; a wrapper's are those of what it wraps."
    world = ToyWorld(6, 40)

    class Wrapped(torch.nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, x):
            return self.backbone(x)

    net = Flat()
    net.mean, net.std, net.crop_pct, net.interpolation = (0.5,) * 3, (0.25,) * 3, 1.0, 'bilinear'
    small = torch.nn.functional.interpolate(
        torch.stack([world[i][0] for i in range(6)]), (16, 16), mode='bilinear', antialias=True
    )
    for backbone in net, Wrapped(net):
        torch.testing.assert_close(extract(backbone, world, 16)[0], ((small / 255 - 0.5) / 0.25).flatten(1))
    net.interpolation = 'random'  # timm's word for training crops
    assert transform_of(net).interpolation == 'bicubic'


def test_the_mode_comes_back_after_an_error():
    net = Flat().train()
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not net.training
        raise ZeroDivisionError
    assert net.training


def test_a_tensor_called_mean_is_not_a_wish():
    net = Flat()
    net.register_buffer('mean', torch.zeros(96))
    assert transform_of(net) == transform_of(Flat())


def test_published_vits_get_their_own_mean_and_ours_get_imagenets():
    model = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32)
    for net in (model, TimmBackbone(model)):
        how = transform_of(net)
        assert how.mean == how.std == (0.5,) * 3 and how.crop_pct == 0.9
    assert transform_of(create_backbone('vit_tiny_p16')) == transform_of(Flat())


def test_features_of_a_published_vit_are_those_of_images_with_mean_half():
    net = TimmBackbone(timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32)).eval()
    world = ToyWorld(4, 32)
    images = torch.stack([world[i][0] for i in range(4)])
    with torch.no_grad():
        right, wrong = net(images / 255 * 2 - 1).pooled, net((images / 255 - 0.45) / 0.225).pooled
    found = extract(net, world, 32)[0]
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-3)
    assert (found - wrong).abs().max() > 0.01
