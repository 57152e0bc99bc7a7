"A probe that is cut goes on to the same bits, wherever and with however many workers; and what it refuses."

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from glsd.backbones import TimmBackbone, create_backbone
from glsd.data import Subset, ToyWorld
from glsd.evaluation.blocks import AtBlock, LastBlocks, block_features
from glsd.evaluation.copies import WithGeM
from glsd.evaluation.extraction import extract
from glsd.evaluation.labels import check_probe_sets
from glsd.evaluation.linear import linear_probe
from glsd.views.photometric import denormalize


@pytest.fixture(scope='module')
def worlds():
    return ToyWorld(60, size=32), ToyWorld(24, size=32, split='val')


class Colours(nn.Module):
    "A cheap backbone: means over a grid of 4 x 4 places."

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def probe(worlds, backbone=None, **options):
    options = {'size': 32, 'epochs': 4, 'batch_size': 20, 'progress': False, **options}
    return linear_probe(backbone or Colours(), *worlds, **options)


@pytest.mark.parametrize('cut_after', [1, 5, 9])
def test_resumed_is_bit_equal(worlds, tmp_path, cut_after):
    class Fails(Colours):
        calls = 0

        def forward(self, x):
            Fails.calls += 1
            if Fails.calls > cut_after:
                raise KeyboardInterrupt
            return super().forward(x)

    Fails.__repr__ = lambda self: 'Colours()'
    with pytest.raises(KeyboardInterrupt):
        probe(worlds, Fails(), out=tmp_path)
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


def test_a_rate_that_diverges_is_named_and_scores_nothing(worlds):
    r = probe(worlds, lrs=(0.1, 1e38), cached=True)
    assert r['grid'][1] == dict(lr=1e38, top1=0.0, top5=0.0, loss=None)
    assert r['lr'] == 0.1 and r['grid'][0]['loss'] > 0
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
    options = dict(num_classes=0, img_size=32, reg_tokens=3, global_pool='avg')
    vit = timm.create_model('vit_tiny_patch16_224', **options).eval()
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


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(lrs=(0.1, -1.0)), 'must be positive'),
        (dict(lrs=()), 'must be positive'),
        (dict(epochs=0), 'must be positive'),
        (dict(n_blocks=2), 'n_blocks = 2: choose from 1 to 1'),
        (dict(lrs=(1e38,), cached=True), 'the loss diverged at every learning rate'),
        (dict(backbone=create_backbone('vit_mini'), n_blocks=3), 'n_blocks = 3: choose from 1 to 2'),
        (dict(backbone=create_backbone('vit_mini'), size=30), 'multiples of 8'),
    ],
)
def test_options_that_cannot_be_in_one_line(worlds, change, message):
    with pytest.raises(ValueError, match=message) as e:
        probe(worlds, **change)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'sets, message',
    [
        (lambda a, b: (a, ToyWorld(20, size=32, shapes=('square',))), 'differ in their classes'),
        (lambda a, b: (Subset(a, [0, 12]), Subset(b, [0])), 'all training images are of one class'),
        (lambda a, b: (a, Subset(b, [])), 'there are no test images'),
        (lambda a, b: (Subset(a, np.flatnonzero(a.labels != 3)), b), 'no probe can learn it'),
    ],
)
def test_sets_that_cannot_be_probed_in_one_line(worlds, sets, message):
    with pytest.raises(ValueError, match=message) as e:
        check_probe_sets(*sets(*worlds))
    assert '\n' not in str(e.value)


def test_another_backbone_does_not_take_over_a_state(worlds, tmp_path):
    probe(worlds, create_backbone('vit_mini'), out=tmp_path, epochs=1, n_blocks=1)
    with pytest.raises(ValueError, match='backbone = '):
        probe(worlds, create_backbone('vit_mini'), out=tmp_path, epochs=1, n_blocks=1)


def test_the_size_is_checked_before_features_are_computed(worlds):
    class Counts(Colours):
        seen = 0

        def forward(self, x):
            self.seen += len(x)
            raise ValueError('no crops of this size')

    net = Counts()
    with pytest.raises(ValueError, match='no crops'):
        probe(worlds, net, cached=True)
    assert net.seen == 1


def test_the_last_four_blocks_of_a_swin_are_esvits():
    """2,304 numbers of a Swin-T: averages after two blocks of the third stage, and two of the last with
    its LayerNorm."""
    swin = create_backbone('swin_tiny_w7').eval()
    x, seen = torch.randn(2, 3, 64, 64), []
    blocks = [b for stage in swin.model.layers[2:] for b in stage.blocks][-4:]
    hooks = [b.register_forward_hook(lambda block, args, out: seen.append(out)) for b in blocks]
    with torch.no_grad():
        swin(x)
        for hook in hooks:
            hook.remove()
        found = LastBlocks(swin, 4)(x)
        expected = [m if m.shape[-1] == 384 else swin.model.norm(m) for m in seen]
    assert found.shape == (2, 2304) and LastBlocks(swin).layers == 1
    torch.testing.assert_close(found, torch.cat([m.mean((1, 2)) for m in expected], 1))


def test_a_published_swin_and_a_resnet_have_blocks_or_stages():
    for name, layers in (('swin_tiny_patch4_window7_224', 12), ('resnet10t', 5)):
        net = TimmBackbone(timm.create_model(name, num_classes=0, pretrained=False)).eval()
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(AtBlock(net, -1)(x).pooled, net(x).pooled)
            early = AtBlock(net, -layers)(x)
        assert early.grid > net(x).grid and early.tokens.shape[1] == early.grid[0] * early.grid[1]
        with pytest.raises(ValueError, match=f'no block {layers}: the backbone has {layers}'):
            AtBlock(net, layers)


def test_every_block_of_a_vit_with_cls_and_registers():
    model = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32, reg_tokens=2).eval()
    net, x = TimmBackbone(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model.get_intermediate_layers(x, n=[3, 11], return_prefix_tokens=True, norm=True)
        for f, (tokens, prefix) in zip(block_features(net, x, [3, -1]), theirs):
            torch.testing.assert_close(f.pooled, prefix[:, 0])
            torch.testing.assert_close(f.tokens, tokens)
        torch.testing.assert_close(AtBlock(net, 3)(x).pooled, theirs[0][1][:, 0])


def test_a_module_without_blocks_is_named():
    with pytest.raises(ValueError, match='Colours gives no maps of its inner layers'):
        AtBlock(Colours(), -1)
    with pytest.raises(ValueError, match='no maps of its inner layers'):
        block_features(Colours(), torch.zeros(1, 3, 8, 8), [0])


@pytest.mark.parametrize('wrap', [LastBlocks, WithGeM, lambda net: AtBlock(net, 0)])
def test_a_wrapper_leaves_the_mode_alone(wrap):
    for mode in (True, False):
        net = create_backbone('vit_mini').train(mode)
        extract(wrap(net), ToyWorld(4, 32), 32)
        assert net.training == mode and net.model.blocks[0].training == mode


def test_maes_probe_is_cut_and_gone_on_with_and_sees_no_scale(worlds, tmp_path):
    "BatchNorm's averages are part of the state, and dimensions may have any length."

    class Stretched(Colours):
        def forward(self, x):
            return super().forward(x) * torch.logspace(-2, 2, 48)

    whole = probe(worlds, protocol='mae', lrs=(1.0, 10.0))
    assert (
        whole['protocol'] == 'mae' and whole['grid'] == probe(worlds, protocol='mae', lrs=(1.0, 10.0))['grid']
    )
    stretched = probe(worlds, Stretched(), protocol='mae', lrs=(1.0, 10.0))
    assert [row['loss'] for row in stretched['grid']] == pytest.approx(
        [row['loss'] for row in whole['grid']], abs=1e-3
    )

    class Fails(Colours):
        calls = 0

        def forward(self, x):
            Fails.calls += 1
            if Fails.calls > 5:
                raise KeyboardInterrupt
            return super().forward(x)

    Fails.__repr__ = lambda self: 'Colours()'
    with pytest.raises(KeyboardInterrupt):
        probe(worlds, Fails(), protocol='mae', lrs=(1.0, 10.0), out=tmp_path)
    assert probe(worlds, protocol='mae', lrs=(1.0, 10.0), out=tmp_path)['grid'] == whole['grid']
    with pytest.raises(ValueError, match="no protocol 'moco' of the linear probe; choose from: dino, mae"):
        probe(worlds, protocol='moco')
