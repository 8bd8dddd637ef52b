"""What a validation has found, in TensorBoard: each class's figures, curves, and some pictures with their answers."""

import math
import re
import time
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from lightning.pytorch import Callback, LightningModule, Trainer

from project import figures, lettering
from project.board import show
from project.callbacks import data_of, gather, point, tensorboard
from project.metrics import positive_index

MOST_CLASSES = 50  # that have curves of their own: of more, the most frequent ones
MOST_CELLS = 1000**2  # of a confusion matrix
SAMPLES = 24  # pictures in the grid
SHARE = 0.01  # of a fit's time that drawing may take; everything that is shown together takes less than 0.02


class Answers(Callback):
    """Shows the answers that the network gave in a validation.

    Figures of each class are logged at every validation, into TensorBoard alone: metrics.csv has the same columns for
    any number of classes. Curves and pictures are drawn at the last validation, and at those with a new lowest
    val/loss while all drawing together takes less than `SHARE` of the time.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock. Nothing is kept for a fit that goes on: the clock decides only what is drawn."""
        self._start = time.monotonic()
        self._spent, self._takes = 0.0, 1.0  # seconds, of all drawing and of one; the second is a guess at first
        self._lowest = math.inf
        self._waiting: tuple[Any, ...] | None = None  # a validation that is not drawn yet
        self._pictures: dict[int, npt.NDArray[np.uint8]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts empty."""
        self._batches: list[tuple[Any, ...]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the batch's answers, where they are: no accelerator is waited for."""
        self._batches.append((batch.row, batch.label, outputs))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs each class's figures; draws, where it is time."""
        if trainer.sanity_checking:
            return
        parts = [[part.cpu().numpy() for part in parts] for parts in self._batches]
        parts = [part for rank in gather(trainer, parts) for part in rank]
        self._batches = []
        writer = tensorboard(trainer)
        if writer is None or not parts:
            return
        rows, true, probabilities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(rows)  # as on one rank
        rows, true, probabilities = rows[order], true[order], probabilities[order]
        if not len(rows) or not np.isfinite(probabilities).all():
            return
        names = data_of(trainer).class_names
        for place, tag in shown_classes(true, names).items():
            for figure, value in figures_of_class(true, probabilities.argmax(axis=1), place).items():
                writer.add_scalar(f"val_class/{figure}/{tag}", value, point(trainer))
        self._waiting = (point(trainer), rows, true, probabilities)
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        # one more drawing is kept in reserve, for the last validation
        if loss < self._lowest and self._spent + 2 * self._takes < SHARE * (time.monotonic() - self._start):
            self._draw(trainer, pl_module)
        self._lowest = min(self._lowest, loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last validation, on the first rank, which alone has kept it."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waiting is None:
            return
        began = time.monotonic()
        writer, names = tensorboard(trainer), data_of(trainer).class_names
        (step, rows, true, probabilities), self._waiting = self._waiting, None
        positive = positive_index(names, pl_module.hparams["positive"])
        drawn = [lettering.drawable(name) for name in names]
        with mpl.rc_context({"font.family": lettering.font_families()}):
            if len(names) ** 2 <= MOST_CELLS:
                counts = np.zeros((len(names), len(names)), dtype=np.int64)
                np.add.at(counts, (true, probabilities.argmax(axis=1)), 1)
                show(writer, "val/confusion_matrix", figures.confusion_matrix(counts, drawn), step)
            show(writer, "val/roc", figures.roc(true, probabilities, drawn, positive), step)
            show(writer, "val/precision_recall", figures.precision_recall(true, probabilities, drawn, positive), step)
            show(writer, "val/reliability", figures.reliability(true, probabilities), step)
        for place, tag in shown_classes(true, names).items():
            writer.add_pr_curve(f"val_class/{tag}", true == place, probabilities[:, place], step)
        self._draw_samples(trainer, step, rows, true, probabilities)
        self._takes = time.monotonic() - began
        self._spent += self._takes

    def _draw_samples(
        self, trainer: Trainer, step: int, rows: Any, true: Any, probabilities: npt.NDArray[np.floating[Any]]
    ) -> None:
        """The same pictures each time, from every part of the validation split."""
        data = data_of(trainer)
        dataset, names = data.dataset("val"), data.class_names
        if not self._pictures:
            batch = dataset.__getitems__([(0, row) for row in spread(len(dataset), SAMPLES)])
            images = batch.image.permute(0, 2, 3, 1).numpy()
            self._pictures = dict(zip(batch.row.tolist(), images, strict=True))
        places = [place for place, row in enumerate(rows.tolist()) if row in self._pictures]
        if not places:
            return
        said, right = probabilities[places].argmax(axis=1), true[places]
        titles = []
        for place, answer, label in zip(places, said, right, strict=True):
            title = f"{lettering.shortened(names[answer], 11)} {probabilities[place, answer]:.0%}"
            titles.append(f"{title}\nnot {lettering.shortened(names[label], 12)}" if answer != label else title)
        images = np.stack([self._pictures[int(rows[place])] for place in places])
        grid = figures.image_grid(images, titles, wrong=(said != right).tolist())
        show(tensorboard(trainer), "val/samples", grid, step)


def shown_classes(true: npt.NDArray[np.integer[Any]], class_names: Sequence[str]) -> dict[int, str]:
    """The classes that occur among true labels (N,), at most `MOST_CLASSES` of the most frequent, and their tags.

    A tag has no slash or space, and no other class has it.
    """
    counts = np.bincount(true, minlength=len(class_names))
    frequent = np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist()
    tags = [re.sub(r"[^\w.-]+", "_", name) for name in class_names]
    return {
        place: tags[place] if tags.count(tags[place]) == 1 else f"{tags[place]}_{place}"
        for place in sorted(frequent)
        if counts[place]
    }


def figures_of_class(
    true: npt.NDArray[np.integer[Any]], predicted: npt.NDArray[np.integer[Any]], place: int
) -> dict[str, float]:
    """Recall, precision and F1 of a class that occurs; precision is 0 where it is never the answer."""
    hits = int(((true == place) & (predicted == place)).sum())
    there, given = int((true == place).sum()), int((predicted == place).sum())
    return {"recall": hits / there, "precision": hits / max(given, 1), "f1": 2 * hits / (there + given)}


def spread(count: int, most: int) -> list[int]:
    """Places from 0 to below `count`, at most so many, evenly spread."""
    places: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return places
