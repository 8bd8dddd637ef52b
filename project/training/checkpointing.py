"""What a fit saves and when: best.ckpt and last.ckpt, from which a resumed fit continues to the same bits."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project.errors import UserError
from project.training.callbacks import data_of, gather
from project.training.checkpoint_io import BEST, LAST, AsyncCheckpointIO
from project.training.ema import EMA
from project.training.loggers import MetricsFile
from project.training.loop_state import LOOP_STATE, LoopState, is_between_steps
from project.training.resume import Run
from project.training.signals import INTERRUPT, REQUEUE, Signals

MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}  # of the fused kernels


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, the weights with the best `monitor`; a class of its own, to keep its state apart from a user's."""

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(str(folder), Path(BEST).stem, monitor=monitor, mode=mode, enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last weights where there was no validation."""
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(str(self.dirpath), BEST))
            pl_module.print("There was no validation: best.ckpt holds the last weights.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["metadata"] = {"validated": bool(self.best_model_path)}  # Classifier adds the rest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best so far, also where the run has been moved: Lightning would forget its figure."""
        best = str(Path(str(self.dirpath), BEST)) if state_dict["best_model_path"] else ""
        paths = dict.fromkeys(("best_model_path", "kth_best_model_path"), best) | {"last_model_path": ""}
        models = {best: state_dict["best_model_score"]} if best else {}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": models})


class ResumeCheckpoint(Callback):
    """last.ckpt, with everything that a fit needs to continue; and the way a fit stops.

    Saved every `minutes`, when a signal stops the fit, and at its end. Comes before every other callback, so that a
    checkpoint holds their state between two steps. Where none are saved, `io` is None. `begin` is called on the first
    rank once the fit can begin, before it changes a file of a resumed run.
    """

    def __init__(self, io: AsyncCheckpointIO | None, run: Run, minutes: float, begin: Callable[[], None]) -> None:
        self._io, self._interval, self._begin = io, 60 * minutes, begin
        self._is_new = not run.resumed or run.source is None
        self._file = run.checkpoints / LAST if io else None
        self._signals = Signals()
        self._state: LoopState | None = None  # of the current weights; None where no checkpoint may be saved
        self._saving = False
        self._resumed: dict[str, Any] = {}
        self._start: float | None = None
        self._seconds = 0.0  # of training, before this fit was resumed
        self.restoring = True  # whether the fit has not begun: Lightning sets it up, and loads its checkpoint

    @property
    def seconds(self) -> float:
        """How long the run has been trained, interrupted fits included."""
        return self._seconds + (time.monotonic() - self._start if self._start is not None else 0.0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets loops and data to the checkpoint's position; with other data, to the start of its epoch."""
        self._resumed = resumed = checkpoint.get(LOOP_STATE, {})
        if self._is_new:  # has validations of its own, and the best of these
            for key in [key for key in checkpoint["callbacks"] if key.startswith(("BestCheckpoint", "HParams"))]:
                del checkpoint["callbacks"][key]
        for own in (own for own in trainer.callbacks if isinstance(own, ModelCheckpoint)):  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(own.state_key, {})
            if not isinstance(own, BestCheckpoint) and not _are_inside(state, Path(str(own.dirpath))):
                del checkpoint["callbacks"][own.state_key]
        if not resumed:
            return
        data, state, self._seconds = data_of(trainer), LoopState(**resumed["at"]), resumed["seconds"]
        if resumed["loader"] != data.batching:
            state = state._replace(batch=0, validate=False)
            resumed |= {"at": state._asdict(), "sums": []}
        state.put_into(checkpoint)
        data.start = state.epoch, state.batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the running sums of the epoch, and listens for signals."""
        module: Any = pl_module
        _require_usable_state(trainer)
        self._signals.listen(trainer)
        self._start = self._saved_at = time.monotonic()
        if self._resumed:
            state = LoopState(**self._resumed["at"])
            if (sums := self._resumed["sums"]) and trainer.is_global_zero:
                module.take_sums(sums)
            for key, value in self._resumed["metrics"].items():
                if not (self._is_new and key.startswith("val/")):
                    trainer.callback_metrics[key] = torch.tensor(value)
            if state.validate and state.batch == state.batches:
                module.log_epoch()  # no training step of this epoch is left to do so
        self.restoring = False
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two optimizer steps: saves by the clock, and stops if a signal has arrived."""
        self._state = None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._state = LoopState.of(trainer, _rows(trainer))
            due = self._io is not None and not self._io.busy and time.monotonic() - self._saved_at >= self._interval
            self._stop_or_save(trainer, due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._state = None
        if not trainer.sanity_checking and is_between_steps(trainer):
            self._state = LoopState.of(trainer, _rows(trainer), validate=True)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops if a signal has arrived; the resumed fit runs the whole validation."""
        if self._state is not None:
            self._stop_or_save(trainer, False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after all other callbacks have finished in `on_train_end`."""
        if self._start is None:  # there was nothing left to train
            self.restoring = False
            return
        self._state = LoopState.of(trainer, _rows(trainer))._replace(batch=0)
        self._save(trainer)

    def _stop_or_save(self, trainer: Trainer, due: bool) -> None:
        word = self._signals.all_reduce_max(2 * self._signals.requested + due)
        if word == 1:
            self._save(trainer)
        if requested := word // 2:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EMA):
                    callback.swap_back(trainer, trainer.lightning_module)
            if requested == REQUEUE:
                self._saving = True
                self._signals.requeue()
            else:
                self._save(trainer)
            trainer.strategy.barrier()
            raise KeyboardInterrupt if requested == INTERRUPT else SIGTERMException  # after which Lightning cleans up

    def _save(self, trainer: Trainer) -> None:
        if self._file is None:
            return
        for logger in trainer.loggers:
            logger.save()  # what was logged before this position must not be lost after it
        self._saving = True
        trainer.save_checkpoint(self._file)
        self._saving = False
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the position, and what Lightning does not save."""
        if not self._saving or self._state is None:  # a checkpoint of another callback
            return
        module: Any = pl_module
        self._state.put_into(checkpoint)
        checkpoint["epoch"] = self._state.epoch - (self._state.batch == 0)  # of the last step, as Lightning counts
        sums = gather(trainer, [(float(total), float(weight)) for total, weight in module.sums()])
        checkpoint[LOOP_STATE] = {
            "at": self._state._asdict(),
            "loader": data_of(trainer).batching,
            "sums": [tuple(map(sum, zip(*pairs, strict=True))) for pairs in zip(*sums, strict=True)],  # over the ranks
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "seconds": self.seconds,
        }


def _are_inside(state: dict[str, Any], folder: Path) -> bool:
    """Whether the files that a ModelCheckpoint replaces and deletes by its state are its own."""
    paths = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
    paths += state.get("best_k_models", {})
    return all(Path(path).parent == folder and Path(path).suffix == ".ckpt" for path in paths if path)


def _rows(trainer: Trainer) -> int:
    return next((logger.rows for logger in trainer.loggers if isinstance(logger, MetricsFile)), 0)


def _require_usable_state(trainer: Trainer) -> None:
    """Checks the shapes of the optimizer's state, as the kernels do not, and that the schedule covers the fit."""
    for parameter, state in (pair for optimizer in trainer.optimizers for pair in optimizer.state.items()):
        for name in MOMENTS & state.keys():
            if isinstance(state[name], torch.Tensor) and state[name].shape != parameter.shape:
                raise UserError(f"The checkpoint is damaged: {name} and its weights have different shapes.")
    for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
        if (end := getattr(scheduler, "total_steps", math.inf)) < trainer.estimated_stepping_batches:
            raise UserError(f"{type(scheduler).__name__} ends at step {end}, before the fit; give --trainer.max_steps.")
