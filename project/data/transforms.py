"""Augmentation of uint8 images: a function of the pixels and a random generator, nothing else."""

import math
import random as python
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from project.data.images import Pixels
from project.errors import UserError

Augment = Literal["none", "flip", "crop", "trivial", "randaugment"]
Transform = Callable[[Pixels, np.random.Generator, int], Pixels]
_GLOBAL = RLock()  # for the generators of the process; one's own data may draw within a draw


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


def drawn(of: str, image: Pixels, random: np.random.Generator, size: int) -> Pixels:
    """An augmentation of torchvision's that draws its operations, after `crop`."""
    from torchvision.transforms import v2  # the other augmentations do without

    cropped = Image.fromarray(crop(image, random, size))
    with seeded(random):
        return np.asarray(getattr(v2, of)()(cropped))


def then(
    transforms: Sequence[Any], augment: Transform, image: Pixels, random: np.random.Generator, size: int
) -> Pixels:
    """Transforms of uint8 tensors (3, S, S), after an augmentation; UserError where one gives something else."""
    import torch

    tensor = torch.from_numpy(np.array(augment(image, random, size))).permute(2, 0, 1)  # a copy: Pillow's is read-only
    with seeded(random):
        for transform in transforms:
            try:
                tensor, given = transform(tensor), tensor
                if (tensor.dtype, tensor.shape) != (given.dtype, given.shape):
                    raise ValueError(f"it gives {tensor.dtype} {tuple(tensor.shape)}")
            except Exception as error:  # transforms refuse images in many ways
                reason = " ".join(str(error).split()) or type(error).__name__
                name = f"--data.transforms {type(transform).__name__}"
                raise UserError(f"{name} does not make a uint8 image (3, {size}, {size}) of one: {reason}") from error
    return tensor.permute(1, 2, 0).numpy()


@contextmanager
def seeded(random: np.random.Generator) -> Iterator[None]:
    """Seeds the global generators of torch, NumPy and Python, which transforms draw from; leaves them as they were."""
    import torch

    numpy: Any = np.random  # its stubs do not export all of it
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        state, bits = python.getstate(), numpy.get_bit_generator()
        torch.default_generator.manual_seed(seed := int(random.integers(2**63)))
        python.seed(seed)
        numpy.set_bit_generator(random.bit_generator)
        try:
            yield
        finally:
            python.setstate(state)
            numpy.set_bit_generator(bits)


AUGMENTATIONS = {
    "none": Augmentation(none),
    "flip": Augmentation(flip),
    "crop": Augmentation(crop, margin=8 / 7),  # 256 px for 224, as in torchvision's reference
    "trivial": Augmentation(partial(drawn, "TrivialAugmentWide"), margin=8 / 7),  # arXiv:2103.10158
    "randaugment": Augmentation(partial(drawn, "RandAugment"), margin=8 / 7),  # arXiv:1909.13719
}


def augmentation(name: Augment, transforms: Sequence[Any] | None, size: int) -> Augmentation:
    """An augmentation, with transforms after it: objects, or their class paths; UserError where they cannot be used."""
    from project import parts  # its parser is of no use to the processes that read images

    chosen = AUGMENTATIONS[name]
    if transforms:
        made = [entry if callable(entry) else parts.make(entry, "data.transforms") for entry in transforms]
        chosen = Augmentation(partial(then, made, chosen.apply), chosen.margin)
        side = round(size * chosen.margin)
        for trial in range(20):  # some transforms change an image only now and then
            chosen.apply(np.zeros((side, side, 3), np.uint8), np.random.default_rng(trial), size)
    return chosen
