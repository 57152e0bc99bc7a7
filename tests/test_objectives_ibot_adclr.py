"iBOT and ADCLR: what their chapters cannot show, through the trainer and by property."

from types import SimpleNamespace as Outputs

import numpy as np
import pytest
import torch

from glsd.backbones import create_backbone
from glsd.objectives.adclr import query_pairs
from glsd.objectives.ibot import IBOTLoss, block_mask, draw_masks, masked_weights
from glsd.training import Recipe
from glsd.training.loop import batches, build_dataset
from glsd.training.trainer import Trainer

SMALL = dict(
    image_size=32,
    n_images=8,
    global_size=32,
    local_size=16,
    n_local=1,
    backbone='vit_mini',
    out_dim=32,
    head_hidden=16,
    head_bottleneck=8,
    batch_size=4,
    steps=2,
    drop_path=0.2,
)


def trained(method, steps=2, **changes):
    more = dict(n_query=3) if 'adclr' in method else {}
    recipe = Recipe(method, **SMALL | more | changes)
    trainer = Trainer(recipe, 2)
    views = list(batches(recipe, build_dataset(recipe), 0, 2, trainer.method.views))
    return trainer, [trainer.step(v) for v in views[:steps]], views


@pytest.mark.parametrize(
    'method, terms',
    [('ibot', {'view', 'patch'}), ('adclr', {'view', 'query'}), ('adclr_ibot', {'view', 'patch', 'query'})],
)
def test_methods_train(method, terms):
    _, lines, _ = trained(method, steps=1)
    assert all(np.isfinite(line[term]) and line[term] > 0 for line in lines for term in terms)


def test_resumes_and_repeats():
    "A checkpoint holds everything, the shared head and the mask token too; chance comes from seed and step."
    trainer, lines, views = trained('adclr_ibot')
    first = trained('adclr_ibot', steps=1)[0]
    again = Trainer(trainer.recipe, 2)
    again.load_state_dict(first.state_dict())
    assert again.step(views[1])['loss'] == lines[1]['loss']
    for a, b in zip(trainer.method.state_dict().values(), again.method.state_dict().values()):
        assert torch.equal(a, b)


def test_ibot_on_swin():
    (line,) = trained('ibot', steps=1, backbone='swin_mini')[1]
    assert np.isfinite(line['patch']) and line['patch'] > 0


def test_ibot_head_reads_masked_views_only():
    trainer, _, views = trained('ibot', steps=0)
    student, teacher = trainer.method.outputs(views[0])
    logits = student.logits['patch'].shape[1]
    assert logits == teacher.logits['patch'].shape[1] == 2 * 16 < student.tokens.shape[1]
    assert student.inputs[0]['mask'].shape == (2 * 4, 16) and not any(teacher.inputs)


@pytest.mark.parametrize('options', [dict(ratio=0.0, ratio_var=0.0), dict(prob=0.0)])
def test_nothing_masked_nothing_learned(options):
    loss = IBOTLoss(8, **options)
    views = Outputs(crops=[torch.zeros(2, 3, 3, 32, 32)])
    branch = Outputs(backbone=Outputs(stride=8), heads={'mask': Outputs(token=torch.zeros(4))})
    s, t = torch.randn(3, 32, 8, requires_grad=True), torch.randn(3, 32, 8)
    inputs = loss.backbone_inputs(views, branch, teacher=False)
    student = Outputs(tokens=s, logits={'patch': s}, inputs=inputs)
    value = loss(student, Outputs(logits={'patch': t}), 0.04)
    value.backward()
    assert value == 0 and not s.grad.any()


@pytest.mark.parametrize('grid', [(14, 14), (7, 7), (4, 4), (3, 5), (2, 2), (1, 9), (2, 1)])
@pytest.mark.parametrize('ratio', [0.1, 0.5, 0.9])
def test_masks_of_any_grid(grid, ratio):
    n = ratio * grid[0] * grid[1]
    counts = [block_mask(grid, n, np.random.default_rng(i)).sum() for i in range(20)]
    assert max(counts) <= n and (max(counts) > 0 or n < 1)


def test_masks_are_blocks_of_the_published_shape():
    "The first block of a mask is a rectangle whose sides keep to the aspect, give or take rounding."
    for i in range(50):
        rows, cols = block_mask((40, 40), 200, np.random.default_rng(i)).nonzero()
        assert len(rows) <= 200
    shares = draw_masks(1000, (14, 14), np.random.default_rng(0)).float().mean(1)
    some = shares[shares > 0]
    assert 0.45 < len(some) / 1000 < 0.55 and 0.26 < some.mean() < 0.31 and some.max() <= 0.5


def test_ibot_weights():
    mask = draw_masks(6, (4, 4), np.random.default_rng(1), prob=1.0)
    weights = masked_weights(mask, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert torch.equal(weights > 0, mask.view(2, 3, 16).transpose(0, 1).flatten(1))


@pytest.mark.parametrize('V, Q', [(2, 1), (2, 7), (3, 4)])
def test_query_weights(V, Q):
    W = query_pairs(V, Q).view(V, Q, V, Q)
    for a, i, b, j in np.ndindex(*W.shape):
        assert (W[a, i, b, j] > 0) == (a != b and i == j)
    assert W.sum() == pytest.approx(1)


@pytest.mark.parametrize('name, p', [('vit_tiny_p16', 16), ('vit_tiny_p16_mean', 16), ('vit_mini', 8)])
def test_queries_are_never_read(name, p):
    "Features, gradients, buffers and the random numbers after them are those without queries, bit by bit."
    backbone = create_backbone(name, drop_path=0.3)
    start = {k: v.clone() for k, v in backbone.state_dict().items()}
    x, q = torch.randn(3, 3, 2 * p, 2 * p), torch.randn(3, 4, 3, p, p)

    def run(**inputs):
        backbone.load_state_dict(start)
        torch.manual_seed(1)
        f = backbone.train()(x, **inputs)
        grads = torch.autograd.grad(f.pooled.square().sum() + f.tokens.sum(), list(backbone.parameters()))
        return [f.pooled, f.tokens, *grads, *backbone.buffers(), torch.rand(2)]

    for a, b in zip(run(), run(queries=q)):
        assert torch.equal(a, b)


def test_step_without_weight_is_dinos():
    "With lambda 0 the student moves as DINO's does: no query is read."
    dino, adclr = trained('dino')[0].method, trained('adclr', query_weight=0.0)[0].method
    weights = dino.student.backbone.state_dict(), adclr.student.backbone.state_dict()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    'method, changes, message',
    [
        ('adclr', dict(backbone='swin_mini'), 'cannot take .queries.'),
        ('adclr', dict(backbone='resnet_mini'), 'cannot take .queries.'),
        ('ibot', dict(backbone='resnet_mini'), 'cannot take .mask.'),
        ('adclr', dict(n_query=0), 'n_query'),
        ('adclr', dict(query_scale=(0.5, 1.5)), 'query_scale'),
        ('adclr', dict(backbone='vit_tiny_p16', global_size=8, local_size=8), 'larger than|does not divide'),
        ('ibot', dict(patch_ratio=0.9), 'ratio=0.9'),
        ('ibot', dict(global_size=8, local_size=8), 'one token'),
    ],
)
def test_bad_input_is_one_line(method, changes, message):
    with pytest.raises(ValueError, match=message) as e:
        trained(method, steps=1, **changes)
    assert '\n' not in str(e.value)
