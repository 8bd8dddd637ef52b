"""Augmentation of uint8 pictures: a function of the pixels and a random generator, nothing else."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from project.data.images import Pixels

Augment = Literal["none", "flip", "crop", "trivial"]
Transform = Callable[[Pixels, np.random.Generator, int], Pixels]


class Augmentation(NamedTuple):
    """What is done to a training picture.

    Attributes:
        apply: (picture (S, S, 3), random generator, side of the result) to the result.
        margin: Side of the picture that it wants, as a multiple of the result's.
    """

    apply: Transform
    margin: float = 1.0


def none(image: Pixels, _: np.random.Generator, size: int) -> Pixels:
    """The picture as it is: for digits, text and whatever else changes its meaning in a mirror."""
    return image


def flip(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """Mirrors left to right, half of the time: the article's RandomHorizontalFlip."""
    return image[:, ::-1] if random.random() < 0.5 else image


def crop(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """A random part, 8 to 100 % of the area, at full size (torchvision's RandomResizedCrop), after `flip`."""
    return _by_torchvision("crop", flip(image, random, size), random, size)


def trivial(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """One random operation of random strength (TrivialAugmentWide, arXiv:2103.10158), after `crop`."""
    return _by_torchvision("trivial", crop(image, random, size), random, size)


AUGMENTATIONS = {
    "none": Augmentation(none),
    "flip": Augmentation(flip),
    "crop": Augmentation(crop, margin=8 / 7),  # 256 px for 224, as in torchvision's reference
    "trivial": Augmentation(trivial, margin=8 / 7),
}


@cache
def _transform(name: str, size: int) -> Any:
    from torchvision.transforms import v2  # the other augmentations do without torch

    return {"crop": v2.RandomResizedCrop(size, antialias=True), "trivial": v2.TrivialAugmentWide()}[name]


def _by_torchvision(name: str, image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """Runs a transform of torchvision's, which draws from torch's own generator: seeded here, and put back."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(random.integers(2**63)))
        made = _transform(name, size)(torch.from_numpy(image.copy()).permute(2, 0, 1))
    pixels: Pixels = made.permute(1, 2, 0).numpy()
    return pixels
