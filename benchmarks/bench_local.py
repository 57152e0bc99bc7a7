"""What a local loss adds to a step, in seconds and operations: ADCLR's queries, and DrLoc."""

import common
from torch.utils.flop_counter import FlopCounterMode

from glsd.training.loop import batches
from glsd.training.recipe import Recipe
from glsd.training.trainer import Trainer, build_dataset


def stepper(recipe):
    "One step of a recipe's trainer, always on the same views."
    dataset = build_dataset(recipe)
    trainer = Trainer(recipe, 1000, classes=[str(c) for c in dataset.classes] if recipe.needs_labels else [])
    views = next(iter(batches(recipe, dataset, 0, 1, trainer.method.views)))
    return lambda: trainer.step(views)


def self_distilled(methods, **fields):
    "{method: one step of it}, each on views of its own."
    for method in methods:
        yield method, stepper(Recipe(method, device='cpu', **fields))


def supervised(weights, **fields):
    "{name: one step}, with the weight of DrLoc of each name, on the same views."
    for name, weight in weights.items():
        yield name, stepper(Recipe('supervised', drloc_weight=weight, device='cpu', **fields))


def operations(step):
    """Multiplications and additions in matrix products, convolutions and attention: forward, backward and
    teacher."""
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
    if quick:
        ssl = dict(backbone='vit_mini', batch_size=2, **small)
        labelled = dict(backbone='swin_mini', batch_size=2, global_size=32)
    else:
        ssl = dict(backbone='vit_small_p16', batch_size=4, out_dim=65536, drop_path=0.0)
        labelled = dict(backbone='swin_tiny_w7', batch_size=4, global_size=224)
    adclr = compare(self_distilled(['vanilla', 'adclr'], **ssl, **images), 1 if quick else 5, ssl)
    pair = supervised(dict(none=0.0, drloc=0.5), **labelled, drop_path=0.0, **images)
    drloc = compare(pair, 1 if quick else 15, labelled)
    common.emit(adclr=adclr, drloc=drloc)


if __name__ == '__main__':
    main()
