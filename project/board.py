"""What a fit shows in TensorBoard besides its curves; of its validations, see answers.py and projector.py."""

import contextlib
import math
import warnings
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg

from project import figures, lettering
from project.callbacks import data_of, point, tensorboard


class FirstBatch(Callback):
    """Draws the first training batch as the network sees it, and the network's graph, into TensorBoard."""

    done = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once in a fit."""
        writer = tensorboard(trainer)
        if self.done or writer is None or not len(batch.label):
            return
        self.done = True
        names = data_of(trainer).class_names
        pictures = batch.image[:32]
        if pictures.ndim == 2:  # frozen layers' output
            rows = batch.row[:32].tolist()
            pictures = data_of(trainer).dataset("train").__getitems__([(0, row) for row in rows]).image
        images = pictures.permute(0, 2, 3, 1).cpu().numpy()
        titles = [lettering.shortened(names[label], 12) for label in batch.label[:32].tolist()]
        show(writer, "train/first_batch", figures.image_grid(images, titles), 0)
        if pl_module.compiled:  # it cannot be traced
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph is made by torch.jit.trace, which says that it is deprecated
            with contextlib.suppress(RuntimeError):  # some networks cannot be traced; the graph is no reason to stop
                writer.add_graph(pl_module.network, pictures[:1].to(pl_module.device))


class Histograms(Callback):
    """Draws how weights and gradients are distributed, of each layer at the last step of each epoch."""

    MOST = 100_000  # values of a layer that are looked at, evenly spread: all of AlexNet's 57 million take seconds

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradients are there, after DDP's mean of them, and the weights that they are of."""
        writer = tensorboard(trainer)
        if writer is None or not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        model: Any = pl_module  # the Classifier
        for name, weights in model.network.named_parameters():
            for kind, values in (("weights", weights), ("gradients", weights.grad)):
                if values is not None:
                    some = values.detach().flatten()[:: math.ceil(values.numel() / self.MOST)].float().cpu().numpy()
                    if np.isfinite(some).all():  # under 16-mixed single gradients may not be
                        writer.add_histogram(f"{kind}/{name}", some, point(trainer))


class Figures(Callback):
    """Adds the run's settings and its best figures to TensorBoard's HPARAMS tab."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.best: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a fit that goes on has to know."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.best = dict(state_dict["best"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the figures of the validation with the lowest val/loss."""
        now = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if now.get("val/loss", float("inf")) < self.best.get("val/loss", float("inf")):
            self.best = now | {"epoch": trainer.current_epoch + 1}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes settings and figures together, as the HPARAMS tab wants them."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.best:
                best = {f"val_best/{key.removeprefix('val/')}": value for key, value in self.best.items()}
                logger.log_hyperparams(self.settings, best, trainer.global_step)


def show(writer: Any, tag: str, figure: Any, step: int) -> None:
    """Draws a figure into TensorBoard's IMAGES tab."""
    canvas: Any = FigureCanvasAgg(figure)  # add_figure would import pyplot
    canvas.draw()
    writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")
