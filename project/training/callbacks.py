"""Callbacks of every run: seeds, progress, predictions.csv; and helpers that callbacks share."""

import itertools
import os
import random
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure

from project import files, runs
from project.data.datamodule import ImageData
from project.errors import UserError
from project.evaluation import results, scores
from project.inference import predictions
from project.inference.predictions import Prediction
from project.metrics import positive_index


class StepSeed(Callback):
    """Derives the random seed of each step from seed, step and rank, so that no random state needs saving."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        key = (data_of(trainer).seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        seeds = np.random.SeedSequence(key).generate_state(3, np.uint64).tolist()  # 30 us
        random.seed(seeds[0])
        np.random.seed(seeds[1] % 2**32)
        torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed takes 0.5 ms where CUDA is not initialised
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seeds[2])


class ProgressLines(Callback):
    """Prints one line an epoch."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start = time.monotonic()

    on_train_start: Any = on_train_epoch_start  # a fit resumed within an epoch has no on_train_epoch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
        values = [f"{key} {trainer.callback_metrics[key]:.4f}" for key in shown if key in trainer.callback_metrics]
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        seconds = duration(time.monotonic() - self._start)
        pl_module.print(f"epoch {trainer.current_epoch + 1}{epochs}  {'  '.join(values)}  ({seconds})")


class PredictionWriter(Callback):
    """Writes predictions.csv and test_metrics.json into the run of the tested checkpoint, if these may be written."""

    def __init__(self, checkpoint: Path) -> None:
        self.run, self.checkpoint = runs.folder_of(checkpoint), checkpoint
        self._predictions: list[tuple[int, Prediction]] = []  # with their rows
        if not os.access(self.run, os.W_OK):
            raise UserError(f"The test's results go into {self.run}, which cannot be written; change its permissions.")
        present = [name for name in runs.TEST_FILES if (self.run / name).exists()]
        is_own = runs.is_inside(checkpoint) or results.has_results(checkpoint)  # of an earlier test
        if present and not is_own:
            raise UserError(f"{self.run}/{present[0]} exists and may be your own; move it, or the checkpoint, away.")

    def on_test_batch_end(self, trainer: Trainer, _: Any, outputs: Any, batch: Any, *__: Any) -> None:
        data = data_of(trainer)
        path = data.dataset("test").path
        for row, probabilities in zip(batch.row.tolist(), outputs.tolist(), strict=True):
            self._predictions.append((row, Prediction.of(path(row), probabilities, data.class_names)))
        self._predictions += [(row, Prediction(path(row), error=reason)) for row, reason in batch.failed]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every, data = dict(itertools.chain(*gather(trainer, self._predictions))), data_of(trainer)
        if not trainer.is_global_zero:
            return
        names, labels = data.class_names, data.dataset("test").labels
        rows = [every[row]._replace(true=names[labels[row]]) for row in sorted(every)]
        predictions.write(self.run / runs.PREDICTIONS, rows, names)
        result = {key: float(value) for key, value in trainer.callback_metrics.items()} | {
            "n": len(rows),
            "unreadable": sum(bool(row.error) for row in rows),
            "class_names": names,
            "checkpoint": str(self.checkpoint),
            "data": str(data.root),
        }
        files.write_json(self.run / runs.TEST_METRICS, result)
        table = results.TestPredictions.of(rows, names, str(self.run / runs.PREDICTIONS))
        values = results.all_scores(table.scored(positive_index(names, pl_module.hparams["positive"])), result)
        pl_module.print(f"test, raw probabilities: {scores.format_scores(values)}")
        pl_module.print(f"written: {self.run / runs.TEST_METRICS}, {self.run / runs.PREDICTIONS}")


def data_of(trainer: Any) -> ImageData:
    """The data module of a Trainer."""
    return cast(ImageData, trainer.datamodule)


def tensorboard(trainer: Trainer) -> Any:
    """TensorBoard's writer on the first rank; None on others, or without a TensorBoardLogger."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def log_scalars(trainer: Trainer, scalars: dict[str, Any], step: int) -> None:
    """Logs numbers to all loggers but metrics.csv, whose columns are the same for all classes and do not hold times."""
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger):  # whose names are ASCII
            ascii_tags = {tag: tag.encode("ascii", "backslashreplace").decode().replace("\\", "") for tag in scalars}
            logger.log_metrics({ascii_tags[tag]: value for tag, value in scalars.items()}, step)
        elif logger.name != runs.METRICS:
            logger.log_metrics(scalars, step)


def log_figure(trainer: Trainer, tag: str, figure: Figure, step: int) -> None:
    """Logs a figure to TensorBoard, MLflow, and every logger that has `log_image` as WandbLogger has it."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(str(logger.run_id), figure, f"{tag}/{step}.png")
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [figure], step)


def point(trainer: Trainer) -> int:
    """The step at which Lightning logs: within a validation that of the last training batch, else of the next one."""
    return trainer.global_step - trainer.validating


def gather(trainer: Trainer, item: Any) -> list[Any]:
    """The item of every rank, in order of rank."""
    if trainer.world_size == 1:
        return [item]
    items: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def duration(seconds: float) -> str:
    """Seconds as text, in a readable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
