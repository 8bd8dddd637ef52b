"""Augmentation of uint8 images: a function of the pixels and a random generator, nothing else."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from project.data.images import Pixels

Augment = Literal["none", "flip", "crop", "trivial"]
Transform = Callable[[Pixels, np.random.Generator, int], Pixels]


class Augmentation(NamedTuple):
    """Maps an image (S, S, 3) and a random generator to an image whose side is given; S is `margin` times as long."""

    apply: Transform
    margin: float = 1.0


def none(image: Pixels, _: np.random.Generator, size: int) -> Pixels:
    """The image as it is: for digits, text and whatever else a mirror changes the meaning of."""
    return image


def flip(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """Mirrors left to right, half of the time: the article's RandomHorizontalFlip."""
    if random.random() < 0.5:
        return image
    import torch

    mirrored: Pixels = torch.from_numpy(image).flip(1).numpy()  # 14 us at 224 px; NumPy takes 215
    return mirrored


def crop(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """A random part at full size, 8 to 100 % of the area, 3:4 to 4:3 (RandomResizedCrop), after `flip`."""
    side = len(image)
    area, ratio = random.uniform(0.08, 1.0) * side * side, math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = (min(side, round(length)) for length in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
    left, top = (int(random.integers(side - length + 1)) for length in (width, height))
    part = Image.fromarray(flip(image, random, size))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + width, top + height)))


def trivial(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """One random operation of random strength (TrivialAugmentWide, arXiv:2103.10158), after `crop`."""
    import torch
    from torchvision.transforms import v2  # the other augmentations do without

    cropped = Image.fromarray(crop(image, random, size))
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
        torch.default_generator.manual_seed(int(random.integers(2**63)))
        return np.asarray(v2.TrivialAugmentWide()(cropped))


AUGMENTATIONS = {
    "none": Augmentation(none),
    "flip": Augmentation(flip),
    "crop": Augmentation(crop, margin=8 / 7),  # 256 px for 224, as in torchvision's reference
    "trivial": Augmentation(trivial, margin=8 / 7),
}
