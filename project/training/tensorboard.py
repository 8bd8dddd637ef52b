"""What TensorBoard shows besides the curves: images, metrics of each class, plots, embeddings, histograms, HPARAMS."""

import contextlib
import math
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg

from project.evaluation import figures, fonts
from project.evaluation.scores import ScoredPredictions
from project.metrics import positive_index
from project.training.callbacks import data_of, gather, point, tensorboard

HISTOGRAM_VALUES = 100_000  # of a layer, evenly spaced: all of AlexNet's 57 million take seconds
MOST_CLASSES = 50  # with curves of their own: the most frequent ones
MOST_CELLS = 1000**2  # of a confusion matrix
SAMPLES = 24  # images in the grid
SHARE = 0.01  # of a fit's time that drawing may take
EMBEDDED = 500  # images
COMPONENTS = 50  # of the features, the first principal ones
THUMBNAIL = 64  # pixels; 23 by 23 of them make an image of 1,472, and the PROJECTOR tab takes 8,192


class FirstBatchImages(Callback):
    """Shows the first training batch as the network sees it, and the network's graph."""

    done = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, *__: Any) -> None:
        writer, data = tensorboard(trainer), data_of(trainer)
        if self.done or writer is None or not len(batch.label):
            return
        self.done = True
        image = batch.image[:32]
        if image.ndim == 2:  # features of frozen layers
            image = data.dataset("train").__getitems__([(0, row) for row in batch.row[:32].tolist()]).image
        titles = [fonts.shortened(data.class_names[label], 12) for label in batch.label[:32].tolist()]
        grid = figures.image_grid(image.permute(0, 2, 3, 1).cpu().numpy(), titles)
        show(writer, "train/first_batch", grid, 0)
        if pl_module.compiled:  # cannot be traced
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace, which makes the graph, is deprecated
            with contextlib.suppress(RuntimeError):  # a network that cannot be traced has no graph
                writer.add_graph(pl_module.network, image[:1].to(pl_module.device))


class Histograms(Callback):
    """Shows the distribution of each layer's weights and gradients at the last step of each epoch."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        writer, network = tensorboard(trainer), pl_module.network
        if writer is None or not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        for name, weights in network.named_parameters():  # type: ignore[union-attr]
            for kind, tensor in (("weights", weights), ("gradients", weights.grad)):
                if tensor is not None:
                    spacing = math.ceil(tensor.numel() / HISTOGRAM_VALUES)
                    values = tensor.detach().flatten()[::spacing].float().cpu().numpy()
                    if np.isfinite(values).all():  # under 16-mixed single gradients may not be
                        writer.add_histogram(f"{kind}/{name}", values, point(trainer))


class HParams(Callback):
    """Adds the run's settings and its best metrics to the HPARAMS tab."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.best: dict[str, float] = {}  # the metrics of the validation with the lowest val/loss, and its epoch

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        now = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if now.get("val/loss", math.inf) < self.best.get("val/loss", math.inf):
            self.best = now | {"epoch": trainer.current_epoch + 1}

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.best:
                best = {f"val_best/{key.removeprefix('val/')}": value for key, value in self.best.items()}
                logger.log_hyperparams(self.settings, best, trainer.global_step - 1)  # the step of the last epoch


class ValidationPlots(Callback):
    """Shows each class's metrics, plots and sample images of a validation.

    Metrics of each class are logged at every validation, into TensorBoard alone, so that metrics.csv has the same
    columns for any number of classes. Plots are drawn for the last validation, and for those with a new lowest val/loss
    while all drawing takes less than `SHARE` of the time.
    """

    def on_train_start(self, *_: Any) -> None:
        self._start = time.monotonic()
        self._spent, self._takes = 0.0, 1.0  # seconds of all drawings, and of one; the latter is a guess at first
        self._lowest = math.inf
        self._undrawn: tuple[Any, ...] | None = None  # the newest validation, until it is drawn
        self._images: dict[int, npt.NDArray[np.uint8]] = {}

    def on_validation_start(self, *_: Any) -> None:
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def on_validation_batch_end(self, _: Any, __: Any, outputs: Any, batch: Any, *___: Any) -> None:
        self._batches.append((batch.row, batch.label, outputs))  # on their device: no accelerator is waited for

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        arrays, writer = gather_rows(trainer, self._batches), tensorboard(trainer)
        self._batches = []
        if writer is None or not arrays or not np.isfinite(arrays[2]).all():
            return
        true, probabilities = arrays[1:]
        tags = class_tags(true, data_of(trainer).class_names)
        for name, values in class_metrics(true, probabilities.argmax(axis=1), probabilities.shape[1]).items():
            for index, tag in tags.items():
                writer.add_scalar(f"val_class/{name}/{tag}", values[index], point(trainer))
        self._undrawn = point(trainer), *arrays
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        # time for one more drawing is kept in reserve, for the last validation
        if loss < self._lowest and self._spent + 2 * self._takes < SHARE * (time.monotonic() - self._start):
            self.on_train_end(trainer)
        self._lowest = min(self._lowest, loss)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if self._undrawn is not None:
            start = time.monotonic()
            self._draw(trainer, *self._undrawn)
            self._undrawn, self._takes = None, time.monotonic() - start
            self._spent += self._takes

    def _draw(self, trainer: Trainer, step: int, rows: Any, true: Any, probabilities: Any) -> None:
        writer, names = tensorboard(trainer), data_of(trainer).class_names
        positive = positive_index(names, trainer.lightning_module.hparams["positive"])
        scored = ScoredPredictions(true, probabilities, positive)
        if len(names) ** 2 <= MOST_CELLS:
            show(writer, "val/confusion_matrix", figures.confusion_matrix(scored.confusion(), names), step)
        show(writer, "val/roc", figures.roc(scored, names), step)
        show(writer, "val/precision_recall", figures.precision_recall(scored, names), step)
        show(writer, "val/reliability", figures.reliability(scored), step)
        for index, tag in class_tags(true, names).items():
            writer.add_pr_curve(f"val_class/{tag}", true == index, probabilities[:, index], step)
        self._draw_samples(trainer, step, rows, true, probabilities)

    def _draw_samples(self, trainer: Trainer, step: int, rows: Any, true: Any, probabilities: Any) -> None:
        """The same images each time, from every part of the validation split."""
        dataset, names = data_of(trainer).dataset("val"), data_of(trainer).class_names
        if not self._images:
            batch = dataset.__getitems__([(0, row) for row in evenly_spaced(len(dataset), SAMPLES)])
            self._images = dict(zip(batch.row.tolist(), batch.image.permute(0, 2, 3, 1).numpy(), strict=True))
        shown = [index for index, row in enumerate(rows.tolist()) if row in self._images]
        if not shown:
            return
        predicted, labels, titles = probabilities[shown].argmax(axis=1), true[shown], []
        for index, prediction, label in zip(shown, predicted, labels, strict=True):
            title = f"{fonts.shortened(names[prediction], 11)} {probabilities[index, prediction]:.0%}"
            titles.append(f"{title}\nnot {fonts.shortened(names[label], 12)}" if prediction != label else title)
        images = np.stack([self._images[int(rows[index])] for index in shown])
        grid = figures.image_grid(images, titles, wrong=(predicted != labels).tolist())
        show(tensorboard(trainer), "val/samples", grid, step)


class Embeddings(Callback):
    """Shows the input of the last layer for some validation images in the PROJECTOR tab.

    It is recorded during the last validation, so that no image goes through the network twice.
    """

    FOLDER = "projector"  # in the run; add_embedding names it after its step, and there is one for all fits of a run

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module
        self._batches: list[tuple[torch.Tensor, ...]] = []
        self._chosen = torch.zeros(len(data_of(trainer).dataset("val")), dtype=torch.bool, device=pl_module.device)
        self._chosen[evenly_spaced(len(self._chosen), EMBEDDED)] = True
        self._inputs = inputs = list[torch.Tensor]()
        self._hook = None if model.compiled else model.head.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))

    def on_validation_batch_end(self, _: Any, __: Any, outputs: Any, batch: Any, *___: Any) -> None:
        if self._inputs:
            chosen, features = self._chosen[batch.row], self._inputs.pop().float()
            features = features.flatten(2).mean(dim=2) if features.ndim > 2 else features  # before a convolution
            columns = batch.row, batch.label, outputs.argmax(dim=1), features
            self._batches.append(tuple(column[chosen] for column in columns))

    def on_validation_end(self, *_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        arrays, writer = gather_rows(trainer, getattr(self, "_batches", [])), tensorboard(trainer)
        if writer is None or not arrays:
            return
        data = data_of(trainer)
        batch = data.dataset("val").__getitems__([(0, row) for row in arrays[0].tolist()])
        readable = np.isin(arrays[0], batch.row.numpy())  # an image may have gone since the validation
        true, predicted, features = (array[readable] for array in arrays[1:])
        if len(features) < 3 or not np.isfinite(features).all():
            return
        names = [" ".join(name.split()) for name in data.class_names]
        labels = [[names[t], names[p], "yes" if t == p else "no"] for t, p in zip(true, predicted, strict=True)]
        small = torch.nn.functional.interpolate(batch.image.float(), min(THUMBNAIL, batch.image.shape[-1]), mode="area")
        points, header = principal_components(features, COMPONENTS), ["true", "predicted", "right"]
        shutil.rmtree(Path(writer.get_logdir(), self.FOLDER), ignore_errors=True)  # of a fit that this one resumes
        writer.add_embedding(points, labels, (small + 0.5) / 255, self.FOLDER, "validation", header)


def show(writer: Any, tag: str, figure: Any, step: int) -> None:
    """Draws a figure into the IMAGES tab."""
    canvas: Any = FigureCanvasAgg(figure)  # add_figure would import pyplot
    canvas.draw()
    writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")


def gather_rows(trainer: Trainer, batches: list[tuple[torch.Tensor, ...]]) -> list[npt.NDArray[Any]]:
    """The columns of batches of all ranks, sorted by the first one; an empty list where there are no rows."""
    parts = [[column.cpu().numpy() for column in batch] for batch in batches]
    parts = [part for rank in gather(trainer, parts) for part in rank]
    columns = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return [column[np.argsort(columns[0])] for column in columns if len(column)]


def class_tags(true: npt.NDArray[np.integer[Any]], class_names: Sequence[str]) -> dict[int, str]:
    """Unique tags, without slash or space, of the most frequent classes among true labels (N,)."""
    counts = np.bincount(true, minlength=len(class_names))
    frequent = np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist()
    tags = [re.sub(r"[^\w.-]+", "_", name) for name in class_names]
    unique = [tag if tags.count(tag) == 1 else f"{tag}_{index}" for index, tag in enumerate(tags)]
    return {index: unique[index] for index in sorted(frequent) if counts[index]}


def class_metrics(true: npt.NDArray[Any], predicted: npt.NDArray[Any], classes: int) -> dict[str, npt.NDArray[Any]]:
    """Recall, precision and F1 of each class, (classes,) each; 0 where undefined."""
    labels = true[true == predicted], true, predicted
    hits, positives, predictions = (np.bincount(array, minlength=classes) for array in labels)
    ratios = {"recall": (hits, positives), "precision": (hits, predictions), "f1": (2 * hits, positives + predictions)}
    return {name: part / np.maximum(whole, 1) for name, (part, whole) in ratios.items()}


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` indices from 0 to below `count`."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, most))]


def principal_components(features: npt.NDArray[np.floating[Any]], components: int) -> npt.NDArray[np.float64]:
    """Features (N, F) along their first principal components, (N, C) with C at most `components`."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)  # squares may overflow float32
    values, vectors = np.linalg.eigh(centred @ centred.T)  # N is small, F may be thousands
    first = np.argsort(-values)[: min(components, features.shape[1])]
    return np.asarray(vectors[:, first] * np.sqrt(np.maximum(values[first], 0)))
