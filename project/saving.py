"""What a fit saves and when: best.ckpt, and last.ckpt, from which it goes on as if it had never stopped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project import average
from project.callbacks import data_of, gather
from project.errors import FailedRun, UserError
from project.logs import MetricsFile
from project.place import PLACE, Place
from project.stopping import REQUEUE, Ranks, Signals
from project.writer import CheckpointWriter

SHARE = 0.1  # of the time that saving may take


class Best(ModelCheckpoint):
    """best.ckpt, weights of the lowest val/loss; a class of its own, so that its state is not taken for a user's."""

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/loss", save_weights_only=True, enable_version_counter=False)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Saves the weights that were validated: with an average these, which Lightning has put back by now."""
        with average.swapped(trainer, averaged=True):
            super()._save_checkpoint(trainer, filepath)


class Last(Callback):
    """last.ckpt: everything that a fit needs to go on at a step as if it had never stopped; and how a fit stops.

    Saved before each epoch, within one every `minutes`, when a signal or an exception ends the fit, and at its end; put
    off while that would take more than a tenth of the time. Comes before every other callback.

    Args:
        minutes: How much time a killed process may lose.

    Attributes:
        file: Where it lies; None where nothing is to be saved.
        begun: Whether training has begun, with everything that a checkpoint gave.
    """

    def __init__(self, writer: CheckpointWriter, minutes: float) -> None:
        self.file: Path | None = None
        self._writer, self._minutes = writer, minutes
        self._signals = Signals()
        self._place: Place | None = None  # of the weights in hand; None while they are neither the old nor the new
        self._before = Place()  # the one before the step that is being made
        self._saved = Place()
        self._saving: Place | None = None
        self._resumed: dict[str, Any] = {}
        self.begun = False
        self._seconds = 0.0  # of training, in fits before this one

    @property
    def seconds(self) -> float:
        """How long the run has trained, over all its fits."""
        return self._seconds + (time.monotonic() - self._start if self.begun else 0.0)

    # going on

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prepares data and loops to go on at the checkpoint's place; with other data at the start of its epoch."""
        self._resumed = resumed = checkpoint.get(PLACE, {})
        if not resumed:
            return
        data, place, self._seconds = data_of(trainer), Place(**resumed["at"]), resumed["seconds"]
        if resumed["loader"] != data.layout:
            place = place._replace(batch=0, validate=False)
            resumed |= {"at": place._asdict(), "sums": []}
        place.put_into(checkpoint["loops"]["fit_loop"])
        data.start_from(place.epoch, place.batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up what the epoch has summed so far, and listens for signals."""
        module: Any = pl_module
        _require_fitting_moments(trainer.optimizers)
        self.begun = True
        self._signals.listen(trainer)
        self._ranks = Ranks(trainer)
        self._start = self._saved_at = time.monotonic()
        self._buffers = [(buffer, buffer.clone()) for buffer in module.network.buffers()]
        if self.file is not None and trainer.is_global_zero:
            self._writer.reserve(_size(module))
        if not self._resumed:
            return
        self._saved = place = Place(**self._resumed["at"])
        sums = self._resumed["sums"]
        if len(sums) == trainer.world_size:
            module.take_sums(sums[trainer.global_rank])
        elif sums and trainer.is_global_zero:  # other ranks than then: the first one has it all
            module.take_sums([tuple(map(sum, zip(*pairs, strict=True))) for pairs in zip(*sums, strict=True)])
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self._resumed["figures"].items()})
        if place.validate and place.batch == place.batches:
            module.log_epoch()  # no step will

    # passing places

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: saves where it is time, stops where that is asked for."""
        if self._resumed:
            Place(**self._resumed["at"]).take_up(trainer)
            self._resumed = {}
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._pass(trainer, pl_module)
            since = time.monotonic() - self._saved_at
            new = self._before.epoch > self._saved.epoch or since > 60 * self._minutes
            due = (
                new
                and self.file is not None
                and not self._writer.busy(self.file)
                and since * SHARE >= self._writer.took
            )
            self._stop_or_save(trainer, due)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """From here to the next place the weights are neither the old nor the new ones."""
        self._place = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between a step and a validation."""
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        whole = done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and whole:
            self._pass(trainer, pl_module, validate=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Stops where that is asked for; the fit will go on with the whole validation."""
        if self._place is not None:
            self._stop_or_save(trainer, False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks take the figures in: half done until the next place."""
        self._place = None

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end."""
        self._pass(trainer, pl_module)
        self._place = self._before = self._before._replace(batch=0)
        self._save(trainer, self._before)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the place before the step that failed, unless the weights may be spoilt or a rank is missing."""
        place = self._before if isinstance(exception, FailedRun) else self._place  # it is raised before the update
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)  # has saved
        if place in (None, self._saved) or stopped or self.file is None or trainer.world_size > 1:
            return
        with average.swapped(trainer, averaged=False):
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        if all(parameter.isfinite().all() for parameter in pl_module.parameters()):
            self._save(trainer, self._before)
            self._writer.wait()
            print(f"saved: {self.file}, {self._before.step} steps", flush=True)

    def _pass(self, trainer: Trainer, pl_module: LightningModule, validate: bool = False) -> None:
        module: Any = pl_module
        rows = next((logger.rows for logger in trainer.loggers if isinstance(logger, MetricsFile)), 0)
        self._place = self._before = Place.of(trainer, validate, rows)
        self._sums = module.sums()
        if self._buffers:
            buffers, kept = zip(*self._buffers, strict=True)
            torch._foreach_copy_(kept, buffers)

    def _stop_or_save(self, trainer: Trainer, due: bool) -> None:
        word = self._ranks.highest(2 * self._signals.asked + due)
        if asked := word // 2:
            if asked == REQUEUE:
                with self._of(trainer, self._before):
                    self._signals.requeue()
            else:
                self._save(trainer, self._before)
            self._writer.wait()
            trainer.strategy.barrier()
            self._signals.end(asked)
        if word:
            self._save(trainer, self._before)

    # the checkpoint

    def _save(self, trainer: Trainer, place: Place) -> None:
        if self.file is None or place == self._saved:
            return
        for logger in trainer.loggers:
            logger.save()  # what was logged before the place must not be lost after it
        with self._of(trainer, place):
            trainer.save_checkpoint(self.file)
        self._saved, self._saved_at = place, time.monotonic()

    @contextmanager
    def _of(self, trainer: Trainer, place: Place) -> Iterator[None]:
        """A checkpoint that is made meanwhile is of this place."""
        self._saving = place
        try:
            with average.swapped(trainer, averaged=False):
                yield
        finally:
            self._saving = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out."""
        if self._saving is None:  # a user's own
            return
        self._saving.put_into(checkpoint["loops"]["fit_loop"])
        checkpoint["epoch"] = self._saving.epoch - (self._saving.batch == 0)  # of the last step, as Lightning counts
        checkpoint[PLACE] = {
            "at": self._saving._asdict(),
            "loader": data_of(trainer).layout,
            "sums": gather(trainer, [(float(total), float(weight)) for total, weight in self._sums]),
            "figures": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "seconds": self.seconds,
        }


class End(Callback):
    """Saves the end of a fit after what other callbacks make of it: a run whose end is saved is whole.

    Args:
        last: What saves.
    """

    def __init__(self, last: Last) -> None:
        self._last = last

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves."""
        self._last.finish(trainer, pl_module)


def _require_fitting_moments(optimizers: list[Any]) -> None:
    """Checks what a checkpoint has put into optimisers, because their kernels do not."""
    for parameter, state in (pair for optimizer in optimizers for pair in optimizer.state.items()):
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise UserError(f"The checkpoint is damaged: {name} has another shape than its weights.")


def _size(module: Any) -> int:
    """Bytes of a checkpoint, about: the weights, and two moments of those that are trained."""
    return sum(p.numel() * p.itemsize * (3 if p.requires_grad else 1) for p in module.parameters())
