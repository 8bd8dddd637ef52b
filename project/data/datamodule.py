"""ImageData: a folder of pictures as Lightning's train, val and test loaders."""

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from project.data import digits, manifest
from project.data import workers as processes
from project.data.cache import Cache, Choice, choose
from project.data.dataset import Batch, Features, ImageDataset, loader, read_size
from project.data.images import ImageError, Resize
from project.data.sampler import BatchSampler
from project.data.table import Manifest
from project.data.transforms import Augment
from project.errors import UserError

Balance = Literal["none", "loss", "sample"]
STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageData(LightningDataModule):
    """Feeds a folder of pictures to the Trainer.

    Args:
        root: The pictures: root/<class>/**.jpg, or root/train|val|test/<class>/**.jpg, or a CSV file with the columns
            path and label, and perhaps split and group. The default, data/digits, is written on first use.
        split: A run's split.csv, to use the very same rows again.
        split_seed: Decides which picture goes into which split.
        group: Regular expression; pictures in whose path it matches the same text stay in one split (the first
            parentheses, if there are any): all pictures of one patient, module or video.
        folds: Number of equal parts for cross-validation; `fold` of them is the test split.
        fold: Which part, from 0.
        exclude: CSV file with a column path: pictures to leave out, as `check --quarantine` writes it.
        image_size: Side of the square images, in pixels; by default 64 for the bundled digits, else 224.
        resize: How a picture becomes square: stretch, crop (the centre square) or pad (black borders).
        augment: What is done to training pictures, each adding to the one before: none, flip, crop
            (RandomResizedCrop) or trivial (TrivialAugmentWide); by default none for the digits, else flip.
        balance: Against unequal classes: none, loss (rare classes weigh more) or sample (they are drawn more often).
        cache: Keep decoded pictures in data/cache: on, off or auto, which means on where there is room.
        batch_size: Pictures a step, over all devices; by default 64, less for fewer than 512 training pictures.
        workers: Processes that read pictures; by default none for the digits, else the usable cores, at most 8.
        seed: Order and augmentation; the command line sets it to --seed_everything.
    """

    def __init__(
        self,
        root: str = str(digits.ROOT),
        split: str | None = None,
        split_seed: int = 0,
        group: str | None = None,
        folds: int | None = None,
        fold: int | None = None,
        exclude: str | None = None,
        image_size: int | None = None,
        resize: Resize = "stretch",
        augment: Augment | None = None,
        balance: Balance = "none",
        cache: Choice = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.split, self.split_seed, self.seed = split, split_seed, seed
        self.group, self.folds, self.fold, self.exclude = group, folds, fold, exclude
        self._bundled = bundled = self.root.resolve() == digits.ROOT.resolve()
        if bundled:
            digits.write(self.root)
        self.image_size: int = image_size if image_size is not None else digits.IMAGE_SIZE if bundled else 224
        self.resize: Resize = resize
        self.balance, self.cache = balance, cache
        self.augment: Augment = augment or ("none" if bundled else "flip")
        self.workers = workers if workers is not None else 0 if bundled else min(processes.usable_cores(), 8)
        self._batch_size = batch_size
        self._datasets: dict[str, ImageDataset] = {}
        self._features: dict[str, Features] = {}
        self._start = (0, 0)
        for name, value, least in (
            ("image_size", self.image_size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--data.{name} is {value}; it must be at least {least}.")

    @cached_property
    def manifest(self) -> Manifest:
        """The data set's rows; reads the folder on first use."""
        return manifest.load(
            self.root,
            Path(self.split) if self.split else None,
            self.split_seed,
            group=self.group,
            folds=self.folds,
            fold=self.fold,
            exclude=Path(self.exclude) if self.exclude else None,
            keep=self.cache != "off",
        )

    @property
    def class_names(self) -> list[str]:
        """Sorted names of the training split's classes."""
        return self.manifest.class_names

    @property
    def class_weights(self) -> list[float] | None:
        """What a training picture of each class weighs in the loss, 1 on average; None where all weigh the same."""
        return self._weights().tolist() if self.balance == "loss" else None

    def _weights(self) -> npt.NDArray[np.float64]:
        labels = self.manifest.labels[self.manifest.rows("train")]
        return len(labels) / (len(self.class_names) * np.bincount(labels, minlength=len(self.class_names)))

    @property
    def batch_size(self) -> int:
        """Rows in a global batch: at least eight steps an epoch where the folder is small."""
        if self._batch_size is not None:
            return self._batch_size
        rows = len(self.manifest.rows("train"))
        return max(1, min(64, rows, max(8, rows // 8)))

    @property
    def layout(self) -> list[int]:
        """Batch size and training rows: where these are the same, so are the batches of an epoch."""
        return [self.batch_size, len(self.manifest.rows("train"))]

    def start_from(self, epoch: int, batch: int) -> None:
        """Makes training go on at a batch of an epoch."""
        self._start = (epoch, batch)

    @property
    def epochs(self) -> int:
        """How many a fit takes unless told: about 600 steps, but at least 6 and at most 24; for the digits 8."""
        if self._bundled:
            return 8
        steps = max(1, len(self.manifest.rows("train")) // self.batch_size)
        return min(24, max(6, round(600 / steps)))

    def setup(self, stage: str) -> None:
        """Reads the rows and checks that the stage can run; no picture but the first readable one is decoded.

        Raises:
            UserError: No test split, no readable picture, or a batch larger than the training set.
        """
        for split in STAGE_SPLITS[stage]:
            dataset = self.dataset(split)
            if not len(dataset):
                raise UserError(f"{self.root} has no {split} pictures; put some in {self.root}/{split}/<class>/.")
            self._require_readable(dataset, split)
        if stage == "fit" and self.batch_size > len(self.dataset("train")):
            raise UserError(
                f"--data.batch_size {self.batch_size} is larger than the training set of "
                f"{len(self.dataset('train'))} pictures; give a smaller one."
            )

    def require_enough_for(self, ranks: int, stage: str) -> None:
        """Checks that each of so many processes has something to do.

        Raises:
            UserError: It has not.
        """
        least = {f"{split} pictures": len(self.dataset(split)) for split in STAGE_SPLITS[stage]}
        if stage == "fit":
            least["pictures in a batch"] = self.batch_size
        for what, count in least.items():
            if count < ranks:
                raise UserError(
                    f"{ranks} processes are too many for {count} {what} of {self.root}; give --trainer.devices {count}."
                )

    def _require_readable(self, dataset: ImageDataset, split: str) -> None:
        errors = []
        for row in range(len(dataset)):
            try:
                dataset[row]
            except ImageError as error:
                errors.append(error)
            else:
                return
        raise UserError(f"None of the {len(errors)} {split} pictures can be read; the first: {errors[0]}.")

    def dataset(self, split: str) -> ImageDataset:
        """One split's rows; only the training split is augmented."""
        if split in self._datasets:
            return self._datasets[split]
        augment: Augment = self.augment if split == "train" else "none"
        self._datasets[split] = ImageDataset(
            root=self.manifest.root,
            paths=self.manifest.paths,
            labels=self.manifest.labels,
            image_size=self.image_size,
            resize=self.resize,
            augment=augment,
            seed=self.seed,
            rows=self.manifest.rows(split).astype(np.int32),
            kept=self.kept(augment)[0],
        )
        return self._datasets[split]

    def kept(self, augment: Augment) -> tuple[Cache | None, str]:
        """The cache of the pictures at the size that an augmentation wants, and a sentence about it."""
        size = read_size(self.image_size, augment)
        return choose(self.cache, manifest.CACHE, self.root, self.manifest.paths, size, self.resize)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of `Batch`, the incomplete last one left out."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation picture once."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every test picture once."""
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader[Batch]:
        dataset = self.dataset(split)
        trainer = self.trainer
        sampler = BatchSampler(
            len(dataset),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            weights=self._weights()[dataset.labels] if split == "train" and self.balance == "sample" else None,
        )
        if split == "train":
            sampler.start_from(*self._start)
        return loader(
            self._features.get(split, dataset),
            sampler,
            0 if split in self._features else self.workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def in_order(self, split: str) -> DataLoader[Batch]:
        """Every picture of a split once, in order of its rows, on each rank alike."""
        dataset = self.dataset(split)
        return loader(dataset, BatchSampler(len(dataset), self.batch_size, shuffle=False), self.workers)

    def use_features(self, split: str, values: Tensor, failed: dict[int, str]) -> None:
        """From now on a split's batches hold these (N, F) instead of its pictures; see `Features`."""
        self._features[split] = Features(self.dataset(split), values, failed)
