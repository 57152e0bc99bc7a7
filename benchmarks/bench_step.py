"""Seconds of a training step of the small recipe, and where they go."""
import statistics
import common
import torch
from glsd.training.loop import Trainer, batches, build_dataset, clip_gradients
from glsd.training.recipe import Recipe

SMALL = Recipe(n_images=2000, image_size=32, global_size=32, local_size=16, n_local=4, local_scale=(.1, .4), strength=.5,
               backbone='swin_mini', out_dim=256, head_hidden=256, head_bottleneck=64, head_batchnorm=True,
               batch_size=64, steps=200, lr=8e-3, warmup=.1, momentum=.96, device='cpu')

def timed_step(trainer, loader):
    "{part: seconds} of one step: what Trainer.step does, with a clock between."
    now, clock = trainer.now(), [common.now()]
    tick = lambda: clock.append(common.now())
    views = next(loader); tick()
    student = trainer.student(views); tick()
    with torch.no_grad(): teacher = trainer.teacher(views, n_groups=1)
    tick()
    loss = sum(trainer.objective(student, teacher, now['teacher_temp']).values()); tick()
    loss.backward(); tick()
    clip_gradients(trainer.parameters, trainer.recipe.clip)
    trainer.update(now)
    trainer.done += 1; tick()
    return dict(zip(('views', 'student', 'teacher', 'loss', 'backward', 'optimiser'), (b - a for a, b in zip(clock, clock[1:]))))

def main():
    quick = common.start(__doc__)
    steps = 3 if quick else 40
    recipe = SMALL.replace(n_images=200) if quick else SMALL
    trainer = Trainer(recipe, recipe.steps)
    loader = batches(recipe, build_dataset(recipe), 0, steps)
    parts = [timed_step(trainer, loader) for _ in range(steps)][steps // 4:]       # the first ones warm up
    split = {k: statistics.median(p[k] for p in parts) for k in parts[0]}
    common.emit(seconds=statistics.median(sum(p.values()) for p in parts), split=split, steps=len(parts),
                recipe={k: v for k, v in recipe.differences().items() if not isinstance(v, tuple)})

if __name__ == '__main__': main()
