"""Augmentation of uint8 pictures: a function of the pixels and a random generator, nothing else."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from project.data.images import Pixels

Augment = Literal["none", "flip"]
Transform = Callable[[Pixels, np.random.Generator], Pixels]


def none(image: Pixels, _: np.random.Generator) -> Pixels:
    """The picture as it is: for digits, text and whatever else changes its meaning in a mirror."""
    return image


def flip(image: Pixels, random: np.random.Generator) -> Pixels:
    """Mirrors (H, W, 3) left to right, half of the time: the article's RandomHorizontalFlip."""
    return image[:, ::-1] if random.random() < 0.5 else image


AUGMENTATIONS: dict[str, Transform] = {"none": none, "flip": flip}
