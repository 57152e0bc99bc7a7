"""A training step of GLSD as one would first write it from the paper.

Images one by one, a position map with each crop (Sec. 3.4.3), a forward pass for each crop size, gathered
targets, loops over parameters, float32."""

import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from plain_loss import plain_dual_loss
from plain_views import colours, torchvision_blur
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF


class PlainMaps:
    """A file -> crops [3,h,w] and, for each, the positions of its pixels in the image [2,h,w].

    Two global views, then local ones."""

    def __init__(self, global_size=224, local_size=96, n_local=8):
        first, second, local = (
            v2.Compose(colours(torchvision_blur, *p)) for p in ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0))
        )
        self.views = [(global_size, (0.4, 1.0), first), (global_size, (0.4, 1.0), second)] + [
            (local_size, (0.05, 0.4), local)
        ] * n_local

    def __call__(self, path):
        image = Image.open(path).convert('RGB')
        positions = torch.stack(
            torch.meshgrid(torch.arange(image.width) + 0.5, torch.arange(image.height) + 0.5, indexing='xy')
        )
        return [list(part) for part in zip(*(self.view(image, positions, *v) for v in self.views))]

    def view(self, image, positions, size, scale, colour):
        y, x, h, w = v2.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        crop = TF.resized_crop(image, y, x, h, w, [size, size], InterpolationMode.BICUBIC)
        where = F.interpolate(positions[None, :, y : y + h, x : x + w], (size, size), mode='bilinear')[0]
        return (colour(TF.hflip(crop)), where.flip(-1)) if random.random() < 0.5 else (colour(crop), where)


def as_box(where, grid):
    """Position maps [B,2,h,w], averaged over the tokens -> `w_geo` [B,7] of boxes with those tokens.

    A flipped one runs from right to left."""
    centre = F.adaptive_avg_pool2d(where, grid)
    step = (centre[:, :, -1, -1] - centre[:, :, 0, 0]) / (torch.tensor(grid[::-1]) - 1)
    ul = centre[:, :, 0, 0] - step / 2
    return torch.cat([ul, ul + step * torch.tensor(grid[::-1]), torch.zeros(len(where), 3)], 1)


class PlainTrainer:
    """`loss(crops, maps)` and `step(crops, maps)`.

    `student` and `teacher`: SimpleNamespaces of `backbone` and heads `view` and `region`, any modules."""

    def __init__(
        self, student, teacher, out_dim, lr, weight_decay=0.04, momentum=0.996, temps=(0.1, 0.04), clip=3.0
    ):
        self.student, self.teacher = student, teacher
        self.momentum, self.temps, self.clip = momentum, temps, clip
        self.center = {head: torch.zeros(out_dim) for head in ('view', 'region')}
        self.pairs = [
            (s, t)
            for k in vars(student)
            for s, t in zip(getattr(student, k).parameters(), getattr(teacher, k).parameters())
        ]
        self.optimizer = torch.optim.AdamW(
            [s for s, _ in self.pairs], lr, weight_decay=weight_decay, foreach=False
        )

    def outputs(self, branch, crops, maps):
        "Each group of equal size in a pass of its own; then all views of an image one after the other."
        B, features = len(crops[0]), []
        for size in sorted({c.shape[-1] for c in crops}, reverse=True):
            group = [c for c in crops if c.shape[-1] == size]
            f = branch.backbone(torch.cat(group))
            features += zip(f.pooled.split(B), f.tokens.split(B), [f.grid] * len(group))
        pooled, tokens, grids = zip(*features)
        logits = {'view': branch.view(torch.stack(pooled, 1)), 'region': branch.region(torch.cat(tokens, 1))}
        return SimpleNamespace(
            logits=logits, grids=grids, w_geo=torch.stack([as_box(m, g) for m, g in zip(maps, grids)], 1)
        )

    def loss(self, crops, maps):
        with torch.no_grad():
            teacher = self.outputs(self.teacher, crops[:2], maps[:2])
        terms = plain_dual_loss(
            self.outputs(self.student, crops, maps),
            teacher,
            *self.temps,
            self.center['view'],
            self.center['region'],
        )
        return sum(terms.values()), teacher

    def step(self, crops, maps):
        "-> the loss, a number."
        loss, teacher = self.loss(crops, maps)
        self.optimizer.zero_grad()
        loss.backward()
        for p, _ in self.pairs:
            norm = p.grad.norm()
            if norm > self.clip:
                p.grad *= self.clip / (norm + 1e-6)
        self.optimizer.step()
        with torch.no_grad():
            for s, t in self.pairs:
                t.mul_(self.momentum).add_((1 - self.momentum) * s)
            for head, c in self.center.items():
                c.mul_(0.9).add_(0.1 * teacher.logits[head].mean((0, 1)))
        return loss.item()


def collate(samples):
    "[(crops, maps)] of B images -> crops, maps, each a list of [B,...], one entry a view."
    return [[torch.stack(view) for view in zip(*part)] for part in zip(*samples)]
