"""The position of a fit between two steps, and how Lightning's loops are set to it.

When Lightning loads its counters it infers from their differences in which hook they were saved, and it restores
neither the loader's position nor the running sums of the epoch (tried with 2.6.6). So checkpoints are saved between two
steps only, with one set of counters. No other file knows the keys of Lightning's loop state.
"""

import time
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from project.training.callbacks import point

LOOP_STATE = "loop_state"  # the key in a checkpoint
# Keys of the fit loop's state in Lightning 2.6; a test compares them with a checkpoint of plain Lightning.
EPOCHS, BATCHES, VALIDATION = "epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
OPTIMIZER, IS_LAST_BATCH = "epoch_loop.automatic_optimization.optim_progress", "is_last_batch"
LOGGED_STEPS = ("epoch_loop.state_dict", "_batches_that_stepped")
COUNTERS = ("ready", "started", "processed", "completed")


class LoopState(NamedTuple):
    """The position of a fit between two steps."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    batches: int = 0  # batches of an epoch
    total: int = 0  # completed batches since the start of the fit
    step: int = 0  # of the next logged point: completed optimizer steps, before a validation one less
    validate: bool = False  # whether a validation comes next
    rows: int = 0  # of metrics.csv
    time: float = 0.0  # when the position was recorded, Unix time

    @classmethod
    def of(cls, trainer: Trainer, rows: int, validate: bool = False) -> "LoopState":
        """The position of a Trainer at the start of a batch, of a validation, or at the end of a fit."""
        batches, length = trainer.fit_loop.epoch_loop.batch_progress, int(trainer.num_training_batches)
        done = trainer.current_epoch, batches.current.completed, length, batches.total.completed, point(trainer)
        return cls(*done, validate, rows, time.time())

    @classmethod
    def saved_in(cls, checkpoint: dict[str, Any]) -> "LoopState | None":
        """The position that a checkpoint holds; None where another version or callback has saved it."""
        try:
            state = cls(**checkpoint[LOOP_STATE]["at"])
            return state if min(state) >= 0 else None
        except (KeyError, TypeError):
            return None

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Sets the counters of the fit loop in a checkpoint to this position."""
        loops = checkpoint["loops"]["fit_loop"]
        started = self.epoch + (self.batch > 0)
        epochs, batches, validation = loops[EPOCHS], loops[BATCHES], loops[VALIDATION]
        for scope in ("total", "current"):
            epochs[scope] |= {"ready": started, "started": started, "processed": self.epoch, "completed": self.epoch}
            batches[scope] |= dict.fromkeys(COUNTERS, self.total if scope == "total" else self.batch)
            # an interrupted validation is run again from its start
            validation[scope] |= dict.fromkeys(COUNTERS[:2], int(self.validate)) | dict.fromkeys(COUNTERS[2:], 0)
            for part in loops[OPTIMIZER]["optimizer"].values():
                part[scope] |= dict.fromkeys(part[scope], part[scope]["completed"])  # a failed step had started
        batches[IS_LAST_BATCH] = self.validate and self.batch == self.batches
        validation[IS_LAST_BATCH] = False
        part, key = LOGGED_STEPS
        loops[part][key] = self.step


def is_between_steps(trainer: Trainer) -> bool:
    """Whether a validation begins after an optimizer step, not while gradients are accumulated."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


def epochs_done(checkpoint: dict[str, Any]) -> int | None:
    """How many epochs a checkpoint has completed; None for one without the full training state."""
    if (state := LoopState.saved_in(checkpoint)) is not None:
        return state.epoch
    try:
        loops = checkpoint["optimizer_states"] and checkpoint["loops"]["fit_loop"]
        epochs, is_last = loops[EPOCHS]["total"], bool(loops[BATCHES][IS_LAST_BATCH])
        return int(epochs["processed"]) + (is_last and epochs["started"] > epochs["processed"])
    except (KeyError, TypeError):
        return None
