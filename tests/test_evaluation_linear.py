"A probe that is cut goes on to the same bits, wherever and with however many workers; and what it refuses."

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from glsd.backbones import create_backbone
from glsd.data import ToyWorld
from glsd.evaluation.linear import LastBlocks, linear_probe
from glsd.views.photometric import denormalize


@pytest.fixture(scope='module')
def worlds():
    return ToyWorld(60, size=32), ToyWorld(24, size=32, split='val')


class Colours(nn.Module):
    "A cheap backbone: means over a grid of 4 x 4 places."

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def probe(worlds, backbone=None, **options):
    return linear_probe(
        backbone or Colours(), *worlds, 32, progress=False, **{**dict(epochs=4, batch_size=20), **options}
    )


@pytest.mark.parametrize('cut_after', [1, 5, 9])
def test_resumed_is_bit_equal(worlds, tmp_path, cut_after):
    class Dies(Colours):
        calls = 0

        def forward(self, x):
            Dies.calls += 1
            if Dies.calls > cut_after:
                raise KeyboardInterrupt
            return super().forward(x)

    Dies.__repr__ = lambda self: 'Colours()'
    with pytest.raises(KeyboardInterrupt):
        probe(worlds, Dies(), out=tmp_path)
    whole, again = probe(worlds), probe(worlds, out=tmp_path)
    assert again['grid'] == whole['grid'] and not list(tmp_path.glob('*.part'))
    assert probe(worlds, out=tmp_path) == again == json.loads((tmp_path / 'linear.json').read_text())


def test_workers_change_nothing(worlds):
    assert probe(worlds, epochs=1)['grid'] == probe(worlds, epochs=1, workers=2)['grid']


def test_each_rate_is_what_it_would_be_alone(worlds):
    together = probe(worlds, lrs=(0.01, 0.1, 1.0), cached=True)
    for row in together['grid']:
        (alone,) = probe(worlds, lrs=(row['lr'],), cached=True)['grid']
        assert alone['loss'] == pytest.approx(row['loss'], rel=1e-4)


def test_a_rate_that_explodes_is_named_and_scores_nothing(worlds):
    r = probe(worlds, lrs=(0.1, 1e38), cached=True)
    assert (
        r['grid'][1] == dict(lr=1e38, top1=0.0, top5=0.0, loss=None)
        and r['lr'] == 0.1
        and r['grid'][0]['loss'] > 0
    )
    json.dumps(r, allow_nan=False)


def test_features_that_tell_the_class_give_all_and_constant_ones_chance(worlds):
    class Oracle(nn.Module):
        seen = {images[i][0].numpy().tobytes(): images[i][1] for images in worlds for i in range(len(images))}

        def forward(self, x):
            labels = [self.seen.get(image.numpy().tobytes(), 0) for image in denormalize(x)]
            return nn.functional.one_hot(torch.tensor(labels), 12).float()

    assert probe(worlds, Oracle(), cached=True, epochs=20)['top1'] == 100

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3)

    assert probe(worlds, Constant(), cached=True)['top1'] == pytest.approx(100 / 12)


def test_training_mode_and_weights_stay_as_they_were(worlds):
    net = create_backbone('vit_mini').train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    probe(worlds, net, epochs=1)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_blocks_of_a_plain_timm_vit_are_timms_own():
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = vit.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
        ours = LastBlocks(vit)(x)
    torch.testing.assert_close(ours, torch.cat([prefix[:, 0] for _, prefix in theirs], 1))


def test_registers_and_cls_stay_out_of_a_mean():
    vit = timm.create_model(
        'vit_tiny_patch16_224', num_classes=0, img_size=32, reg_tokens=3, global_pool='avg'
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    net = LastBlocks(vit, 2)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:, -192:], vit(x))
    assert net.pooling == 'mean'


@pytest.mark.parametrize('name, why', [('nan', 'not finite'), ('map', 'not .1, d.')])
def test_unusable_features(worlds, name, why):
    class Bad(nn.Module):
        def forward(self, x):
            return x if name == 'map' else Colours()(x) * float('nan')

    with pytest.raises(ValueError, match=why):
        probe(worlds, Bad())


def test_a_damaged_state_and_another_setting_are_one_line(worlds, tmp_path):
    probe(worlds, out=tmp_path, epochs=1)
    with pytest.raises(ValueError, match='seed = 0, not 1'):
        probe(worlds, out=tmp_path, epochs=1, seed=1)
    other = ToyWorld(60, size=32, seed=5)
    with pytest.raises(ValueError, match='data = '):
        probe((other, worlds[1]), out=tmp_path, epochs=1)
    (tmp_path / 'linear.pt').write_bytes(b'half a file')
    with pytest.raises(ValueError, match='delete it'):
        probe(worlds, out=tmp_path, epochs=1)


def test_data_that_cannot_be_probed(worlds):
    none = ToyWorld(24, size=32)
    none.labels = np.full(24, -1)
    with pytest.raises(ValueError, match='24 of 24 test images have no label'):
        probe((worlds[0], none))
    with pytest.raises(ValueError, match='class disc rings has test images'):
        probe((ToyWorld(4, size=32), worlds[1]))
