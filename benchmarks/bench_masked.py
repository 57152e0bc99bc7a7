"MAE's step beside the same with mask tokens, HOG beside scikit-image's, a tokenizer's step and a video step."

import common
import numpy as np
import torch

from glsd.data.toyworld import ToyWorld
from glsd.masked.clips import ToyClips
from glsd.masked.hog import hog
from glsd.objectives.method import create_method
from glsd.training.counting import SavedTensors


def mae_step(images, **options):
    "A forward and backward pass of MAE on the same crops: {seconds, bytes kept for the backward pass}."
    method = create_method('mae', **options)
    views = method.views(images, [np.random.default_rng(i) for i in range(len(images))])

    def step():
        method.zero_grad()
        sum(method.training_step(views, {}).values()).backward()

    with SavedTensors(method) as saved:
        method.training_step(views, {})
    return step, saved.bytes


def compare_steps(quick, rounds):
    n, size = (2, 32) if quick else (8, 224)
    decoder = dict(decoder_dim=32, decoder_depth=1, decoder_heads=2) if quick else dict(decoder_depth=2)
    options = dict(backbone='vit_mini_p4' if quick else 'vit_small_p16', global_size=size, **decoder)
    images = [ToyWorld(n, size=size)[i][0] for i in range(n)]
    steps = {name: mae_step(images, **options, mask_tokens=name == 'mask_tokens') for name in NAMES}
    seconds = common.interleaved({name: step for name, (step, _) in steps.items()}, rounds)
    return dict(seconds=seconds, bytes={name: kept for name, (_, kept) in steps.items()}, batch=n, **options)


NAMES = 'visible_only', 'mask_tokens'


def planes(n, size):
    "Brightness that rises evenly, each image and colour in a direction of its own: there all HOGs agree."
    angle = torch.rand(n, 3, 1, 1) * 2 * np.pi
    at = torch.arange(size) / size
    return angle.cos() * at + angle.sin() * at[:, None]


def scikit_hog(image, scikit):
    "Of each colour of [3, h, w], [3, 9, H, W]. Angles are counted from the other axis: the image is turned."
    one = dict(orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm='L2')
    found = [scikit(colour.T, feature_vector=False, **one)[:, :, 0, 0] for colour in image.numpy()]
    return np.stack(found).transpose(0, 3, 2, 1)


def compare_hogs(quick, rounds):
    try:
        from skimage.feature import hog as scikit
    except ImportError:
        return 'skipped: scikit-image is not installed'
    x, size = torch.randn(2 if quick else 16, 3, 224, 224), 32 if quick else 224
    flat = planes(4, size)
    theirs = np.stack([scikit_hog(image, scikit) for image in flat])[..., 1:-1, 1:-1]  # borders differ
    agree = float((abs(hog(flat).numpy()[..., 1:-1, 1:-1] - theirs) < 1e-3).mean())
    contestants = dict(glsd=lambda: hog(x), scikit=lambda: scikit_hog(x[0], scikit))
    seconds = common.interleaved(contestants, rounds)
    return dict(glsd=len(x) / seconds['glsd'], plain=1 / seconds['scikit'], agree=agree, batch=len(x))


def step_of(name, images, **options):
    "Seconds of a forward and backward pass of a method."
    method = create_method(name, **options)
    views = method.views(images, [np.random.default_rng(i) for i in range(len(images))])

    def step():
        method.zero_grad()
        sum(method.training_step(views, {'temperature': 1.0}).values()).backward()

    return step


def tokenizer_and_video(quick, rounds):
    n, size, n_clips, pixels = (2, 32, 1, 32) if quick else (8, 112, 2, 224)
    images = [ToyWorld(n, size=size)[i][0] for i in range(n)]
    clips = [ToyClips(ToyWorld(n_clips, size=64), 16)[i][0] for i in range(n_clips)]
    video = dict(backbone='mvit_mini', mask_unit=0) if quick else dict(backbone='mvit_v2_s_14')
    video |= dict(global_size=pixels, frame_stride=1)
    steps = dict(
        tokenizer=step_of('dvae', images, global_size=size), video=step_of('maskfeat_video', clips, **video)
    )
    return dict(seconds=common.interleaved(steps, rounds), images=n, size=size, clips=n_clips, **video)


def main():
    quick = common.start(__doc__)
    rounds = 1 if quick else 3
    common.emit(
        mae=compare_steps(quick, rounds),
        hog=compare_hogs(quick, rounds),
        more=tokenizer_and_video(quick, rounds),
    )


if __name__ == '__main__':
    main()
