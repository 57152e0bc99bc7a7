"""ResNet, CvT and T2T-ViT: what their chapters do not show."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from glsd.backbones import create_backbone, features
from glsd.evaluation.attention import attention_maps, block_attention
from glsd.evaluation.frozen import load_frozen
from glsd.objectives.branches import Branch

MINI, LARGE = ['cvt_mini', 'resnet_mini', 't2t_mini'], {'cvt_13': 16, 't2t_vit_14': 16, 'resnet50': 32}


def on_meta(name, *args, **kwargs):
    with torch.device('meta'):
        return (timm.create_model if args else create_backbone)(name, *args, **kwargs)


def test_published_parameter_counts():
    count = lambda tensors: sum(t.numel() for t in tensors)
    assert count(on_meta('cvt_13', False).parameters()) == 19_997_480
    t2t = on_meta('t2t_vit_14', False)
    assert count(t2t.parameters()) + count(t2t.buffers()) == 21_545_550
    assert count(on_meta('resnet50', False).parameters()) == 25_557_032


@pytest.mark.parametrize('name', LARGE)
def test_large_ones_take_every_multiple_of_their_stride(name):
    net, stride = on_meta(name), LARGE[name]
    assert net.stride == net.patch == stride
    for h, w in ((224, 224), (stride, 3 * stride)):
        f = net(torch.empty(2, 3, h, w, device='meta'))
        assert (
            f.grid == (h // stride, w // stride)
            and f.tokens.shape == (2, f.grid[0] * f.grid[1], net.dim)
            and f.pooled.shape == (2, net.dim)
        )
    with pytest.raises(ValueError, match=f'multiples of {stride}'):
        net(torch.empty(1, 3, stride + 8, stride, device='meta'))


@pytest.mark.parametrize('name', MINI)
def test_weights_pass_through_a_file_into_timm(name, tmp_path):
    ours = create_backbone(name, drop_path=0.1).eval()
    save_file(ours.model.state_dict(), tmp_path / 'w.safetensors')
    theirs = timm.create_model(ours.timm_name, num_classes=0, **ours.timm_kwargs).eval()
    theirs.load_state_dict(load_file(tmp_path / 'w.safetensors'))
    for size in 32, 48:
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x).pooled, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MINI)
def test_all_weights_learn_and_forward_is_deterministic(name):
    model = create_backbone(name)
    f, g = model(torch.randn(2, 3, 32, 32)), model(torch.randn(2, 3, 16, 16))
    (f.tokens.sin().sum() + f.pooled.sin().sum() + g.tokens.cos().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(model.eval()(x).tokens, model(x).tokens) and torch.equal(
        copy.deepcopy(model)(x).tokens, model(x).tokens
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x).tokens[1:2], model(x[1:2]).tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MINI)
def test_drop_path_is_the_students_only(name):
    options = (
        dict(zero_init_last=False) if name == 'resnet_mini' else {}
    )  # else its blocks do nothing at first
    student, teacher = create_backbone(name, drop_path=0.5, **options), create_backbone(name)
    teacher.load_state_dict(student.state_dict())
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(student(x).pooled, student(x).pooled) and torch.equal(
        teacher(x).pooled, teacher(x).pooled
    )


@pytest.mark.parametrize('name', MINI)
def test_a_supervised_step_lowers_the_loss(name):
    torch.manual_seed(0)
    model = timm.create_model(create_backbone(name).timm_name, num_classes=4)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_cvt_equals_an_independent_implementation():
    "The numbers are those of CvtForImageClassification of transformers 5.23, set to the quick GELU."
    model = timm.create_model('cvt_mini_32', num_classes=3, depths=(1, 2, 3))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):  # weights that need no random generator
            t = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_(
                (
                    torch.sin(t * (0.7 + 0.01 * i)) * (0.2 if p.ndim > 1 else 0.1)
                    + (p.ndim == 1 and name.endswith('weight'))
                ).view(p.shape)
            )
        x = torch.sin(torch.arange(2 * 3 * 24 * 32, dtype=torch.float64) * 0.37).view(2, 3, 24, 32).float()
        training, evaluating = model.train()(x), model.eval()(x)
    assert torch.allclose(
        training, torch.tensor([[-2.4560, -2.1147, -1.2640], [-2.4729, -2.3767, -1.6812]]), atol=5e-4
    )
    assert torch.allclose(
        evaluating, torch.tensor([[-2.9540, -2.4194, -1.2708], [-2.9384, -2.5433, -1.4917]]), atol=5e-4
    )


@pytest.mark.parametrize('name', MINI)
def test_they_stand_in_a_branch(name):
    from types import SimpleNamespace

    views = SimpleNamespace(
        crops=[torch.randn(2, 3, 3, 32, 32), torch.randn(1, 3, 3, 16, 16)],
        w_geo=[torch.zeros(2, 3, 7), torch.zeros(1, 3, 7)],
        batch_size=3,
    )
    out = Branch(
        create_backbone(name),
        {'view': 'pooled', 'region': 'tokens'},
        out_dim=16,
        hidden_dim=16,
        bottleneck_dim=8,
    )(views)
    assert out.logits['region'].shape == (3, 36, 16) and out.grids == [(4, 4)] * 2 + [(2, 2)]


@pytest.mark.parametrize('name', MINI)
def test_they_refuse_masks_and_queries(name):
    with pytest.raises(ValueError, match="cannot take 'mask'"):
        create_backbone(name)(torch.zeros(1, 3, 32, 32), mask=torch.zeros(1, 16, dtype=torch.bool))


def test_under_autocast():
    for name in MINI:
        with torch.autocast('cpu', torch.bfloat16):
            f = create_backbone(name).eval()(torch.randn(1, 3, 16, 16))
        assert f.tokens.isfinite().all()


@pytest.mark.parametrize('spec', ['random:resnet_mini', 'random:resnet10t', 'random:cvt_mini'])
def test_a_network_without_readable_attention_says_so_in_one_line(spec):
    for ask in (
        lambda net, x: attention_maps(net, x),
        lambda net, x: attention_maps(net, x, (0, 0)),
        block_attention,
    ):
        with pytest.raises(ValueError, match='has no self-attention that can be read') as e:
            ask(load_frozen(spec), torch.zeros(1, 3, 32, 32))
        assert '\n' not in str(e.value)


def test_attention_of_t2t_can_be_read():
    net = create_backbone('t2t_mini').eval()
    maps = attention_maps(net, torch.randn(2, 3, 32, 48))
    assert maps.shape == (2, 3, 4, 6) and (maps.sum((2, 3)) < 1).all()


OURS = ['cvt_13', 'cvt_mini_32', 't2t_vit_14', 't2t_mini_32', 'resnet_mini_32']
OURS += ['vit_mini_patch4_32', 'swin_mini_patch4_window4_32']


@pytest.mark.parametrize('name', OURS)
def test_no_random_weights_in_place_of_published_ones(name):
    with pytest.raises(RuntimeError, match=f'no weights of {name}'):
        timm.create_model(name, pretrained=True)
    with pytest.raises(OSError, match=f'random:{name} needs none'):
        load_frozen(name)


def test_the_weights_of_the_package():
    "Small, with a card, the same for timm, and seen in what they make of an image."
    file = features.weights_file('vit_mini_patch8_32')
    assert file.stat().st_size < 2**20 and 'CIFAR-10' in file.with_suffix('.md').read_text()
    ours = create_backbone('vit_mini', pretrained=True).eval()
    theirs = timm.create_model('vit_mini_patch8_32', pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x).pooled, theirs(x))
    random = create_backbone('vit_mini').eval()
    assert attention_maps(ours, x).std() > 10 * attention_maps(random, x).std()


def test_weights_that_come_with_the_package(tmp_path, monkeypatch):
    "In half precision, as they are kept; of another shape, one line."
    trained = create_backbone('vit_mini')
    half = {k: v.half() if v.is_floating_point() else v for k, v in trained.model.state_dict().items()}
    save_file(half, tmp_path / 'vit_mini_patch8_32.safetensors')
    monkeypatch.setattr(features, 'weights_file', lambda name: tmp_path / f'{name}.safetensors')
    ours = create_backbone('vit_mini', pretrained=True)
    assert 'pretrained' not in ours.timm_kwargs
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value.float(), half[name].float())
    with pytest.raises(RuntimeError, match='the weights of vit_mini_patch8_32 do not fit') as e:
        create_backbone('vit_mini', pretrained=True, embed_dim=48)
    assert '\n' not in str(e.value)
    with pytest.raises(RuntimeError, match='no weights of vit_mini_patch4_32 come with this package'):
        create_backbone('vit_mini_p4', pretrained=True)
