"""The views of DINO and GLSD as most code makes them: PIL in, torchvision's transforms one by one."""

import random

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2


def torchvision_blur():
    return v2.GaussianBlur(13, (0.1, 2.0))  # 13 pixels are 3 standard deviations each way


def pil_blur():
    "Faster and approximate (a few box blurs); what DINO's code uses."
    return v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))


def colours(blur, p_blur, p_solarize):
    "What follows the crop: a list of transforms, from a PIL image to a normalised tensor."
    return [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([blur()], p=p_blur),
        v2.RandomSolarize(128, p=p_solarize),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]


def augmentation(size, scale, *colour):
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            *colours(*colour),
        ]
    )


class PlainViews:
    "Two global views of 224 pixels and eight local ones of 96, of one file."

    def __init__(self, blur=torchvision_blur):
        global_1, global_2 = (augmentation(224, (0.4, 1.0), blur, *p) for p in ((1.0, 0.0), (0.1, 0.2)))
        self.views = [global_1, global_2] + [augmentation(96, (0.05, 0.4), blur, 0.5, 0.0)] * 8

    def __call__(self, path):
        image = Image.open(path).convert('RGB')
        return [view(image) for view in self.views]
