"""Data of one's own: what a LightningDataModule has to give.

Once `prepare_data` and `setup` have run, it has

- `class_names`, a list of K different names, and `image_size`, the side of its images in pixels;
- `train_dataloader`, `val_dataloader` and `test_dataloader`: one DataLoader each, of a map-style data set of pairs:
  image, uint8 (3, image_size, image_size), RGB, as tensor or array, and label, an int below K.

Data set, batch_size and num_workers of a DataLoader are used. Batches, see batch.py, and their order are those of
ImageData, so that a fit can be resumed within an epoch. A subclass of ImageData has all of this.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from project.data.datamodule import STAGE_SPLITS, ImageData
from project.data.dataset import ImageDataset, Key
from project.data.images import ImageError, Pixels
from project.data.manifest import Manifest
from project.data.splits import SPLITS
from project.data.transforms import seeded
from project.errors import UserError


class OwnDataset(ImageDataset):
    """The pairs of a data set; the path of an image is its split and number."""

    def __init__(self, pairs: Any, split: str, image_size: int, seed: int) -> None:
        super().__init__(Path(), [f"{split}/{row:06}" for row in range(len(pairs))], None, image_size, seed=seed)
        self.pairs = pairs

    def _read(self, key: Key) -> Pixels:
        with seeded(np.random.default_rng((self.seed, *key))):
            pair = self.pairs[key[1]]
        image = np.asarray(pair[0] if isinstance(pair, tuple | list) and len(pair) > 1 else None)
        if image.dtype != np.uint8 or image.shape != (3, self.image_size, self.image_size):
            wanted = f"not (image, label), the image uint8 {(3, self.image_size, self.image_size)}"
            raise ImageError(self.path(key[1]), f"{type(pair).__name__} with {image.dtype} {image.shape}, {wanted}")
        return image.transpose(1, 2, 0)


class OwnData(ImageData):
    """A LightningDataModule of one's own, found as `path`, for a verb; UserError where it breaks the contract."""

    def __init__(self, own: Any, path: str, verb: str, seed: int = 0) -> None:
        self._own, self._path, self._stages = own, path, set[str]()
        own.prepare_data()
        has_test = type(own).test_dataloader is not LightningDataModule.test_dataloader
        self._splits = SPLITS[: 2 + has_test] if verb == "fit" else STAGE_SPLITS[verb]
        loader = self._own_loader(self._splits[0])
        names, size = getattr(own, "class_names", None), getattr(own, "image_size", None)
        if not isinstance(names, list | tuple) or not 1 < len({*map(str, names)}) == len(names):
            raise self._refused(f"class_names is {names}, not a list of different names")
        if type(size) is not int or size < 1:
            raise self._refused(f"image_size is {size}, not a number of pixels")
        super().__init__(path, image_size=size, augment="none", cache="off", workers=loader.num_workers, seed=seed)
        self.batch_size = loader.batch_size or self.batch_size

    @cached_property
    def manifest(self) -> Manifest:
        """The rows of the splits that the verb needs, of a fit all."""
        sets = {SPLITS.index(split): self.dataset(split) for split in self._splits}
        paths = [each.path(row) for each in sets.values() for row in range(len(each))]
        splits = np.repeat([*sets], [len(each) for each in sets.values()]).astype(np.int8)
        labels = np.concatenate([each.labels for each in sets.values()]).astype(np.int32)
        return Manifest(self.root, paths, labels, splits, [*map(str, self._own.class_names)])

    def dataset(self, split: str) -> ImageDataset:
        """A split's pairs, whose labels, and the first image, are checked."""
        if split not in self._datasets:
            pairs: Any = self._own_loader(split).dataset
            made = OwnDataset(pairs, split, self.image_size, self.seed)
            drawn = made.__getitems__([(epoch, 0) for epoch in range(8) if len(pairs)])
            if drawn.failed:
                raise self._refused(f"{split} gives {drawn.failed[0][1]}")
            if split == "train" and (drawn.image != drawn.image[:1]).any():
                self.transforms = [pairs]  # they change images
            with seeded(np.random.default_rng(0)):
                labels = _labels(pairs)
            if labels.shape != (len(pairs),) or not {*labels.tolist()} <= {*range(len(self._own.class_names))}:
                raise self._refused(f"{split} has the labels {np.unique(labels)}, not an int below K for each image")
            made.labels, self._datasets[split] = labels.astype(np.int64), made
        return self._datasets[split]

    def _own_loader(self, split: str) -> DataLoader[Any]:
        stage = "test" if split == "test" else "fit"
        with seeded(np.random.default_rng(0)):  # a split that is drawn is the same in each command
            if stage not in self._stages:
                self._own.setup(stage)
            self._stages.add(stage)
            loader = getattr(self._own, f"{split}_dataloader")()
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            kind = type(getattr(loader, "dataset", loader)).__name__
            raise self._refused(f"{split}_dataloader gives {kind}, not one DataLoader with a map-style data set")
        return loader

    def _refused(self, reason: str) -> UserError:
        return UserError(f"--data.class_path {self._path}: {reason}; see project/data/own.py.")


def _labels(pairs: Any) -> npt.NDArray[Any]:
    """The labels (N,) of a data set of pairs: its `targets`, if they are those of the first pair of each class."""
    targets = np.asarray(getattr(pairs, "targets", ()))
    if targets.shape == (len(pairs),):
        labels, rows = np.unique(targets, return_index=True)
        if all(pairs[row][1] == label for label, row in zip(labels.tolist(), rows.tolist(), strict=True)):
            return targets
    return np.asarray([pairs[row][1] for row in range(len(pairs))])
