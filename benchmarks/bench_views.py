"""Images a second: decode, 2 x 224 + 8 x 96 views, colours, normalised. glsd and torchvision in turns."""

import tempfile
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from plain_views import PlainViews, pil_blur

from glsd.data.folders import read_image
from glsd.views.multicrop import MultiCrop


def natural_image(rng, H=375, W=500):
    "uint8 [H, W, 3] with the spectrum of a photograph: noise, equally strong at every octave, and edges."
    image = torch.zeros(3, H, W)
    for n in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = torch.from_numpy(rng.standard_normal((1, 3, n, n), dtype=np.float32))
        image += 0.35 * F.interpolate(noise, (H, W), mode='bicubic')[0]
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    for _ in range(6):
        cx, cy, r = rng.uniform(0, W), rng.uniform(0, H), rng.uniform(20, 90)
        if rng.random() < 0.5:
            inside = (x - cx).abs() ** 2 + (y - cy).abs() ** 2 < r**2
        else:
            inside = torch.maximum((x - cx).abs(), (y - cy).abs()) < r
        colour = torch.from_numpy(rng.standard_normal((3, 1, 1), dtype=np.float32))
        image = torch.where(inside, image * 0.4 + colour, image)
    return (128 + 64 * image).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def write_jpegs(folder, n):
    rng = np.random.default_rng(0)
    paths = [Path(folder) / f'{i}.jpg' for i in range(n)]
    for path in paths:
        Image.fromarray(natural_image(rng)).save(path, quality=90)
    return paths


def main():
    quick = common.start(__doc__)
    n, rounds, batch = (2, 1, 2) if quick else (32, 4, 16)
    multicrop = MultiCrop()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, n)

        def ours():
            for i in range(0, n, batch):
                images = [read_image(p) for p in paths[i : i + batch]]
                multicrop(images, [np.random.default_rng((0, i, j)) for j in range(len(images))])

        def plainly(views):
            for i in range(0, n, batch):
                torch.utils.data.default_collate([views(p) for p in paths[i : i + batch]])

        def decode():
            for p in paths:
                read_image(p)

        plain, plain_pil = PlainViews(), PlainViews(pil_blur)
        contestants = dict(
            glsd=ours,
            plain=lambda: plainly(plain),
            plain_pil_blur=lambda: plainly(plain_pil),
            decode=decode,
        )
        t = common.interleaved(contestants, rounds)
        size = sum(p.stat().st_size for p in paths) / n
    common.emit(
        **{name: n / s for name, s in t.items()},
        isa=torch.backends.cpu.get_cpu_capability(),
        jpeg_kb=size / 1e3,
        images=n,
        batch=batch,
    )


if __name__ == '__main__':
    main()
