"Masked prediction fails on purpose: the figures of a batch see it, and the report names it."

import pytest
import torch

from glsd.evaluation import collapse_monitor, collapse_report
from glsd.masked.dvae import code_figures
from glsd.masked.failures import reconstruction_figures, target_figures
from glsd.masked.masks import random_masks
from glsd.objectives.method import create_method
from glsd.views.multicrop import Views

SMALL = dict(backbone='vit_mini_p4', global_size=32, decoder_dim=32, decoder_depth=1, decoder_heads=2)


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return create_method('mae', **SMALL, norm_pix=False)


def figures_of(method, x):
    hidden, visible = random_masks(torch.rand(len(x), 64), 0.75)
    with torch.no_grad():
        predicted, target = method.predict(x, hidden, visible), method.targets(x)
    return dict(
        reconstruction=reconstruction_figures(predicted, target, hidden),
        targets=target_figures(target, hidden),
    )


def test_a_decoder_that_says_the_mean_patch(mae):
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        mae.decoder.pred.weight.zero_()
        mae.decoder.pred.bias.copy_(mae.targets(x).mean((0, 1)))
    report = collapse_report(figures_of(mae, x))
    assert report.kind == 'mean patch' and 'a higher lr' in str(report)
    with torch.no_grad():
        torch.nn.init.normal_(mae.decoder.pred.weight)
    assert collapse_report(figures_of(mae, x)).kind == 'healthy'  # wrong, but no constant


def test_flat_images(mae):
    report = collapse_report(figures_of(mae, 0.7 + 0.005 * torch.randn(8, 3, 32, 32)))
    assert report.kind == 'constant targets' and 'nearly flat' in str(report)


def test_dead_codes_of_a_tokenizer_are_seen_while_it_trains():
    "The monitor of runs takes a tokenizer's counts along."
    torch.manual_seed(0)
    method = create_method(
        'dvae', backbone='dvae_mini', n_codes=64, code_dim=8, decoder_width=8, global_size=32
    )
    with torch.no_grad():
        method.to_logits.bias[5] = 1e4
    views = Views([torch.randn(1, 8, 3, 32, 32)], [torch.zeros(1, 8, 7)], torch.arange(8))
    method.train().training_step(views, {})
    monitor = collapse_monitor()
    with torch.no_grad():
        numbers = monitor(method.eval(), 1, views)
    assert numbers['codes/in_use'] == 1 / 64 and numbers['codes/top'] == 1
    assert 'dead codes' in [f.kind for f in monitor.report.findings]


def test_what_is_refused_and_the_edges():
    nothing, x = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, 3)
    for figures in (lambda: reconstruction_figures(x, x, nothing), lambda: target_figures(x, nothing)):
        with pytest.raises(ValueError, match='nothing is hidden'):
            figures()
    assert reconstruction_figures(x, x, ~nothing) == dict(gain=0.0, spread=0.0)
    assert target_figures(0 * x, ~nothing) == dict(varies=0.0)
    with pytest.raises(ValueError, match="'reconstruction/gain' is nan"):
        collapse_report(dict(reconstruction=dict(gain=float('nan'), spread=0.0)))
    assert collapse_report(dict(codes=code_figures(torch.ones(8)))).kind == 'healthy'
