"""Two methods that are not student and teacher, written outside of the package: MAE and MoCo, 40 lines each.

Named in a recipe by their place: `method='methods_in_40_lines:MAE'`."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from glsd.backbones import create_backbone
from glsd.objectives import Method, ema_update
from glsd.objectives.moby import all_gather_keys, contrast, enqueue
from glsd.views.photometric import Photometric


class MAE(Method):
    "Masked autoencoder (He et al. 2022): an encoder sees some of the patches, a decoder paints the rest."

    defaults = dict(backbone='vit_mini', drop_path=0.0, n_global=1, n_local=0, global_scale=(0.2, 1.0))

    @dataclass(frozen=True)
    class Options(Method.Options):
        mask_ratio: float = 0.75
        width: int = 48  # of the decoder

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        b, d = create_backbone(self.options.backbone), self.options.width
        self.backbone, self.n = b, (self.view_options.global_size // b.patch) ** 2
        self.embed, self.mask_token = nn.Linear(b.dim, d), nn.Parameter(torch.zeros(d))
        self.positions = nn.Parameter(0.02 * torch.randn(self.n, d))
        self.decoder = nn.Sequential(Block(d, 4), nn.Linear(d, 3 * b.patch**2))

    @property
    def views(self):
        plain = Photometric(p_jitter=0.0, p_gray=0.0, p_blur=0.0)  # cropped and flipped only
        return self.view_options.multicrop(photometric=[plain])

    def training_step(self, views, values):
        x, p = views.crops[0][0], self.backbone.patch
        target = F.unfold(x, p, stride=p).mT  # [B, n, 3 p p]
        target = F.layer_norm(target, target.shape[-1:])
        order = torch.rand(len(x), self.n, device=x.device).argsort(1)
        seen, hidden = order.tensor_split([self.n - round(self.options.mask_ratio * self.n)], 1)
        place = seen[..., None].expand(-1, -1, self.options.width)
        tokens = self.mask_token.repeat(len(x), self.n, 1)
        tokens = tokens.scatter(1, place, self.embed(self.backbone(x, index=seen).tokens))
        wrong = (self.decoder(tokens + self.positions) - target).square().mean(-1)
        return {'pixels': wrong.gather(1, hidden).mean()}


class MoCo(Method):
    "Momentum contrast (He et al. 2020): a query finds its key among those of other images, kept in a queue."

    defaults = dict(backbone='resnet_mini', drop_path=0.0, n_local=0)

    @dataclass(frozen=True)
    class Options(Method.Options):
        width: int = 64
        queue: int = 128
        temperature: float = 0.2
        momentum: float = 0.9

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.backbone = create_backbone(self.options.backbone, drop_path=self.options.drop_path)
        self.head = nn.Linear(self.backbone.dim, self.options.width)
        self.keys = copy.deepcopy(nn.ModuleList([self.backbone, self.head])).requires_grad_(False)
        self.register_buffer(
            'queue', F.normalize(torch.randn(1, self.options.queue, self.options.width), dim=-1)
        )
        self.register_buffer('place', torch.tensor(0))
        self.register_buffer('fresh', torch.zeros(0), persistent=False)

    def training_step(self, views, values):
        a, b = views.crops[0]
        with torch.no_grad():
            key = F.normalize(self.keys[1](self.keys[0](b).pooled), dim=-1)
        query = F.normalize(self.head(self.backbone(a).pooled), dim=-1)
        self.fresh = key
        return {'contrast': contrast(query, key, self.queue[0].clone(), self.options.temperature)}

    def after_step(self, values):
        ema_update(self.keys, nn.ModuleList([self.backbone, self.head]), self.options.momentum)
        enqueue(self.queue, self.place, all_gather_keys(self.fresh)[:, None])
