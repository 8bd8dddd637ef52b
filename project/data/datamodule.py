"""ImageData: a folder of images as Lightning's train, val and test loaders."""

import mmap
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, takewhile
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt, register_type
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torchvision.transforms import v2

from project import parts
from project.batch import Batch
from project.data import cache as caches
from project.data import digits, manifest, shards
from project.data import workers as processes
from project.data.dataset import Features, ImageDataset, read_size
from project.data.folders import Layout
from project.data.images import parse_resize
from project.data.loader import BatchSampler, Loader, loader
from project.data.manifest import Manifest
from project.data.paths import Paths
from project.data.transforms import Augment, augmentation
from project.errors import UserError, some

if TYPE_CHECKING:
    Transforms = list[Any]
else:
    Transforms = list[v2.Transform]  # for the command line's parser, which gives class paths and their arguments
    register_type(Number, float, float, fail_already_registered=False)  # the degrees of RandomRotation
Balance = Literal["none", "loss", "sample"]
STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ImageData(LightningDataModule):
    """Feeds a folder of images to the Trainer.

    Args:
        root: The images: root/<class>/**.jpg, or root/train|val|test/<class>/**.jpg, or a CSV file with the columns
            path and label, and perhaps split and group. The default, data/digits, is written on first use.
        split: A run's split.csv, to use the very same rows again.
        split_seed: Decides which image goes into which split.
        group: Regular expression; images in whose path it matches the same text stay in one split (the first
            parentheses, if there are any): all images of one patient, module or video.
        folds: Number of equal parts for cross-validation; `fold` of them is the test split.
        fold: Which part, from 0.
        exclude: CSV file with a column path: images to leave out, as `check --quarantine` writes it.
        layout: Whether the folders in root are splits or classes; by default their names and contents decide.
        keep: Pattern of names of folders to read though they are hidden or those of a NAS, a file manager or a
            synchroniser, such as @eaDir.
        image_size: Side of the square images, in pixels; by default 64 for the bundled digits, else 224.
        resize: How an image becomes square: stretch, crop (the centre) or pad (black borders), by interpolation and
            share of the short side, if given (pad:lanczos, crop:bicubic:0.875); weights: as --model.weights expect it.
        augment: What is done to training images, each adding to the one before: none, flip, crop (RandomResizedCrop);
            trivial (TrivialAugmentWide) and randaugment (RandAugment) add to crop; by default none for the digits, else
            flip.
        transforms: What is done to training images after that: class paths, as of torchvision.transforms.v2, with
            arguments; from Python also such transforms themselves. They take and give uint8 (3, S, S).
        balance: Against unequal classes: none, loss (rare classes weigh more) or sample (they are drawn more often).
        cache: Keep decoded images in data/cache: on, off or auto, which means on where there is room.
        batch_size: Images a step, over all devices; by default 64, less for fewer than 512 training images.
        workers: Processes that read images; by default none for the digits, else one for each usable core, at most 8.
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
        layout: Layout | None = None,
        keep: str = "",
        image_size: PositiveInt | None = None,
        resize: str = "stretch",
        augment: Augment | None = None,
        transforms: Transforms | None = None,
        balance: Balance = "none",
        cache: caches.Choice = "auto",
        batch_size: PositiveInt | None = None,
        workers: NonNegativeInt | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore="own")
        for key, value in self.hparams.items():  # plain: a Path or jsonargparse's types would be code in a checkpoint
            self.hparams[key] = int(value) if isinstance(value, int | np.integer) else value and str(value)
        if transforms and not any(map(callable, transforms)):
            self.hparams["transforms"] = transforms
        self.root = shards.local(root)
        self._query: dict[str, Any] = {"split": Path(split) if split else None, "seed": split_seed, "group": group}
        self._query |= {"folds": folds, "fold": fold, "exclude": Path(exclude) if exclude else None}
        self._query |= {"layout": layout, "keep": keep}
        self.is_bundled = self.root.resolve() == digits.ROOT.resolve()
        if self.is_bundled:
            digits.write(self.root)
        self.image_size = int(image_size or (digits.IMAGE_SIZE if self.is_bundled else 224))
        parse_resize(resize)  # its error
        self.resize = resize
        self.augment: Augment = augment or ("none" if self.is_bundled else "flip")
        self.augmentation = augmentation(self.augment, transforms, self.image_size)
        self.transforms = transforms or []
        self.balance, self.cache, self.seed = balance, cache, seed
        default = 0 if self.is_bundled else min(processes.usable_cores(), 8)
        self.workers = default if workers is None else int(workers)
        if batch_size is not None:
            self.batch_size = int(batch_size)
        self._datasets: dict[str, ImageDataset] = {}
        self._features: dict[str, Features] = {}
        self.start = (0, 0)  # epoch and batch at which training starts
        self._checked: set[str] = set()  # splits
        self._unreadable: set[str] = set()  # paths that have been printed

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, trust: Collection[str] = (), **options: Any) -> Any:
        """As Lightning's; refuses class paths in the checkpoint that are neither well-known nor in `trust`."""
        content = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        parts.require_trusted_hyperparameters(content, "data", trust, checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **options | {"weights_only": True})

    @cached_property
    def manifest(self) -> Manifest:
        """The data set's rows; reads the folder on first use."""
        return manifest.load(self.root, **self._query)

    @property
    def run_name(self) -> str:
        """The default name of a run: that of the data's folder or file, and the fold, if there is one."""
        root, fold = self.root.resolve(), self._query["fold"]
        name = (root.stem if root.is_file() else root.name).translate({ord(","): "-", ord(":"): "-"})
        return name if fold is None else f"{name}-fold{fold}"

    @property
    def class_names(self) -> list[str]:
        """Sorted names of the training split's classes."""
        return self.manifest.class_names

    @property
    def class_weights(self) -> list[float] | None:
        """Weight of each class in the training loss, 1 on average over the images; None where all weigh the same."""
        return self.balanced_weights().tolist() if self.balance == "loss" else None

    def balanced_weights(self) -> npt.NDArray[np.float64]:
        """(K,) weight of each class with which all classes weigh the same, 1 on average over the training images."""
        labels = self.manifest.labels[self.manifest.rows("train")]
        return len(labels) / (len(self.class_names) * np.bincount(labels, minlength=len(self.class_names)))

    @cached_property
    def batch_size(self) -> int:
        """Rows in a global batch; by default small enough for eight steps an epoch."""
        rows = len(self.manifest.rows("train"))
        return max(1, min(64, rows, max(8, rows // 8)))

    @property
    def batching(self) -> list[int]:
        """Batch size and number of training rows, which decide how an epoch is split into batches."""
        return [self.batch_size, len(self.manifest.rows("train"))]

    @property
    def epochs(self) -> int:
        """Default number of epochs: about 600 steps, but at least 6 and at most 24 epochs; for the digits 8."""
        if self.is_bundled:
            return 8
        steps = max(1, len(self.manifest.rows("train")) // self.batch_size)
        return min(24, max(6, round(600 / steps)))

    def setup(self, stage: str | None = None) -> None:
        """Checks that the stage can run, by default each that has images; decodes each class to its first readable one.

        Raises:
            UserError: No test split, a class without readable training images, or a batch larger than the training set.
        """
        splits = STAGE_SPLITS[stage or "fit"] + ("test",) * (stage is None and len(self.dataset("test")) > 0)
        for split in splits:
            if not len(self.dataset(split)):
                raise UserError(f"{self.root} has no {split} images; put some in {self.root}/{split}/<class>/.")
            if split not in self._checked:
                _require_readable(self.dataset(split), split, self.class_names)
                self._checked.add(split)
        if "train" in splits and self.batch_size > (count := len(self.dataset("train"))):
            raise UserError(
                f"--data.batch_size {self.batch_size} is larger than the training set of {count} images; give a "
                "smaller one."
            )

    def require_enough_for(self, ranks: int, stage: str) -> None:
        """Raises UserError where a split, or a batch, has fewer images than there are ranks."""
        least = {f"{split} images": len(self.dataset(split)) for split in STAGE_SPLITS[stage]}
        least |= {"images in a batch": self.batch_size} if stage == "fit" else {}
        what, count = min(least.items(), key=lambda item: item[1])
        if count < ranks:
            raise UserError(
                f"{ranks} processes are too many for {count} {what} of {self.root}; give --trainer.devices {count}."
            )

    def dataset(self, split: str) -> ImageDataset:
        """One split's rows; only the training split is augmented."""
        if split not in self._datasets:
            augment: Augment = self.augment if split == "train" else "none"
            rows = self.manifest.rows(split)
            self._datasets[split] = ImageDataset(
                root=self.manifest.root,
                paths=Paths.of(self.manifest.paths)[rows],
                labels=self.manifest.labels[rows],
                image_size=self.image_size,
                resize=self.resize,
                augment=augment,
                seed=self.seed,
                cache=self.image_cache(augment)[0],
                cache_rows=rows,
            )
            if split == "train":
                self._datasets[split].augment = self.augmentation
        return self._datasets[split]

    def image_cache(self, augment: Augment) -> tuple[caches.Cache | None, str]:
        """The cache of decoded images at the size that an augmentation needs, and a sentence about it."""
        size = read_size(self.image_size, augment)
        return caches.choose(self.cache, caches.FOLDER, self.root, self.manifest.paths, size, self.resize)

    def train_dataloader(self) -> Loader:
        """Shuffled batches of `Batch`; an incomplete last one is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    predict_dataloader = test_dataloader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Prints path and reason of each image that could not be read, once."""
        trainer: Any = self.trainer
        split = trainer.state.stage.dataloader_prefix.replace("predict", "test")
        for row, reason in batch.failed:
            if (path := self.dataset(split).path(row)) not in self._unreadable:
                self._unreadable.add(path)
                print(f"left out, unreadable: {path}: {reason}", flush=True)  # on the rank that read it
        return batch

    def _loader(self, split: str) -> Loader:
        dataset = self.dataset(split)
        trainer: Any = self.trainer
        sampler = BatchSampler(
            len(dataset),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            weights=self.balanced_weights()[dataset.labels] if split == "train" and self.balance == "sample" else None,
            same=trainer is not None and trainer.overfit_batches > 0,
        )
        if split == "train":
            sampler.start_from(*self.start)
        return loader(
            self._features.get(split, dataset),
            sampler,
            *((0, 0) if split in self._features else self.reading),
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def in_order(self, split: str) -> Loader:
        """Every image of a split once, in the order of its rows, the same on each rank."""
        dataset = self.dataset(split)
        return loader(dataset, BatchSampler(len(dataset), self.batch_size, shuffle=False), *self.reading)

    @cached_property
    def reading(self) -> tuple[int, int]:
        """Number of workers, and of batches that each reads ahead; fewer where shared memory is small."""
        images = -(-self.batch_size // (self.trainer.num_nodes if self.trainer else 1))
        return processes.that_fit(self.workers, images * (self.image_size**2 * 3 + 16) + 3 * mmap.PAGESIZE)

    def use_features(self, features: dict[str, Features]) -> None:
        """Makes the batches of these splits hold features instead of images."""
        self._features = features


def _require_readable(dataset: ImageDataset, split: str, class_names: list[str]) -> None:
    """Raises UserError where no image of a training class, or none of a split, can be read; prints it of others."""
    count = np.bincount(dataset.labels, minlength=len(class_names))
    if split == "train" and not count.all():
        absent = some([name for name, images in zip(class_names, count, strict=True) if not images])
        raise UserError(f"There is no training image of {absent}; add some, or leave the class out.")

    def failures(rows: npt.NDArray[np.int64]) -> list[tuple[int, str]]:
        tried = (dataset.__getitems__([(0, row)]).failed for row in rows.tolist())
        failed = [*chain.from_iterable(takewhile(bool, tried))]  # up to the first readable image
        return failed if len(failed) == len(rows) else []

    order = np.argsort(dataset.labels, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(dataset.labels[order])) + 1)  # rows of each
    with ThreadPoolExecutor(processes.usable_cores()) as pool:
        failed = [*chain.from_iterable(pool.map(failures, classes))]
    if not failed:
        return
    names = [class_names[label] for label in np.unique(dataset.labels[[row for row, _ in failed]])]
    of = f" of {some(names)}" * (len(failed) < len(dataset))
    first = some([f"{dataset.path(row)} ({reason})" for row, reason in failed], 3)
    text = f"None of the {len(failed):,} {split} images{of} can be read; the first: {first}"
    if split == "train" or not of:
        raise UserError(f"{text}. Replace them{', or leave the class out' * bool(of)}.")
    text += ". Precision, recall and AUROC of such a class cannot be measured; averages leave it out."
    rank_zero_only(print)(text, flush=True)
