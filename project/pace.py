"""How fast a fit goes, and how much of its time it waits for pictures."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks import point, tensorboard


class Pace(Callback):
    """Measures every epoch of training and shows it in TensorBoard.

    There alone: metrics.csv holds nothing that a clock says, so that it is the same wherever a fit was interrupted.

    Attributes:
        waited: Seconds of this epoch from a batch's end to the next one's start.
        worked: Seconds of it from a batch's start to its end.
    """

    def __init__(self) -> None:
        self.waited = self.worked = 0.0
        self._pictures = 0

    def state_dict(self) -> dict[str, Any]:
        """What a fit that goes on within an epoch has to know."""
        return {"seconds": [self.waited, self.worked], "pictures": self._pictures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.waited, self.worked = state_dict["seconds"]
        self._pictures = state_dict["pictures"]

    @property
    def share(self) -> float:
        """How much of this epoch was spent waiting."""
        return self.waited / max(self.waited + self.worked, 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock; a fit that goes on within an epoch has no start of it."""
        self._ended = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self._ended = time.monotonic()
        self.waited = self.worked = 0.0
        self._pictures = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stops the waiting clock."""
        self._started = time.monotonic()
        self.waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts it."""
        self._ended = time.monotonic()
        self.worked += self._ended - self._started
        self._pictures += len(batch.row)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation within an epoch is no waiting."""
        self._ended = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows it, at the step of the epoch's other figures."""
        if writer := tensorboard(trainer):
            rate = self._pictures * trainer.world_size / max(self.waited + self.worked, 1e-9)
            writer.add_scalar("speed/pictures_per_second", rate, point(trainer) - 1)
            writer.add_scalar("speed/waiting_for_pictures", self.share, point(trainer) - 1)
