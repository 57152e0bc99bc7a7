"""Seconds of the whole training step, from JPEG files to updated weights.

glsd beside the published step written plainly, in turns, from the same weights. On a GPU also images a
second, peak memory and model FLOPs of Swin-T and ViT-S/16, without a rival."""

import tempfile
import time
from types import SimpleNamespace

import common
import numpy as np
import torch
from bench_views import write_jpegs
from plain import PlainMaps, PlainTrainer, collate

from glsd.data.folders import read_image
from glsd.training.recipe import Recipe
from glsd.training.trainer import Trainer, compile_backbones

MINI = dict(backbone='vit_mini', global_size=64, local_size=32, batch_size=8)
SIZES = dict(
    vit_mini=dict(**MINI, out_dim=4096, head_hidden=512, head_bottleneck=128),
    swin_tiny=dict(backbone='swin_tiny_w7', batch_size=2, out_dim=65536),
)


def plainly(trainer):
    "A PlainTrainer with the weights of a Trainer, and its schedules' first values."
    twin, r, now = Trainer(trainer.recipe, trainer.steps).method, trainer.recipe, trainer.values()
    twin.load_state_dict(trainer.method.state_dict())
    branches = [SimpleNamespace(backbone=b.backbone, **dict(b.heads)) for b in (twin.student, twin.teacher)]
    rates = now['lr'], now['weight_decay'], now['momentum']
    return PlainTrainer(*branches, r.out_dim, *rates, (r.student_temp, now['teacher_temp']), r.clip)


def position_map(w):
    "What `w_geo` [B,7] says, as the position maps that the plain step reads [B,2,h,w]."
    flipped = w[:, 6] > 0.5
    left, right = torch.where(flipped, w[:, 2], w[:, 0]), torch.where(flipped, w[:, 0], w[:, 2])
    n = int(w[0, 4])
    at = (torch.arange(n) + 0.5) / n
    x = left[:, None] + at * (right - left)[:, None]
    y = w[:, 1, None] + at * (w[:, 3] - w[:, 1])[:, None]
    return torch.stack([x[:, None].expand(-1, n, -1), y[:, :, None].expand(-1, -1, n)], 1)


def as_lists(views):
    "Crops and position maps as the plain step reads them, a tensor a view."
    crops = [crop for group in views.crops for crop in group]
    return crops, [position_map(w) for group in views.w_geo for w in group]


def side_by_side(paths, rounds, **size):
    "-> median seconds of both steps, and both losses of one batch."
    recipe = Recipe('geometric', device='cpu', drop_path=0.0, warmup=0.0, steps=1000, **size)
    trainer, paths = Trainer(recipe, recipe.steps), paths[: recipe.batch_size]
    plain, multicrop = plainly(trainer), trainer.method.views
    plain_views = PlainMaps(recipe.global_size, recipe.local_size)

    def made():
        images = [read_image(path) for path in paths]
        return multicrop(images, [np.random.default_rng(i) for i in range(len(images))])

    views, before = made(), {k: v.clone() for k, v in trainer.method.objective.state_dict().items()}
    with torch.no_grad():
        ours = sum(trainer.loss_terms(views, trainer.values()).values()).item()
        theirs = plain.loss(*as_lists(views))[0].item()
    trainer.method.objective.load_state_dict(before)  # the centres have moved
    steps = dict(
        glsd=lambda: trainer.step(made()),
        plain=lambda: plain.step(*collate([plain_views(path) for path in paths])),
    )
    return dict(common.interleaved(steps, rounds), loss=ours, loss_plain=theirs, recipe=dict(size))


def both_losses(trainer, plain, views):
    "Of one batch; the centres stay as they were."
    before = [b.clone() for b in trainer.buffers]
    with torch.no_grad():
        ours = sum(trainer.loss_terms(views, trainer.values()).values()).item()
    trainer.undo(before)
    crops = [crop for group in views.crops for crop in group]
    maps = [position_map(w) for group in views.w_geo for w in group]
    with torch.no_grad():
        return ours, plain.loss(crops, maps)[0].item()


def matmul_rate(n=8192, rounds=20):
    "Floating-point operations a second of bf16 matrix products [n,n] on this GPU."
    a, b = (torch.randn(n, n, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / gpu_seconds(lambda: a @ b, rounds)


def gpu_seconds(f, rounds):
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        f()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / rounds


def on_gpu(backbone, batch, rate, rounds=20):
    """bf16, compile, fused loss, colours on the GPU.

    Images a second, peak GB, and the share of the matrix rate that the model's FLOPs use."""
    from torch.utils.flop_counter import FlopCounterMode

    options = dict(device='cuda', amp=True, fused=True, colour_on_device=True, steps=1000)
    recipe = Recipe('geometric', backbone=backbone, batch_size=batch, **options)
    trainer = Trainer(recipe, recipe.steps)
    multicrop = trainer.method.views
    noise = [torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8) for _ in range(4)]
    samples = [multicrop.sample(noise[i % 4], np.random.default_rng(i)) for i in range(batch)]
    views = multicrop.collate(samples)
    if views.w_pho is None:
        raise SystemExit('colour_on_device of the recipe does not reach MultiCrop')
    with FlopCounterMode(display=False) as counter:
        trainer.step(views)  # before it is compiled: operators are counted by name
    compile_backbones(trainer.method.student.backbone, trainer.method.teacher.backbone)
    torch.cuda.reset_peak_memory_stats()
    s = gpu_seconds(lambda: trainer.step(views), rounds)
    return dict(
        images_per_second=batch / s,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        batch=batch,
        model_tflops=counter.get_total_flops() / s / 1e12,
        share_of_matmul_rate=counter.get_total_flops() / s / rate,
    )


def main():
    quick = common.start(__doc__)
    sizes = {k: v for k, v in SIZES.items() if not quick or k == 'vit_mini'}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 8)
        for name, size in sizes.items():
            rounds = 9 if name == 'vit_mini' else 2
            found[name] = side_by_side(paths, 1 if quick else rounds, **size)
    if torch.cuda.is_available() and not quick:
        rate = matmul_rate()
        gpu = dict(name=torch.cuda.get_device_name(), matmul_tflops=rate / 1e12)
        gpu |= {b: on_gpu(b, 64, rate) for b in ('swin_tiny_w7', 'vit_small_p16')}
    else:
        gpu = 'skipped: ' + ('a quick run' if quick else 'no GPU here')
    common.emit(**found, gpu=gpu)


if __name__ == '__main__':
    main()
