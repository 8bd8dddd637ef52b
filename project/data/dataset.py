"""Rows become uint8 images and labels, read when they are asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from project.data import cache, images, transforms, workers
from project.data.cache import Cache
from project.data.sampler import BatchSampler, Key

UNKNOWN = -1  # the label of a picture that has none


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        image: (B, 3, H, W) uint8, RGB; its memory is channels-last, as the network wants it.
        label: (B,) int64.
        row: (B,) int64, the place in the data set.
        failed: (row, reason) of the pictures that could not be read; they are not among the B.
    """

    image: Tensor
    label: Tensor
    row: Tensor
    failed: list[tuple[int, str]]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Reads pictures on demand; holds paths, never pixels.

    Args:
        root: Folder that `paths` are relative to.
        paths: One a picture.
        labels: (N,) integers, or None where they are unknown.
        image_size: Side of the square images, in pixels.
        resize: How a picture becomes square; see `images.read`.
        augment: Name of the augmentation, from `transforms.AUGMENTATIONS`.
        seed: Augmentation is drawn from (seed, epoch, row).
        rows: Which of `paths` and `labels` are in this set, and in which order; by default all.
        kept: Keeps every one of `paths` decoded; its size is `read_size`.
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
        kept: Cache | None = None,
    ) -> None:
        self.root, self.paths = "" if root == Path() else str(root), paths
        self.rows = np.arange(len(paths)) if rows is None else rows
        self.labels = np.full(len(self.rows), UNKNOWN) if labels is None else labels[self.rows].astype(np.int64)
        self.image_size, self.resize, self.seed, self.kept = image_size, resize, seed, kept
        self.augment = transforms.AUGMENTATIONS[augment]
        self.read_size = read_size(image_size, augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Image (3, H, W) uint8 and label of one row, as the first epoch has it.

        Raises:
            ImageError: The picture cannot be read.
        """
        image = torch.from_numpy(self._read((0, row)).copy())  # Pillow's own memory is not writable
        return image.permute(2, 0, 1), int(self.labels[row])

    def __getitems__(self, keys: list[Key]) -> Batch:
        """A batch in one call; unreadable pictures are left out and named in `failed`."""
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
        """Where a row's picture lies, as the root was given."""
        return os.path.join(self.root, self.paths[self.rows[row]])  # noqa: PTH118 (a tenth of a Path's time)

    def _read(self, key: Key) -> images.Pixels:
        image = self._square(key[1])
        if self.augment.apply is transforms.none:
            return image
        return self.augment.apply(image, np.random.default_rng((self.seed, *key)), self.image_size)

    def _square(self, row: int) -> images.Pixels:
        path = self.path(row)
        if self.kept is None:
            return images.read(path, self.read_size, self.resize)
        try:
            stamp = cache.stamp(path)
        except (OSError, ValueError):  # it is not there, or cannot be: `read` says so
            return images.read(path, self.read_size, self.resize)
        place = int(self.rows[row])
        if (image := self.kept.get(place, stamp)) is not None:
            return image
        image = images.read(path, self.read_size, self.resize)
        self.kept.put(place, stamp, image)
        return image


class Features(Dataset[tuple[Tensor, int]]):
    """Rows of an `ImageDataset` with what frozen layers make of their pictures, instead of these.

    Args:
        dataset: Without augmentation.
        values: (N, F) float, in the order of its rows.
        failed: Reason by row, where the picture could not be read.
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


def loader(
    dataset: ImageDataset | Features, sampler: BatchSampler, num_workers: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """A DataLoader whose workers live as long as it does and leave Ctrl-C to the main process.

    They start from a small server process where the system has that: a worker forked from the training process would
    keep its weights and the optimiser's state alive as they were at that moment, 0.7 GB for AlexNet.
    """
    if num_workers:
        workers.start_server()
    return DataLoader(
        cast(Dataset[Batch], dataset),  # what __getitems__ makes of many rows
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context="forkserver" if num_workers and workers.HAS_SERVER else None,
        worker_init_fn=workers.prepare,
        generator=torch.Generator(),  # not the global one: what the network draws must not depend on the workers
    )


def _as_is(batch: Any) -> Any:
    return batch  # `ImageDataset.__getitems__` has made the batch already
