"""Where a fit stands between two steps, and how Lightning's loops are made to go on there.

Lightning keeps its counters, but it loads them by guessing from their differences in which hook they were saved, loses
what was logged meanwhile, and leaves the loader, the running sums of the epoch and the random numbers to others
(tried in 2.6.6). So checkpoints are saved in one situation only, between two steps, and hold one set of counters.
"""

import time
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

PLACE = "place"  # the key under which a checkpoint says where its fit stood
COUNTERS = ("ready", "started", "processed", "completed")


class Place(NamedTuple):
    """Between two steps.

    Attributes:
        epoch: Epochs done.
        batch: Batches done of the next.
        batches: In an epoch.
        total: Batches done since the fit began.
        step: That the next logged point has: optimiser steps done.
        validate: A validation comes next; then `step` is that of the batch before, as its points have it.
        rows: Of metrics.csv that were there.
        time: When it was passed, in seconds since the epoch.
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
    def of(cls, trainer: Trainer, validate: bool = False, rows: int = 0) -> "Place":
        """Where a Trainer stands, at the start of a batch or of a validation."""
        loop: Any = trainer.fit_loop.epoch_loop
        done = loop.batch_progress
        return cls(
            trainer.current_epoch,
            done.current.completed,
            int(trainer.num_training_batches),
            done.total.completed,
            loop._batches_that_stepped,
            validate,
            rows,
            time.time(),
        )

    @classmethod
    def saved_in(cls, checkpoint: dict[str, Any]) -> "Place | None":
        """Where the fit of a checkpoint stood; None where it does not say.

        Raises:
            ValueError: What it says is no place.
        """
        if (saved := checkpoint.get(PLACE)) is None:
            return None
        try:
            place = cls(**saved["at"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no place: {saved}") from error
        counts = all(type(value) is int and value >= 0 for value in (*place[:5], place.rows))
        if not counts or type(place.validate) is not bool or type(place.time) is not float:
            raise ValueError(f"no place: {saved}")
        return place

    def put_into(self, loops: dict[str, Any]) -> None:
        """Sets the counters of a Trainer's saved fit loop to this place."""
        begun = self.epoch + (self.batch > 0)
        for scope in ("total", "current"):
            loops["epoch_progress"][scope] |= {"ready": begun, "started": begun}
            loops["epoch_progress"][scope] |= {"processed": self.epoch, "completed": self.epoch}
            batches = self.total if scope == "total" else self.batch
            loops["epoch_loop.batch_progress"][scope] |= dict.fromkeys(COUNTERS, batches)
            # a validation that was started and not ended is run again, from its start
            validation = dict.fromkeys(COUNTERS[:2], int(self.validate)) | dict.fromkeys(COUNTERS[2:], 0)
            loops["epoch_loop.val_loop.batch_progress"][scope] |= validation
            for part in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
                part[scope] |= dict.fromkeys(part[scope], part[scope]["completed"])  # a step that failed was begun
        loops["epoch_loop.batch_progress"]["is_last_batch"] = self.validate and self.batch == self.batches
        loops["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self.step

    def take_up(self, trainer: Trainer) -> None:
        """Checks, at the start of the first batch, that Lightning stands here, and gives points their step.

        After a validation that came first, it stands a point further, or an epoch.
        """
        now = Place.of(trainer)
        assert now.total == self.total, f"Lightning goes on after {now.total} batches, not after {self.total}"
        if not self.validate:
            assert (now.epoch, now.batch) == (self.epoch, self.batch)
            loop: Any = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped = self.step
