"""Rows become uint8 images and labels, read on demand."""

import os
from collections.abc import Sequence
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

UNKNOWN = -1  # the label of an unlabelled image
Key = tuple[int, int]  # epoch, row: the epoch travels with the row, so that workers augment each epoch differently


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Reads images on demand; holds paths, never pixels.

    Args:
        root: Folder that `paths` are relative to.
        paths: One an image.
        labels: (N,) integers; None if they are unknown.
        image_size: Side of the square images, in pixels.
        resize: How an image becomes square; see `images.read`.
        augment: Name of the augmentation, from `transforms.AUGMENTATIONS`.
        seed: Augmentation is drawn from (seed, epoch, row).
        rows: Indices into `paths` and `labels`, in the order of this set; by default all.
        cache: Decoded images of all `paths`, of `read_size`.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: npt.NDArray[np.integer[Any]] | None,
        image_size: int,
        resize: images.Resize = "stretch",
        augment: transforms.Augment = "none",
        seed: int = 0,
        rows: npt.NDArray[np.integer[Any]] | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.root, self.paths = "" if root == Path() else str(root), paths
        self.rows = np.arange(len(paths)) if rows is None else rows
        self.labels = np.full(len(self.rows), UNKNOWN) if labels is None else labels[self.rows].astype(np.int64)
        self.image_size, self.resize, self.seed, self.cache = image_size, resize, seed, cache
        self.augment = transforms.AUGMENTATIONS[augment]
        self.read_size = read_size(image_size, augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Image (3, H, W) uint8 and label of one row, augmented as in the first epoch.

        Raises:
            ImageError: The image cannot be read.
        """
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
        return os.path.join(self.root, self.paths[self.rows[row]])  # noqa: PTH118 (a tenth of a Path's time)

    def _read(self, key: Key) -> images.Pixels:
        image = self._square(key[1])
        if self.augment.apply is transforms.none:
            return image
        return self.augment.apply(image, np.random.default_rng((self.seed, *key)), self.image_size)

    def _square(self, row: int) -> images.Pixels:
        path, index = self.path(row), int(self.rows[row])
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
    """Rows of an `ImageDataset` with the output of frozen layers instead of images.

    Args:
        dataset: Without augmentation.
        values: (N, F) float, in the order of its rows.
        failed: Reasons by row of the images that could not be read.
    """

    def __init__(self, dataset: ImageDataset, values: Tensor, failed: dict[int, str]) -> None:
        self.labels, self.values, self.failed = torch.from_numpy(dataset.labels), values, failed

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """A batch whose `image` is (B, F) float."""
        failed = [(row, self.failed[row]) for _, row in keys if row in self.failed]
        rows = torch.tensor([row for _, row in keys if row not in self.failed], dtype=torch.int64)
        return Batch(self.values[rows], self.labels[rows], rows, failed)


def read_size(image_size: int, augment: transforms.Augment) -> int:
    """Side of the square that an augmentation starts from, in pixels."""
    return round(image_size * transforms.AUGMENTATIONS[augment].margin)
