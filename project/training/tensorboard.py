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
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from project.evaluation import figures
from project.evaluation.fonts import shortened
from project.evaluation.scores import ScoredPredictions
from project.metrics import positive_index
from project.training.callbacks import data_of, gather, log_figure, log_scalars, point, tensorboard
from project.training.loggers import MetricsFile
from project.training.resume import flat_options

Columns = list[npt.NDArray[Any]]
HISTOGRAM_VALUES = 100_000  # of a layer, evenly spaced: all of AlexNet's 57 million take seconds
MOST_CLASSES = 50  # with curves of their own: the most frequent ones
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
        # read again, because with frozen layers a batch may hold their output
        image = data.dataset("train").__getitems__([(0, row) for row in batch.row[:32].tolist()]).image
        titles = [shortened(data.class_names[label], 12) for label in batch.label[:32].tolist()]
        grid = figures.image_grid(image.permute(0, 2, 3, 1).numpy(), titles)
        log_figure(trainer, "train/first_batch", grid, 0)
        # torch.jit.trace, which makes the graph, is deprecated, and cannot trace every network, nor a compiled one
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(RuntimeError):
            if not pl_module.compiled:
                writer.add_graph(pl_module.network, image[:1].to(pl_module.device))
        pl_module.train()  # add_graph leaves every layer in training mode, frozen ones too


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
    """Logs the run's options and its best metrics; TensorBoard's HPARAMS tab has the main options alone."""

    def __init__(self, options: dict[str, Any], monitor: str = "val/loss", mode: str = "min") -> None:
        self._options, self.monitor, self._sign = options, monitor, 1 if mode == "min" else -1
        self.best: dict[str, float] = {}  # the metrics of the validation with the best `monitor`, and its epoch

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        options = flat_options(self._options)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, MLFlowLogger):  # keeps the first values, as max_epochs of a run that is resumed
                old = logger.experiment.get_run(str(logger.run_id)).data.params
                logger.log_hyperparams({name: str(value) for name, value in options.items() if name not in old})
            elif not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(options)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        now = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        new, old = (self._sign * each.get(self.monitor, self._sign * math.inf) for each in (now, self.best))
        if new < old:
            self.best = now | {"epoch": trainer.current_epoch + 1}

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        data = data_of(trainer)
        settings = {"seed_everything": data.seed, "max_epochs": trainer.max_epochs}
        settings |= {name: getattr(data, name) for name in ("batch_size", "image_size", "resize", "augment")}
        settings |= {f"model/{key}": value for key, value in self._options["model"].items() if value is not None}
        best = {f"val_best/{key.removeprefix('val/')}": value for key, value in self.best.items()}
        for logger in trainer.loggers if best else []:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings, best, trainer.global_step - 1)  # the step of the last epoch
            elif not isinstance(logger, MetricsFile):
                logger.log_metrics(best, trainer.global_step - 1)


class ValidationPlots(Callback):
    """Shows each class's metrics, plots and sample images of a validation.

    Metrics of each class are logged at every validation, but not to metrics.csv, whose columns are the same for any
    number of classes. Plots are drawn for the last validation, and for earlier ones while all drawing takes less than
    `SHARE` of the time.
    """

    def on_train_start(self, *_: Any) -> None:
        self._start = time.monotonic()
        self._spent = 1.0  # seconds of all drawings, with a guess at that of the last validation
        self._undrawn: tuple[int, npt.NDArray[Any], ScoredPredictions] | None = None  # step, rows and predictions

    def on_validation_start(self, *_: Any) -> None:
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def on_validation_batch_end(self, _: Any, __: Any, outputs: Any, batch: Any, *___: Any) -> None:
        self._batches.append((batch.row, batch.label, outputs))  # on their device: no accelerator is waited for

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        columns, writer = gather_columns(trainer, self._batches), tensorboard(trainer)
        if trainer.sanity_checking or writer is None or not columns or not np.isfinite(columns[2]).all():
            return
        (rows, true, probabilities), names = columns, data_of(trainer).class_names
        scored = ScoredPredictions(true, probabilities, positive_index(names, pl_module.hparams["positive"]))
        scores, tags = scored.per_class(), class_tags(true, names)
        for name in ("recall", "precision", "f1"):
            points = {f"val_class/{name}/{tag}": scores[name][index] for index, tag in tags.items()}
            log_scalars(trainer, points, point(trainer))
        self._undrawn = point(trainer), rows, scored
        if 2 * self._spent < SHARE * (time.monotonic() - self._start):  # this one may take as long as all before it
            self.on_train_end(trainer)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if self._undrawn is not None:
            start = time.monotonic()
            _draw(trainer, *self._undrawn)
            self._spent += time.monotonic() - start
            self._undrawn = None


class Embeddings(Callback):
    """Shows the input of the last layer for some images, recorded during the last validation, in the PROJECTOR tab."""

    FOLDER = "projector"  # in the run; add_embedding names it after its step, and there is one for all fits of a run
    _batches: Sequence[tuple[torch.Tensor, ...]] = ()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module
        self._batches, self._inputs = [], inputs = [], list[torch.Tensor]()
        self._hook = None if model.compiled else model.head.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))

    def on_validation_batch_end(self, trainer: Trainer, _: Any, outputs: Any, batch: Any, *__: Any) -> None:
        if self._inputs:
            features = self._inputs.pop().float()
            features = features.flatten(2).mean(dim=2) if features.ndim > 2 else features  # before a convolution
            chosen = batch.row % math.ceil(len(data_of(trainer).dataset("val")) / EMBEDDED) == 0
            columns = batch.row, batch.label, outputs.argmax(dim=1), features
            self._batches = [*self._batches, tuple(column[chosen] for column in columns)]

    def on_validation_end(self, *_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        columns, writer = gather_columns(trainer, self._batches), tensorboard(trainer)
        if writer is None or not columns:
            return
        image, (true, predicted, features) = readable(trainer, columns)
        if len(features) < 3 or not np.isfinite(features).all():
            return
        names = [" ".join(name.split()) for name in data_of(trainer).class_names]
        labels = [[names[t], names[p], "yes" if t == p else "no"] for t, p in zip(true, predicted, strict=True)]
        small = torch.nn.functional.interpolate(image.float(), min(THUMBNAIL, image.shape[-1]), mode="area")
        points, header = principal_components(features, COMPONENTS), ["true", "predicted", "right"]
        shutil.rmtree(Path(writer.get_logdir(), self.FOLDER), ignore_errors=True)  # of a fit that this one resumes
        writer.add_embedding(points, labels, (small + 0.5) / 255, self.FOLDER, "validation", header)


def gather_columns(trainer: Trainer, batches: Sequence[tuple[torch.Tensor, ...]]) -> Columns:
    """The columns of batches of all ranks, sorted by the first one; an empty list where there are no rows."""
    parts = [[column.cpu().numpy() for column in batch] for batch in batches]
    parts = [part for rank in gather(trainer, parts) for part in rank]
    columns = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return [column[np.argsort(columns[0])] for column in columns if len(column)]


def readable(trainer: Trainer, columns: Columns) -> tuple[torch.Tensor, Columns]:
    """Validation images (B, 3, H, W) uint8 of those rows in the first column that can be read, with their columns."""
    batch = data_of(trainer).dataset("val").__getitems__([(0, row) for row in columns[0].tolist()])
    kept = np.isin(columns[0], batch.row.numpy())
    return batch.image, [column[kept] for column in columns[1:]]


def class_tags(true: npt.NDArray[np.integer[Any]], class_names: Sequence[str]) -> dict[int, str]:
    """Unique tags, without slash or space, of the most frequent classes among true labels (N,)."""
    counts = np.bincount(true, minlength=len(class_names))
    frequent = np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist()
    tags = [re.sub(r"[^\w.-]+", "_", name) for name in class_names]
    unique = [tag if tags.count(tag) == 1 else f"{tag}_{index}" for index, tag in enumerate(tags)]
    return {index: unique[index] for index in sorted(frequent) if counts[index]}


def principal_components(features: npt.NDArray[np.floating[Any]], components: int) -> npt.NDArray[np.float64]:
    """Features (N, F) along their first principal components, (N, C) with C at most `components`."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)  # squares may overflow float32
    values, vectors = np.linalg.eigh(centred @ centred.T)  # ascending; N is small, F may be thousands
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :components])


def _draw(trainer: Trainer, step: int, rows: npt.NDArray[Any], scored: ScoredPredictions) -> None:
    """Plots of a validation, and the same images each time, from every part of its split."""
    writer, names = tensorboard(trainer), data_of(trainer).class_names
    log_figure(trainer, "val/confusion_matrix", figures.confusion_matrix(scored.confusion(), names), step)
    log_figure(trainer, "val/roc", figures.roc(scored, names), step)
    log_figure(trainer, "val/precision_recall", figures.precision_recall(scored, names), step)
    log_figure(trainer, "val/reliability", figures.reliability(scored), step)
    for index, tag in class_tags(scored.true, names).items():
        writer.add_pr_curve(f"val_class/{tag}", scored.true == index, scored.probabilities[:, index], step)
    spaced = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLES)).astype(int)
    image, (true, probabilities) = readable(trainer, [c[spaced] for c in (rows, scored.true, scored.probabilities)])
    titles, predicted = [], probabilities.argmax(axis=1)
    for label, prediction, row in zip(true, predicted, probabilities, strict=True):
        title = f"{shortened(names[prediction], 11)} {row[prediction]:.0%}"
        titles.append(f"{title}\nnot {shortened(names[label], 12)}" if prediction != label else title)
    grid = figures.image_grid(image.permute(0, 2, 3, 1).numpy(), titles, wrong=(predicted != true).tolist())
    log_figure(trainer, "val/samples", grid, step)
