"""Rows become uint8 images and labels, read on demand."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from project.batch import Batch
from project.data import images, transforms
from project.data.cache import Cache, stamp
from project.data.paths import Paths

Key = tuple[int, int]  # epoch, row: the epoch travels with the row, so that workers augment each epoch differently


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Reads images on demand; holds paths, never pixels.

    `paths` are relative to `root`; `labels` are (N,) integers, or None if unknown, -1 in batches. `resize`, see
    `images.read`, makes an image a square of `read_size` pixels, and the augmentation named `augment`, drawn from
    (seed, epoch, row), one of `image_size`. `cache` has the former, in the rows `cache_rows` (N,) or in order.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: npt.NDArray[np.integer[Any]] | None,
        image_size: int,
        resize: str = "stretch",
        augment: transforms.Augment = "none",
        seed: int = 0,
        cache: Cache | None = None,
        cache_rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.root = "" if root == Path() else str(root)
        self.paths = Paths.of(paths)  # every worker gets a copy, which takes an eighth of a list's time
        self.labels = np.full(len(paths), -1) if labels is None else labels.astype(np.int64)
        self.image_size, self.resize, self.seed = image_size, resize, seed
        self.augment = transforms.AUGMENTATIONS[augment]
        self.read_size = read_size(image_size, augment)
        self.cache, self.cache_rows = cache, np.arange(len(paths)) if cache_rows is None else cache_rows

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Image (3, H, W) uint8 and label of one row, augmented as in the first epoch; ImageError if unreadable."""
        image = torch.from_numpy(self._read((0, row)).copy())  # Pillow's own memory is not writable
        return image.permute(2, 0, 1), int(self.labels[row])

    def __getitems__(self, keys: list[Key]) -> Batch:
        """A batch in one call; unreadable images are left out and named in `failed`."""
        size = self.image_size
        pixels = np.empty((len(keys), size, size, 3), dtype=np.uint8)
        rows: list[int] = []
        failed: list[tuple[int, str]] = []
        for key in keys:
            try:
                pixels[len(rows)] = self._read(key)
            except images.ImageError as error:
                failed.append((key[1], error.reason))
            else:
                rows.append(key[1])
        image = torch.from_numpy(pixels[: len(rows)]).permute(0, 3, 1, 2)
        return Batch(image, torch.from_numpy(self.labels[rows]), torch.tensor(rows, dtype=torch.int64), failed)

    def path(self, row: int) -> str:
        """The file of a row's image, below the root as it was given."""
        return os.path.join(self.root, self.paths[row])  # noqa: PTH118 (a tenth of a Path's time)

    def _read(self, key: Key) -> images.Pixels:
        image = self._square(key[1])
        if self.augment.apply is transforms.none:
            return image
        return self.augment.apply(image, np.random.default_rng((self.seed, *key)), self.image_size)

    def _square(self, row: int) -> images.Pixels:
        path, index = self.path(row), int(self.cache_rows[row])
        if self.cache is None:
            return images.read(path, self.read_size, self.resize)
        try:
            version = stamp(path)
        except (OSError, ValueError):  # the file is missing, or its name impossible: `read` raises the reason
            return images.read(path, self.read_size, self.resize)
        if (image := self.cache.get(index, version)) is None:
            image = images.read(path, self.read_size, self.resize)
            self.cache.put(index, version, image)
        return image


class Features(Dataset[tuple[Tensor, int]]):
    """The output (N, F) of frozen layers for the rows of a dataset, and the rows whose images cannot be read."""

    def __init__(self, dataset: ImageDataset, values: Tensor, failed: Collection[int]) -> None:
        self.labels, self.values, self.failed = torch.from_numpy(dataset.labels), values, failed

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """A batch whose `image` is (B, F) float."""
        rows = torch.tensor([row for _, row in keys if row not in self.failed], dtype=torch.int64)
        return Batch(self.values[rows], self.labels[rows], rows, [])


def read_size(image_size: int, augment: transforms.Augment) -> int:
    """Side of the square that an augmentation starts from, in pixels."""
    return round(image_size * transforms.AUGMENTATIONS[augment].margin)
