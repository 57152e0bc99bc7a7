"DrLoc: each variant against a plain double loop, where the gradient flows, what a caller can get wrong."

import math
from types import SimpleNamespace as Outputs

import pytest
import torch

from glsd.objectives import create_method
from glsd.objectives.drloc import (
    VARIANTS,
    DRLocLoss,
    LocalizationMLP,
    dense_localization_loss,
    draw_pairs,
    every_block_loss,
    pool_grid,
    regression_error,
)


def slow(tokens, grid, mlp, pairs, variant, divisor):
    "Loops over images, pairs and axes; the MLP reads two tokens side by side. Errors [image, pair, axis]."
    errors = []
    for image, drawn in zip(tokens, pairs):
        for a, b in drawn.tolist():
            out = mlp.rest(mlp.first(torch.cat([image[a], image[b]]))).view(2, -1)
            (i, j), (p, h) = divmod(a, grid[1]), divmod(b, grid[1])
            errors.append(one_axis(out[0], i - p, grid[0], variant, divisor))
            errors.append(one_axis(out[1], j - h, grid[1], variant, divisor))
    return torch.stack(errors).view(len(tokens), -1, 2)


def one_axis(out, c, k, variant, divisor):
    if variant == 'ce':
        return -(out.exp() / out.exp().sum())[c + 7].log()
    if variant == 'cycle':
        p = out.exp() / out.exp().sum()
        mu = sum(q * (n - 7) for n, q in enumerate(p))
        var = sum(q * (n - 7 - mu) ** 2 for n, q in enumerate(p))
        return (c - mu) ** 2 / var + 0.001 * var.sqrt().log()
    t = c if variant == 'signed' else abs(c)
    if divisor == 'k':
        t = t / k
    elif divisor == 'k-1':
        t = (c + k - 1) / (2 * (k - 1)) if variant == 'signed' else t / (k - 1)
    return (t - out[0]).abs()


@pytest.mark.parametrize('grid', [(7, 7), (3, 4)])
@pytest.mark.parametrize('divisor', ['k', 'k-1', 'none'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_each_variant_is_its_double_loop(variant, divisor, grid):
    torch.manual_seed(0)
    mlp = LocalizationMLP.for_variant(6, variant, hidden=8).double()
    tokens = torch.randn(3, grid[0] * grid[1], 6, dtype=torch.float64)
    pairs = draw_pairs(3, grid, 5)
    errors = slow(tokens, grid, mlp, pairs, variant, divisor)
    options = dict(grid=grid, mlp=mlp, variant=variant, divisor=divisor, pairs=pairs)
    close = dict(rtol=1e-4, atol=1e-6)
    mean = dense_localization_loss(tokens, **options).double()
    torch.testing.assert_close(mean, errors.mean(), **close)
    total = dense_localization_loss(tokens, reduction='sum', **options).double()
    torch.testing.assert_close(total, errors.mean(1).sum(), **close)


def test_the_released_codes_targets():
    "0 to 6, and a loss of seven times ours for seven times the prediction; a third hidden layer."
    mlp, tokens = LocalizationMLP(8, hidden=16), torch.randn(2, 49, 8)
    pairs = draw_pairs(2, (7, 7))
    ours = dense_localization_loss(tokens, (7, 7), mlp, pairs=pairs)
    with torch.no_grad():
        mlp.rest[-1].weight *= 7
        mlp.rest[-1].bias *= 7
    theirs = dense_localization_loss(tokens, (7, 7), mlp, pairs=pairs, divisor='none')
    torch.testing.assert_close(theirs, 7 * ours)
    deep = LocalizationMLP.for_variant(8, 'ce', hidden=16, n_layers=3)
    assert [m.out_features for m in deep.rest if hasattr(m, 'out_features')] == [16, 16, 30]
    assert dense_localization_loss(tokens, (7, 7), deep, variant='ce').isfinite()


def test_all_is_every_pair_once():
    torch.manual_seed(0)
    mlp, tokens = LocalizationMLP(4, hidden=8), torch.randn(2, 12, 4)
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12)).expand(2, -1, -1)
    with torch.no_grad():
        errors = slow(tokens, (3, 4), mlp, pairs, 'l1', 'k')
    torch.testing.assert_close(
        dense_localization_loss(tokens, (3, 4), mlp, m=10**9, variant='all'), errors.mean()
    )


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradient_reaches_tokens_and_mlp(variant):
    torch.manual_seed(0)
    tokens, mlp = (
        torch.randn(4, 196, 8, requires_grad=True),
        LocalizationMLP.for_variant(8, variant, hidden=16),
    )
    dense_localization_loss(tokens, (14, 14), mlp, variant=variant).backward()
    for x in tokens, *mlp.parameters():
        assert x.grad.isfinite().all() and x.grad.any()


def test_only_tokens_of_a_drawn_pair_get_gradient():
    tokens, mlp = torch.randn(2, 49, 8, requires_grad=True), LocalizationMLP(8, hidden=64)
    pairs = torch.tensor([[[3, 5], [3, 3]], [[0, 48], [5, 0]]])
    dense_localization_loss(tokens, (7, 7), mlp, pairs=pairs).backward()
    assert [set(g.abs().sum(-1).nonzero().flatten().tolist()) for g in tokens.grad] == [{3, 5}, {0, 48, 5}]


def test_batch_order_does_not_matter_and_images_do_not_mix():
    tokens, mlp, order = torch.randn(5, 49, 8), LocalizationMLP(8, hidden=16), torch.randperm(5)
    pairs = draw_pairs(5, (7, 7))
    loss = lambda which: dense_localization_loss(tokens[which], (7, 7), mlp, pairs=pairs[which])
    torch.testing.assert_close(loss(order), loss(slice(None)))
    torch.testing.assert_close(
        loss(slice(None)), torch.stack([loss(slice(i, i + 1)) for i in range(5)]).mean()
    )


def test_pairs_come_from_torchs_generator_and_are_uniform():
    torch.manual_seed(3)
    a = draw_pairs(2, (7, 7))
    torch.manual_seed(3)
    assert torch.equal(a, draw_pairs(2, (7, 7)))
    assert not torch.equal(a[0], a[1])
    counts = draw_pairs(200, (3, 2), 36).flatten().bincount(minlength=6).double()
    assert (counts - 2400).abs().max() < 5 * math.sqrt(2400)


def test_an_unknown_divisor_is_refused_by_the_error_itself():
    d = torch.rand(1, 5, 2)
    with pytest.raises(ValueError, match='divisor') as e:
        regression_error(d, torch.zeros_like(d), (3, 3), divisor='K')
    assert '\n' not in str(e.value)


def test_pooling():
    x = torch.randn(2, 8 * 21, 3)
    e, grid = pool_grid(x, (8, 21))
    assert grid == (7, 7) and e.shape == (2, 49, 3)
    torch.testing.assert_close(e[:, 0], x.view(2, 8, 21, 3)[:, :2, :3].mean((1, 2)))
    assert pool_grid(x[:, :6], (2, 3))[0].data_ptr() == x.data_ptr()


def test_under_autocast_the_loss_is_float32():
    with torch.autocast('cpu', torch.bfloat16):
        for variant in VARIANTS:
            loss = dense_localization_loss(
                torch.randn(1, 9, 4), (3, 3), LocalizationMLP.for_variant(4, variant, hidden=4), 9, variant
            )
            assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_sure_and_wrong_prediction_is_finite():
    mlp = LocalizationMLP.for_variant(4, 'cycle', hidden=4)
    with torch.no_grad():
        mlp.rest[-1].weight.zero_()
        mlp.rest[-1].bias.copy_(1e4 * torch.eye(30)[3] + 1e4 * torch.eye(30)[20])
    tokens = torch.randn(1, 9, 4, requires_grad=True)
    dense_localization_loss(tokens, (3, 3), mlp, variant='cycle').backward()
    assert all(p.grad.isfinite().all() for p in mlp.parameters())


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(variant='L1'), "variant 'L1'.*l1, signed, all, ce, cycle"),
        (dict(m=82), 'm=82.*3 x 3.*81'),
        (dict(m=0), 'm=0'),
        (dict(grid=(1, 1), tokens=torch.zeros(2, 1, 8)), 'one token'),
        (dict(grid=(3, 2)), '9 tokens.*3 x 2'),
        (dict(reduction='none'), "reduction='none' must be"),
        (dict(divisor='k+1'), "divisor 'k\\+1'"),
        (dict(variant='ce'), "'ce'.*2 outputs"),
        (dict(mlp=LocalizationMLP.for_variant(8, 'ce')), "'l1'.*30 outputs"),
        (dict(variant='cycle', mlp=LocalizationMLP(8, 6)), "'cycle'.*6 outputs"),
    ],
)
def test_errors_are_one_line(wrong, says):
    with pytest.raises(ValueError, match=says) as e:
        dense_localization_loss(
            **{**dict(tokens=torch.zeros(2, 9, 8), grid=(3, 3), mlp=LocalizationMLP(8)), **wrong}
        )
    assert '\n' not in str(e.value)


def test_the_term_is_the_mean_over_views():
    grids = [(4, 4), (2, 2), (4, 4), (3, 2)]
    out = Outputs(tokens=torch.randn(3, 42, 8, requires_grad=True), grids=grids)
    term = DRLocLoss(8, variant='all', weight=2.0)
    one = [
        dense_localization_loss(v, g, term.mlp, variant='all')
        for v, g in zip(out.tokens.split([16, 4, 16, 6], 1), grids)
    ]
    torch.testing.assert_close(term(out), 2 * sum(one) / 4)
    DRLocLoss(8)(out).backward()  # 64 pairs of 4 x 4, all 16 of 2 x 2
    assert out.tokens.grad[:, 16:20].any() and out.tokens.grad[:, -6:].any()
    with pytest.raises(ValueError, match='m=300 .*4 x 4'):
        DRLocLoss(8, m=300)(out)
    with pytest.raises(ValueError, match='one token'):
        DRLocLoss(8)(Outputs(tokens=torch.zeros(1, 17, 8), grids=[(4, 4), (1, 1)]))
    with pytest.raises(ValueError, match='variant'):
        DRLocLoss(8, variant='l2')


SMALL = dict(
    backbone='resnet_mini',
    global_size=32,
    local_size=16,
    n_local=2,
    out_dim=32,
    head_hidden=16,
    head_bottleneck=8,
)


def test_options_of_the_method():
    options = dict(drloc_weight=0.1, drloc_variant='ce', drloc_n_layers=3, drloc_divisor='none')
    objective = create_method('drloc', student_temp=0.2, **options, **SMALL).objective
    view, drloc = objective.terms['view'], objective.terms['drloc']
    assert [*objective.terms] == ['view', 'drloc'] and objective.teacher_groups == 1
    assert drloc.weight == 0.1 and view.weight == 1 and view.student_temp == 0.2
    assert drloc.mlp.rest[-1].out_features == 30 and len(drloc.mlp.rest) == 6
    assert drloc.options == dict(variant='ce', divisor='none')
    with pytest.raises(ValueError, match='unknown'):
        create_method('drloc', drloc_variant='l2', **SMALL)


def test_training_with_it(tmp_path):
    from glsd.training import Recipe, pretrain

    recipe = Recipe('drloc', n_images=16, image_size=32, batch_size=8, steps=2, **SMALL)
    run = pretrain(recipe, tmp_path / 'run', progress=False)
    values = [row['drloc'] for row in run.metrics if 'drloc' in row]
    assert values and all(0 < value < 2 for value in values)


def test_every_block_needs_an_mlp_each():
    blocks = [(torch.randn(2, 16, 8), (4, 4))] * 2
    assert every_block_loss(blocks, [LocalizationMLP(8), LocalizationMLP(8)]) > 0
    with pytest.raises(ValueError):
        every_block_loss(blocks, [LocalizationMLP(8)])
