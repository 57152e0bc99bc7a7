"""Seconds of a training step of the low-data comparison at scale ci (geometric), and where they go."""

import statistics

import common

from glsd.experiments.plan import RECIPES
from glsd.training.loop import batches
from glsd.training.recipe import Recipe
from glsd.training.trainer import Trainer, build_dataset

PARTS = 'views', 'student', 'teacher', 'loss', 'backward', 'optimiser'


def ci_recipe():
    "The recipe of low_data.ipynb at scale ci, with the setting that costs most."
    return Recipe('geometric', **RECIPES['ci'], n_images=2000, device='cpu')


class Clock:
    "Remembers when it was looked at, and when student and teacher, two modules, were done."

    def __init__(self, method):
        self.times = {}
        method.student.register_forward_pre_hook(lambda *_: self('student begins'))
        method.student.register_forward_hook(lambda *_: self('student ends'))
        method.teacher.register_forward_pre_hook(lambda *_: self('teacher begins'))
        method.teacher.register_forward_hook(lambda *_: self('teacher ends'))

    def __call__(self, name):
        self.times[name] = common.now()

    def between(self, a, b):
        return self.times[b] - self.times[a]


def timed_step(trainer, loader, clock):
    "{part: seconds} of one step: what Trainer.step does, with a clock between."
    values = trainer.values()
    clock('begin')
    views = next(loader)
    clock('views')
    terms = trainer.loss_terms(views, values)
    clock('terms')
    sum(terms.values()).backward()
    clock('backward')
    trainer.method.after_backward(values)
    trainer.clip()
    trainer.update(values)
    trainer.done += 1
    clock('end')
    student = clock.between('student begins', 'student ends')
    teacher = clock.between('teacher begins', 'teacher ends')
    loss = clock.between('views', 'terms') - student - teacher
    spans = ('begin', 'views'), ('terms', 'backward'), ('backward', 'end')
    views, backward, optimiser = (clock.between(*span) for span in spans)
    return dict(zip(PARTS, (views, student, teacher, loss, backward, optimiser)))


def main():
    quick = common.start(__doc__)
    steps = 3 if quick else 40
    recipe = ci_recipe()
    trainer = Trainer(recipe, recipe.steps)
    clock = Clock(trainer.method)
    loader = iter(batches(recipe, build_dataset(recipe), 0, steps, trainer.method.views))
    parts = [timed_step(trainer, loader, clock) for _ in range(steps)][steps // 4 :]  # the first ones warm up
    common.emit(
        seconds=statistics.median(sum(p.values()) for p in parts),
        split={k: statistics.median(p[k] for p in parts) for k in PARTS},
        steps=len(parts),
        recipe={**recipe.differences(), 'backbone': recipe.backbone, 'batch_size': recipe.batch_size},
    )


if __name__ == '__main__':
    main()
