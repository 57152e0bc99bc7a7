"""What a local loss adds to a step: ADCLR's ten queries beside DINO alone, supervised DrLoc beside none. Seconds and operations."""

import common
from torch.utils.flop_counter import FlopCounterMode

from glsd.training.labelled import SupervisedRecipe, build_sets, one_view
from glsd.training.loop import Trainer, batches, build_dataset
from glsd.training.recipe import Recipe
from glsd.training.supervised import SupervisedTrainer


def stepper(trainer, views):
    return lambda: trainer.step(views)


def self_distilled(names, **recipe):
    "{objective: one step of it}, each on views of its own."
    for name in names:
        r = Recipe(objective=name, device='cpu', **recipe)
        t = Trainer(r, 1000)
        yield name, stepper(t, next(batches(r, build_dataset(r), 0, 1, t.multicrop)))


def supervised(weights, **recipe):
    "{name: one step}, with lambda of each name, on the same views."
    for name, drloc in weights.items():
        r = SupervisedRecipe(drloc=drloc, steps=1000, device='cpu', **recipe)
        train, _ = build_sets(r)
        yield (
            name,
            stepper(SupervisedTrainer(r, 1000, train.classes), next(batches(r, train, 0, 1, one_view(r)))),
        )


def operations(step):
    "Multiplications and additions in matrix products, convolutions and attention: forward, backward and teacher."
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(steps, rounds, recipe):
    "Figures of two steps, the plain one first."
    steps = dict(steps)
    flops = {name: operations(step) for name, step in steps.items()}  # warms up, too
    seconds = common.interleaved(steps, rounds)
    a, b = steps
    return dict(
        without=a,
        with_=b,
        seconds=seconds,
        operations=flops,
        more_seconds=seconds[b] / seconds[a] - 1,
        more_operations=flops[b] / flops[a] - 1,
        rounds=rounds,
        recipe=recipe,
    )


def main():
    quick = common.start(__doc__)
    images = dict(n_images=8, image_size=32 if quick else 256)
    small = dict(global_size=32, local_size=16, n_local=2, out_dim=256, head_hidden=64, head_bottleneck=32)
    ssl = (
        dict(backbone='vit_mini', batch_size=2, **small)
        if quick
        else dict(backbone='vit_small_p16', batch_size=4, out_dim=65536, drop_path=0.0)
    )
    labelled = (
        dict(backbone='swin_mini', batch_size=2, size=32)
        if quick
        else dict(backbone='swin_tiny_w7', batch_size=4, size=224)
    )
    adclr = compare(self_distilled(['vanilla', 'adclr'], **ssl, **images), 1 if quick else 5, ssl)
    drloc = compare(
        supervised(dict(none=0.0, drloc=0.5), **labelled, drop_path=0.0, **images),
        1 if quick else 15,
        labelled,
    )
    common.emit(adclr=adclr, drloc=drloc)


if __name__ == '__main__':
    main()
