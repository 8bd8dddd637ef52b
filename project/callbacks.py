"""What accompanies a fit or a test: names unreadable pictures, tells the time, writes down what a test found."""

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from project import files, predictions
from project.predictions import Prediction

if TYPE_CHECKING:
    from project.data.datamodule import ImageData


class StepSeed(Callback):
    """What a step draws, for dropout and mixing, depends on seed, step and rank alone: no random state needs saving."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds the generators that a step may use; takes 30 us."""
        place = (data_of(trainer).seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        drawn = np.random.SeedSequence(place).generate_state(3, np.uint64).tolist()
        random.seed(drawn[0])
        np.random.seed(drawn[1] % 2**32)
        torch.default_generator.manual_seed(drawn[2])
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(drawn[2])


class Unreadable(Callback):
    """Names each picture that could not be read, once."""

    def __init__(self) -> None:
        self.named: set[str] = set()

    def name(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Prints path and reason of those that are new in a batch."""
        split: Any = trainer.state.stage and trainer.state.stage.dataloader_prefix  # train, val or test
        for row, reason in batch.failed:
            path = data_of(trainer).dataset(split).path(row)
            if path not in self.named:
                self.named.add(path)
                print(f"left out, unreadable: {path}: {reason}", flush=True)  # each rank, what it has met

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = name


class EveryRow(Callback):
    """Makes sure that a validation or a test has seen every picture once, on however many ranks."""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._seen = 0

    def count(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch, the unreadable ones too."""
        self._seen += len(batch.row) + len(batch.failed)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares with the data set, unless only a part of it was asked for."""
        split: Any = trainer.state.stage and trainer.state.stage.dataloader_prefix
        batches, loaders = (
            (trainer.num_val_batches, trainer.val_dataloaders)
            if split == "val"
            else (trainer.num_test_batches, trainer.test_dataloaders)
        )
        seen, expected = sum(gather(trainer, self._seen)), len(data_of(trainer).dataset(split))
        whole = not trainer.sanity_checking and sum(batches) == len(loaders)  # type: ignore[arg-type]
        assert seen == expected or not whole, f"{seen} of {expected} {split} pictures were measured"

    on_validation_epoch_start = on_test_epoch_start = start
    on_validation_batch_end = on_test_batch_end = count
    on_validation_epoch_end = on_test_epoch_end = check


class Narrator(Callback):
    """Says how long the fit will take, then one line an epoch."""

    FIRST, LAST = 2, 7  # the first steps are slower, and the first batch is drawn: the estimate is made from the others

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting; a fit that goes on within an epoch has no start of it."""
        self._steps = 0
        self._epoch_start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's clock."""
        self._epoch_start = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the estimate's clock."""
        if self._steps == self.FIRST:
            self._first = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimates once, after the first steps."""
        self._steps += 1
        if self._steps == self.LAST:
            step = (time.monotonic() - self._first) / (self.LAST - self.FIRST)
            epochs = (trainer.max_epochs or 0) - trainer.current_epoch
            if epochs > 0 and trainer.max_steps == -1:
                # a forward pass costs about a third of a training step
                validation = sum(trainer.num_val_batches) / 3 / (trainer.check_val_every_n_epoch or 1)
                expected = step * epochs * (trainer.num_training_batches + validation)
                pl_module.print(f"expected time: {duration(expected)} for {epochs} epoch{'s' * (epochs > 1)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's line."""
        shown = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
        values = [f"{key} {trainer.callback_metrics[key]:.4f}" for key in shown if key in trainer.callback_metrics]
        took = duration(time.monotonic() - self._epoch_start)
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        pl_module.print(f"epoch {trainer.current_epoch + 1}{of}  {'  '.join(values)}  ({took})")


class TestResults(Callback):
    """Writes predictions.csv and test_metrics.json into the run of the checkpoint that is tested.

    Attributes:
        FILES: What it and the report write there.
    """

    FILES = ("predictions.csv", "test_metrics.json", "val_predictions.csv", "report.html")

    def __init__(self, run: Path, checkpoint: Path) -> None:
        self.run, self.checkpoint = run, checkpoint

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts empty."""
        self.rows: list[tuple[int, list[float], str]] = []  # row, probabilities, error

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the batch's probabilities."""
        self.rows += [(row, p, "") for row, p in zip(batch.row.tolist(), outputs.tolist(), strict=True)]
        self.rows += [(row, [], reason) for row, reason in batch.failed]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes both files, on the first rank, from all ranks' rows."""
        rows = sorted(row for rank in gather(trainer, self.rows) for row in rank)
        if not trainer.is_global_zero:
            return
        data = data_of(trainer)
        names, dataset = data.class_names, data.dataset("test")

        def prediction(row: int, probabilities: list[float], error: str) -> Prediction:
            path, true = dataset.path(row), names[dataset.labels[row]]
            if error:
                return Prediction(path, error=error, true=true)
            return Prediction.of(path, probabilities, names, true)

        predictions.write(self.run / "predictions.csv", (prediction(*row) for row in rows), names)
        result = {key: float(value) for key, value in trainer.callback_metrics.items()} | {
            "n": len(rows),
            "unreadable": sum(bool(error) for _, _, error in rows),
            "class_names": names,
            "checkpoint": str(self.checkpoint),
            "data": str(data.root),
        }
        with files.replacing(self.run / "test_metrics.json") as stream:
            json.dump(result, stream, indent=2)
        pl_module.print(f"written: {self.run}/test_metrics.json, {self.run}/predictions.csv")


def data_of(trainer: Any) -> "ImageData":
    """The data that the Trainer was given."""
    data: ImageData = trainer.datamodule
    return data


def tensorboard(trainer: Trainer) -> Any:
    """TensorBoard's writer on the first rank, where there is one."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                return logger.experiment
    return None


def point(trainer: Trainer) -> int:
    """The step that Lightning gives to what is logged now; at the end of an epoch it is one further than its last."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def gather(trainer: Trainer, item: Any) -> list[Any]:
    """The item of every rank, in order of rank."""
    if trainer.world_size == 1:
        return [item]
    items: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
