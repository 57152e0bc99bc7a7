"""Seconds of a training step of the low-data comparison at scale=ci (geometric), and where they go."""

import json
import statistics
from pathlib import Path

import common
import torch

from glsd.objectives.self_distillation import backbone_inputs
from glsd.training.loop import batches
from glsd.training.recipe import Recipe
from glsd.training.trainer import Trainer, build_dataset

LOW_DATA = Path(__file__).resolve().parent.parent / 'nbs/9_experiments/low_data.ipynb'


def ci_recipe():
    "The recipe of low_data.ipynb at scale=ci, read from its SCALES cell: both always mean the same one."
    sources = [''.join(cell['source']) for cell in json.loads(LOW_DATA.read_text())['cells']]
    scales = next((s for s in sources if s.startswith('SCALES =')), None)
    if scales is None:
        raise SystemExit(f'{LOW_DATA} has no cell that starts with SCALES =')
    found = {}
    exec(scales, found)
    values = found['SCALES']['ci']['recipe']
    values = {k: v for k, v in values.items() if k not in ('method', 'objective')}
    return Recipe('geometric', **{**values, 'n_images': 2000, 'device': 'cpu'})


def timed_step(trainer, loader):
    "{part: seconds} of one step: what Trainer.step does, with a clock between."
    values, method, clock = trainer.values(), trainer.method, [common.now()]
    terms = method.objective.terms.values()

    def tick(result=None):
        clock.append(common.now())
        return result

    views = tick(next(loader))
    student = tick(method.student(views, inputs=backbone_inputs(terms, views, method.student, False)))
    with torch.no_grad():
        inputs = backbone_inputs(terms, views, method.teacher, True)
        teacher = tick(method.teacher(views, method.objective.teacher_groups, inputs))
    terms = method.objective(student, teacher, values['teacher_temp'], views, overwrite=True)
    loss = tick(sum(terms.values()))
    tick(loss.backward())
    method.after_backward(values)
    trainer.clip()
    trainer.update(values)
    trainer.done += 1
    tick()
    parts = 'views', 'student', 'teacher', 'loss', 'backward', 'optimiser'
    return {part: end - begin for part, begin, end in zip(parts, clock, clock[1:])}


def main():
    quick = common.start(__doc__)
    steps = 3 if quick else 40
    recipe = ci_recipe()
    trainer = Trainer(recipe, recipe.steps)
    loader = iter(batches(recipe, build_dataset(recipe), 0, steps, trainer.method.views))
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
