"""The position of a fit between two steps, and how Lightning's loops are set to it.

Lightning saves its loops' counters, but when it loads them it infers from their differences in which hook they were
saved, and it restores neither the loader's position nor the running sums of the epoch (tried with 2.6.6). Therefore
checkpoints are saved in one situation only, between two steps, with one set of counters. This is the only file that
knows the keys of Lightning's loop state.
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
    """The position of a fit between two steps.

    Attributes:
        epoch: Completed epochs.
        batch: Completed batches of the current epoch.
        batches: Batches of an epoch.
        total: Completed batches since the start of the fit.
        step: Step of the next logged point: completed optimizer steps, before a validation one less.
        validate: A validation comes next.
        rows: Rows of metrics.csv.
        time: When the position was recorded, in seconds since the epoch (Unix time).
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    total: int = 0
    step: int = 0
    validate: bool = False
    rows: int = 0
    time: float = 0.0

    @classmethod
    def of(cls, trainer: Trainer, rows: int, validate: bool = False) -> "LoopState":
        """The position of a Trainer at the start of a batch, of a validation, or at the end of a fit."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return cls(
            trainer.current_epoch,
            progress.current.completed,
            int(trainer.num_training_batches),
            progress.total.completed,
            point(trainer),
            validate,
            rows,
            time.time(),
        )

    @classmethod
    def saved_in(cls, checkpoint: dict[str, Any]) -> "LoopState | None":
        """The position that a checkpoint holds; None for a checkpoint of another origin.

        Raises:
            ValueError: The entry is damaged.
        """
        if (saved := checkpoint.get(LOOP_STATE)) is None:
            return None
        try:
            state = cls(**saved["at"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a loop state: {saved}") from error
        counts = all(type(value) is int and value >= 0 for value in (*state[:5], state.rows))
        if not counts or type(state.validate) is not bool or type(state.time) is not float:
            raise ValueError(f"not a loop state: {saved}")
        return state

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


def epochs_done(checkpoint: dict[str, Any]) -> int:
    """How many epochs a checkpoint with the full training state has completed.

    Raises:
        ValueError: Its position is damaged.
    """
    if (state := LoopState.saved_in(checkpoint)) is not None:
        return state.epoch
    try:
        loops = checkpoint["loops"]["fit_loop"]
        epochs, is_last = loops[EPOCHS]["total"], bool(loops[BATCHES][IS_LAST_BATCH])
        return int(epochs["processed"]) + (is_last and epochs["started"] > epochs["processed"])
    except (KeyError, TypeError) as error:
        raise ValueError("no loop state of Lightning") from error
