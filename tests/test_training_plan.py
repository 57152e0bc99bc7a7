"The plan of a run against counts made by hand, and against the step itself."

import numpy as np
import pytest

from glsd.cli import main
from glsd.training import Recipe, Trainer
from glsd.training.counting import Count, count_step, measure_step
from glsd.training.plan import Machine, calibrate, gpu, plan, plan_lines

pytestmark = pytest.mark.filterwarnings('ignore:The image decoding')
TINY = Recipe(
    'geometric', global_size=32, local_size=16, n_local=2, backbone='vit_mini', out_dim=512, head_hidden=32,
    head_bottleneck=16, batch_size=4, steps=100, device='cpu', drop_path=0.0,
)  # fmt: skip


def test_state_is_student_gradient_moments_and_teacher():
    count, trainer = count_step(TINY), Trainer(TINY, 10)
    P = sum(p.numel() for p in trainer.method.student.parameters())
    assert count.parameters == P and count.bytes['state'] == 4 * (P + P + 2 * P + P)


def test_logits_and_views_by_hand():
    count = count_step(TINY)
    tokens, teachers = 2 * 16 + 2 * 4, 2 * 16  # patches of 8: 4 x 4 and 2 x 2
    assert count.bytes['logits'] == 4 * 4 * 512 * (4 + tokens + 2 + teachers)
    assert count.bytes['views'] == 4 * 3 * 4 * (2 * 32**2 + 2 * 16**2)
    vanilla = count_step(TINY.replace(method='vanilla'))
    assert vanilla.bytes['logits'] == 4 * 4 * 512 * (4 + 2)


def test_operations_of_the_last_layer_by_hand():
    few, many = (count_step(TINY.replace(out_dim=k)).flops for k in (512, 1024))
    student, teacher = 4 * (4 + 40), 4 * (2 + 32)  # rows: views and tokens of 4 images
    assert many - few == 2 * 512 * 16 * (3 * student + teacher)


def test_operations_equal_those_of_a_real_step():
    from torch.utils.flop_counter import FlopCounterMode

    from glsd.data.loading import make_loader
    from glsd.data.toyworld import ToyWorld

    recipe = TINY.replace(backbone='swin_mini', method='vanilla')
    trainer = Trainer(recipe, 10)
    views = next(iter(make_loader(ToyWorld(8, size=32), trainer.method.views, 4)))
    with FlopCounterMode(display=False) as counter:
        trainer.step(views)
    assert count_step(recipe).flops == counter.get_total_flops()


@pytest.mark.parametrize(
    'field, values',
    [
        ('batch_size', (4, 8, 16)),
        ('n_local', (0, 2, 6)),
        ('out_dim', (256, 512, 4096)),
        ('global_size', (32, 64, 96)),
    ],
)
def test_more_needs_more(field, values):
    counts = [count_step(TINY.replace(**{field: v})) for v in values]
    for less, more in zip(counts, counts[1:]):
        assert less.flops < more.flops and less.peak < more.peak


def test_what_grows_with_the_batch_and_what_does_not():
    one, eight = count_step(TINY, 4), count_step(TINY, 32)
    assert (
        8 * one.flops == eight.flops
        and 8 * one.bytes['logits'] == eight.bytes['logits']
        and one.bytes['state'] == eight.bytes['state']
    )
    slope = (eight.bytes['activations'] - one.bytes['activations']) / 28
    assert (
        0 <= one.bytes['activations'] - 4 * slope < 5 * 4 * 512 * 16
    )  # prototypes of two heads: weights' lengths and directions


def test_bf16_halves_and_fused_drops_the_logits():
    full, half, fused = (
        count_step(TINY.replace(out_dim=2**17, **d)) for d in ({}, dict(amp=True), dict(fused=True))
    )
    assert half.bytes['logits'] == full.bytes['logits'] / 2 and half.bytes['state'] == full.bytes['state']
    assert gpu('new', TINY, tflops=100.0, efficiency=0.5, memory=10.0).rate == 5e13
    assert 'logits' not in fused.bytes and fused.peak < full.peak and fused.flops == full.flops


def test_calibration_finds_the_constants_and_none_below_zero():
    counts = [Count(1, 1, f, dict(state=b)) for f, b in ((1e9, 1e7), (4e9, 2e7), (9e9, 9e7), (2e10, 1e7))]
    m = calibrate([(c, 0.02 + c.flops / 3e10 + c.peak / 2e9) for c in counts])
    assert np.allclose([m.rate, m.bandwidth, m.fixed], [3e10, 2e9, 0.02])
    only = calibrate([(c, c.flops / 3e10) for c in counts])
    assert (
        only.rate == pytest.approx(3e10)
        and only.fixed == pytest.approx(0, abs=1e-9)
        and only.bandwidth > 1e15
    )
    odd = calibrate(
        [(c, 1 / c.flops) for c in counts]
    )  # larger is faster: nonsense, and yet no negative constant
    assert odd.rate > 0 and odd.bandwidth > 0 and odd.fixed >= 0


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_measured_memory_is_near_the_plan():
    recipe = TINY.replace(out_dim=4096, batch_size=8)
    seconds, peak = measure_step(recipe, 1)
    assert seconds > 0 and 0.7 < count_step(recipe).peak / peak < 1.5


def test_a_plan_adds_up():
    machine = Machine(1e9, fixed=0.01, memory=1e6)
    p = plan(TINY.replace(workers=2), machine, gpus=4, images=1000, link=1.0, views=0.001)
    count = count_step(TINY, 1)
    assert (
        p['parts']['compute'] == pytest.approx(0.01 + count.flops / 1e9) and p['parts']['views'] == 0.001 / 2
    )
    assert p['parts']['communication'] == pytest.approx(2 * 3 / 4 * 4 * count.parameters / 1e9)
    assert p['seconds'] == pytest.approx(p['parts']['compute'] + p['parts']['communication'])
    assert (
        p['days'] == pytest.approx(100 * p['seconds'] / 86400)
        and not p['fits']
        and 'DOES NOT FIT' in plan_lines(p)[1]
    )
    alone = plan(TINY, machine, views=0.5)  # no worker: one after the other
    assert (
        alone['seconds'] == pytest.approx(alone['parts']['compute'] + 4 * 0.5)
        and alone['parts']['communication'] == 0
    )
    slow = plan(TINY.replace(workers=1), machine, views=9.0)
    assert slow['seconds'] == 36 and 'views are the bottleneck' in plan_lines(slow)[2]


@pytest.mark.parametrize('method', ['dino', 'similarity', 'shuffled', 'adclr', 'moby'])
def test_other_methods_are_counted(method):
    assert count_step(TINY.replace(method=method)).flops > 0


def test_supervised_training_is_counted():
    recipe = Recipe('supervised', backbone='vit_mini', global_size=32, batch_size=4)
    count = count_step(recipe)
    assert count.flops > 0 and 'logits' not in count.bytes and count.bytes['views'] == 4 * 4 * 3 * 32**2
    assert plan(recipe, Machine(1e9), views=0.0)['seconds'] > 0


def test_sharded_weights_are_shared_by_all():
    "The teacher's, too."
    assert count_step(TINY.replace(fsdp=True), 2, 2).bytes['state'] == count_step(TINY).bytes['state'] / 2


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: plan(TINY, gpu('h100', TINY), gpus=3), 'cannot be shared equally by 3 GPUs'),
        (lambda: plan(TINY, gpu('h100', TINY), gpus=0), 'by 0 GPUs'),
        (lambda: gpu('h1000', TINY), 'no card'),
        (lambda: gpu('h100', TINY, efficiency=40.0), 'efficiency at most 1'),
        (lambda: gpu('h100', TINY, tflops=-1.0), 'both must be above 0'),
        (lambda: count_step(TINY.replace(method='selfpatch')), "'selfpatch', whose matches depend"),
        (lambda: calibrate([(None, 1.0)]), '1 measured sizes'),
    ],
)
def test_bad_input_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert '\n' not in str(e.value)


def test_the_command(tmp_path, capsys):
    TINY.replace(amp=True, workers=4).save(tmp_path / 'r.yaml')
    assert (
        main(
            [
                'plan',
                '--recipe',
                str(tmp_path / 'r.yaml'),
                '--gpus',
                '2',
                '--gpu',
                'a100',
                '--memory',
                '0.001',
                '--n-local',
                '4',
                '--images',
                '4000',
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        '2 x 2 images' in out
        and 'not measured on this GPU' in out
        and '312 TFLOP/s' in out
        and 'DOES NOT FIT into 0.001 GB' in out
    )
    for bad in (['--gpus', '3'], ['--gpu', 'h1000'], ['--backbone', 'vit_minny'], ['--n-locals', '4']):
        assert main(['plan', '--recipe', str(tmp_path / 'r.yaml'), *bad]) == 2
        assert capsys.readouterr().err.count('\n') == 1
