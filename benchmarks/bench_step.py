"""Seconds of a training step of the low-data comparison at scale=ci (geometric), and where they go."""

import json
import statistics
from pathlib import Path

import common
import torch

from glsd.training.loop import Trainer, batches, build_dataset, clip_gradients
from glsd.training.recipe import Recipe

LOW_DATA = Path(__file__).resolve().parent.parent / 'nbs/9_experiments/low_data.ipynb'


def ci_recipe():
    "The recipe of low_data.ipynb at scale=ci, read from its SCALES cell, so that both always mean the same one."
    sources = [''.join(cell['source']) for cell in json.loads(LOW_DATA.read_text())['cells']]
    scales = next((s for s in sources if s.startswith('SCALES =')), None)
    if scales is None:
        raise SystemExit(f'{LOW_DATA} has no cell that starts with SCALES =')
    found = {}
    exec(scales, found)
    return Recipe.from_dict(
        {**found['SCALES']['ci']['recipe'], 'objective': 'geometric', 'n_images': 2000, 'device': 'cpu'}
    )


def timed_step(trainer, loader):
    "{part: seconds} of one step: what Trainer.step does, with a clock between."
    now, clock = trainer.now(), [common.now()]
    tick = lambda: clock.append(common.now())
    views = next(loader)
    tick()
    student = trainer.student(views)
    tick()
    with torch.no_grad():
        teacher = trainer.teacher(views, n_groups=1)
    tick()
    loss = sum(trainer.objective(student, teacher, now['teacher_temp']).values())
    tick()
    loss.backward()
    tick()
    clip_gradients(trainer.parameters, trainer.recipe.clip)
    trainer.update(now)
    trainer.done += 1
    tick()
    return dict(
        zip(
            ('views', 'student', 'teacher', 'loss', 'backward', 'optimiser'),
            (b - a for a, b in zip(clock, clock[1:])),
        )
    )


def main():
    quick = common.start(__doc__)
    steps = 3 if quick else 40
    recipe = ci_recipe()
    trainer = Trainer(recipe, recipe.steps)
    loader = batches(recipe, build_dataset(recipe), 0, steps)
    parts = [timed_step(trainer, loader) for _ in range(steps)][steps // 4 :]  # the first ones warm up
    split = {k: statistics.median(p[k] for p in parts) for k in parts[0]}
    common.emit(
        seconds=statistics.median(sum(p.values()) for p in parts),
        split=split,
        steps=len(parts),
        recipe={**recipe.differences(), 'backbone': recipe.backbone, 'batch_size': recipe.batch_size},
    )


if __name__ == '__main__':
    main()
