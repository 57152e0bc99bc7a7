"""BEiT: against the authors' values (tests/golden/beit.npz), bad input, from a tokenizer's run to a file."""

import numpy as np
import pytest
import timm
import torch
from golden_values import golden
from safetensors.torch import load_file
from training_runs import apart, files_of_masked, in_processes, interrupt_at, same, small_recipe

from glsd.backbones import create_backbone
from glsd.backbones.beit import BEiTBackbone
from glsd.backbones.features import _backbones, register_backbone
from glsd.experiments.setup import why_not
from glsd.masked.beit import (
    BEiT,
    BEiTOptions,
    CodeTarget,
    code_monitor,
    masked_accuracy,
    masked_cross_entropy,
)
from glsd.masked.dvae import load_tokenizer, save_tokenizer
from glsd.masked.mae import reconstruct
from glsd.masked.masks import block_mask
from glsd.objectives.ibot import draw_block
from glsd.objectives.method import create_method
from glsd.training import export_backbone, load_method, load_run, pretrain
from glsd.training.checkpoint import last_checkpoint
from glsd.training.loop import batches
from glsd.training.sharding import join_world
from glsd.training.trainer import Trainer, build_dataset
from glsd.views.multicrop import Views

RUN = dict(backbone='beit_mini', drop_path=0.1, steps=6, checkpoint_every=2, device='cpu')


@pytest.fixture(scope='module')
def beit():
    return golden('beit')


def test_loss_gradient_and_accuracy(beit):
    z, _ = beit
    logits, hidden, codes = (
        z['mim_logits'].clone().requires_grad_(),
        z['mim_mask'].bool(),
        z['mim_ids'].long(),
    )
    loss = masked_cross_entropy(logits, codes, hidden)
    loss.backward()
    torch.testing.assert_close(loss.detach(), z['mim_loss'], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        logits.grad, z['mim_grad'], rtol=0, atol=1e-4 * float(z['mim_grad'].abs().max())
    )
    torch.testing.assert_close(masked_accuracy(logits, codes, hidden), z['mim_accuracy'])


def test_double_precision_is_kept(beit):
    z, _ = beit
    hidden, codes = z['mim_mask'].bool(), z['mim_ids'].long()
    loss = masked_cross_entropy(z['mim_logits'].double(), codes, hidden)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), z['mim_loss'], rtol=1e-6, atol=0)


def test_blocks_have_the_shapes_of_the_released_code(beit):
    "Area and shape of the first blocks, and the number of patches hidden, beside the stored statistics."
    m, rng = beit[1]['masks'], np.random.default_rng(1)
    shapes = np.array([draw_block(m['wanted'], m['min_block'], rng, 0.3) for _ in range(20_000)])
    log_shape = np.log(shapes[:, 0] / shapes[:, 1])
    assert abs(log_shape.mean()) < 0.02 and abs(log_shape.std() - m['std_log_aspect']) < 0.05
    counts = [block_mask((14, 14), m['wanted'], rng, low=m['min_block']).sum() for _ in range(2000)]
    assert abs(np.mean(counts) - m['mean_count']) < 0.1 and abs(np.std(counts) - m['std_count']) < 0.15


# What is refused


def build(tokenizer=None, size=32, **options):
    options = BEiTOptions(**dict(backbone='beit_mini') | options)
    patch = create_backbone(options.backbone).stride
    target = CodeTarget(patch, tokenizer) if tokenizer and options.target == 'codes' else None
    return BEiT(options, BEiT.default(BEiT.Views, global_size=size), target=target)


@pytest.fixture
def words():
    return load_tokenizer(files_of_masked()['tokenizer'])


def one_line(call, error, message):
    with pytest.raises(error) as e:
        call()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_networks_and_tokenizers_that_do_not_fit_are_one_line(words):
    one_line(lambda: build(words, size=34), ValueError, 'global_size=34: tokens of 4 pixels')
    one_line(lambda: build(), ValueError, 'target=codes needs a tokenizer: train one with method=dvae')
    coarse = create_method('dvae', backbone='resnet_mini', n_codes=8, code_dim=4, decoder_width=4)
    one_line(lambda: build(coarse), ValueError, 'one code per 8 pixels, the student one patch per 4')
    words.counts.fill_(0.0)[3] = 7.0
    one_line(lambda: build(words), ValueError, 'the tokenizer uses 1 of 16 codes')
    words.counts.fill_(0.0)
    one_line(lambda: build(words), ValueError, 'the tokenizer uses 0 of 16 codes')


def test_many_dead_codes_are_warned_of():
    many = create_method('dvae', backbone='dvae_mini', n_codes=100, code_dim=4, decoder_width=4)
    many.counts[:3] = 1.0
    with pytest.warns(UserWarning, match='uses 3 of 100 codes, the others are dead'):
        build(many)


@pytest.mark.parametrize(
    'changes, error, message',
    [
        (dict(tokenizer=''), ValueError, 'recipe: beit asks for codes: set tokenizer'),
        (dict(tokenizer='not/there'), FileNotFoundError, 'recipe: tokenizer=not/there is missing'),
        (dict(mask='stripes'), ValueError, "recipe: no mask 'stripes'; choose from: random, block, grid"),
        (dict(target='sound'), ValueError, "recipe: no target 'sound'; choose from: "),
        (dict(recover='some'), ValueError, "recipe: no recover 'some'; choose from: hidden, all"),
        (dict(mask_ratio=0.0), ValueError, 'recipe: mask_ratio=0 must lie between 0 and 1'),
        (dict(mask_ratio=1.0, recover='all'), ValueError, 'recipe: mask_ratio=1 must lie between 0 and 1'),
        (dict(n_local=2), ValueError, 'recipe: masked prediction sees one crop'),
    ],
)
def test_recipes_that_make_no_sense_are_one_line(changes, error, message):
    one_line(lambda: small_recipe('beit', **changes), error, message)


def test_nothing_hidden_and_nan(words):
    with pytest.raises(ValueError, match='nothing is hidden'):
        masked_cross_entropy(
            torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(1, 2, dtype=torch.bool)
        )
    x = torch.full((1, 2, 3, 32, 32), float('nan'))
    terms = build(words).training_step(Views([x], [torch.zeros(1, 2, 7)], torch.arange(2)), {})
    assert not terms['codes'].isfinite()  # the trainer names it


# What it does


@pytest.mark.parametrize('changes', [{}, dict(mask='random'), dict(target='rgb'), dict(recover='all')])
@pytest.mark.parametrize('backbone', ['beit_mini', 'vit_mini', 'test_swin', 'resnet_mini'])
def test_every_row_of_table_4_learns_on_each_backbone(words, backbone, changes):
    from glsd.backbones.swin import SwinBackbone

    name = 'swin_tiny_patch4_window7_224'
    sizes = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, img_size=32)
    register_backbone(test_swin=dict(timm_name=name, strict_img_size=False, **sizes))(SwinBackbone)
    torch.manual_seed(0)
    method = build(words, backbone=backbone, drop_path=0.0, **changes)
    views = Views([torch.randn(1, 8, 3, 32, 32)], [torch.zeros(1, 8, 7)], torch.arange(8))
    optimizer, losses = torch.optim.AdamW(method.parameter_groups(), lr=3e-3), []
    for _ in range(12):
        loss = sum(method.training_step(views, {}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    del _backbones['test_swin']


def test_the_tokenizer_sees_a_smaller_crop_and_stays_as_it_is():
    fine = create_method('dvae', backbone='dvae_mini', n_codes=16, code_dim=4, decoder_width=4)
    fine.counts.fill_(1.0)
    register_backbone(test_beit_p8=dict(timm_name='beit_mini_patch4_32', patch_size=8, img_size=64))(
        BEiTBackbone
    )
    method = build(fine, backbone='test_beit_p8', size=64).train()
    x = torch.randn(2, 3, 64, 64)
    half = torch.nn.functional.interpolate(x, (32, 32), mode='bicubic', antialias=True)
    assert torch.equal(method.targets(x), fine.codes(half).flatten(1))
    assert not method.target.training and not any(p.requires_grad for p in method.target.parameters())
    del _backbones['test_beit_p8']


@pytest.mark.parametrize('backbone', ['beit_mini', 'vit_mini_p4'])
def test_hidden_pixels_do_not_reach_the_student(words, backbone):
    method = build(words, backbone=backbone).eval()
    x, hidden = torch.randn(2, 3, 32, 32), torch.zeros(2, 64, dtype=torch.bool)
    hidden[:, 27] = True
    other = x.clone()
    other[:, :, 12:16, 12:16] = torch.randn(2, 3, 4, 4)  # patch 27: row 3, column 3
    with torch.no_grad():
        assert torch.equal(method.predict(x, hidden), method.predict(other, hidden))


# Runs


def test_mae_may_ask_for_codes(tmp_path):
    words = create_method('dvae', backbone='dvae_mini', n_codes=16, code_dim=4, decoder_width=4)
    words.counts.fill_(1)
    save_tokenizer(words, tmp_path / 'words.safetensors')
    decoder = dict(decoder_dim=16, decoder_depth=1, decoder_heads=4)
    asked = dict(target='codes', backbone='vit_mini_p4', steps=2, device='cpu', **decoder)
    recipe = small_recipe('mae', tokenizer=str(tmp_path / 'words.safetensors'), **asked)
    run = pretrain(recipe, tmp_path / 'run', progress=False)
    assert 2 < run.metrics[0]['codes'] < 6  # about ln 16 nats, for random logits a little more
    assert not why_not(recipe)  # also on tensors without numbers
    method = load_method(tmp_path / 'run')
    x, hidden = torch.randn(2, 3, 32, 32), torch.arange(64).expand(2, -1) > 15
    assert method.targets(x).shape == (2, 64) and method.targets(x).dtype == torch.int64
    with pytest.raises(ValueError, match='predicts codes, not pixels'):
        reconstruct(method, x, hidden)
    for tokenizer, message in ('', 'codes need a tokenizer'), ('nowhere', 'tokenizer=nowhere is missing'):
        with pytest.raises(ValueError, match=message):
            small_recipe('mae', tokenizer=tokenizer, **asked)


def test_from_a_tokenizers_run_to_an_exported_file(tmp_path):
    "dvae trains, beit names its run, goes on bit-equal after a cut, and timm loads the backbone."
    pretrain(
        small_recipe('dvae', backbone='dvae_mini', steps=4, device='cpu'), tmp_path / 'words', progress=False
    )
    assert load_tokenizer(tmp_path / 'words').counts.sum() > 0
    recipe = small_recipe('beit', tokenizer=str(tmp_path / 'words'), **RUN)
    run = pretrain(recipe, tmp_path / 'straight', progress=False)
    assert {'codes/accuracy', 'codes/most_frequent', 'codes'} <= set(run.metrics[-1])
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe.replace(monitor_every=1), tmp_path / 'cut', {'m': interrupt_at(5)}, progress=False)
    pretrain(recipe, tmp_path / 'cut', progress=False)
    a, b = (last_checkpoint(tmp_path / name) for name in ('straight', 'cut'))
    assert {k: same(a[k], b[k]) for k in a} == dict.fromkeys(a, True)
    line = export_backbone(tmp_path / 'cut', tmp_path / 'beit.safetensors')
    assert 'beit_mini_patch4_32' in line
    model = timm.create_model('beit_mini_patch4_32', num_classes=0)
    model.load_state_dict(load_file(tmp_path / 'beit.safetensors'))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), load_run(tmp_path / 'cut').backbone(x).pooled)


def test_a_changed_tokenizer_does_not_change_a_run(tmp_path, words):
    "Its words are part of the run's state."
    path = tmp_path / 'words.safetensors'
    save_tokenizer(words, path)
    recipe = small_recipe('beit', **RUN | dict(steps=2), tokenizer=str(path))
    pretrain(recipe, tmp_path / 'run', {}, progress=False)
    x = torch.randn(2, 3, 32, 32)
    before = load_method(tmp_path / 'run').targets(x)
    torch.nn.init.normal_(words.to_logits.weight)
    save_tokenizer(words, path)
    assert torch.equal(load_method(tmp_path / 'run').targets(x), before)
    assert not torch.equal(load_tokenizer(path).codes(x).flatten(1), before)


def test_a_run_of_another_method_is_no_tokenizer(tmp_path):
    recipe = small_recipe('mae', steps=1, device='cpu')
    pretrain(recipe, tmp_path / 'mae', {}, progress=False)
    with pytest.raises(ValueError, match='is a run of mae, not a tokenizer'):
        load_tokenizer(tmp_path / 'mae')


def test_the_monitor_beside_a_blind_guess_and_stuck(words):
    method = build(words).eval()
    views = Views([torch.randn(1, 8, 3, 32, 32)], [torch.zeros(1, 8, 7)], torch.arange(8))
    with torch.no_grad():
        method.head.weight.zero_()
        codes = method.targets(views.crops[0][0])
        method.head.bias.copy_(torch.bincount(codes.flatten(), minlength=16).float())
    found = code_monitor(method, 0, views)
    assert 0 < found['accuracy'] <= found['most_frequent'] + 0.05
    line = method.stuck(views, {}).get('codes', '')
    assert not line or ('stuck at a blind guess' in line and '\n' not in line)


def train_both(out, method):
    recipe, counts = small_recipe(method, batch_size=8, steps=3, device='cpu'), {}
    with join_world(recipe) as world:
        trainer = Trainer(recipe, 3, world)
        for views in batches(recipe, build_dataset(recipe), 0, 3, trainer.method.views, world):
            trainer.step(views)
            if trainer.done == 1:
                buffers = trainer.method.named_buffers()
                counts = {k: v.clone() for k, v in buffers if k.endswith('counts')}
        torch.save(trainer.method.state_dict() | counts, out / f'{world.rank}.pt')


@pytest.mark.parametrize('method', ['dvae', 'vqkd'])
def test_counts_and_codebook_are_those_of_all_processes(tmp_path, method):
    "Two processes with half a batch each end with the same buffers, which have counted the whole batch."
    in_processes(2, train_both, tmp_path, method)
    a, b = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert a.keys() == b.keys() and apart(a, b) == 0
    assert sum(float(v.sum()) for k, v in a.items() if k.endswith('counts')) == 8 * 64
