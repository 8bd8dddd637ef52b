"""How a fit saves: best.ckpt and last.ckpt, written beside their place and put there whole; and how Ctrl-C ends it."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from project import files
from project.errors import FailedRun


class Average(WeightAveraging):
    """Exponential moving average of the weights, validated and saved in their place; the fit ends with it.

    Early on it forgets faster (as TensorFlow's ExponentialMovingAverage does with num_updates), so that a short fit
    does not end near its first weights.

    Args:
        decay: Share of the average that a step keeps.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._blend)
        self.decay = decay
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the module to its device and precision; the count of updates stays here, where it is read."""
        assert self._average_model is not None
        precision: Any = pl_module.dtype
        self._average_model.module.to(device=pl_module.device, dtype=precision)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the weights back before a checkpoint is saved, where a validation was interrupted."""
        if self._swapped:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _blend(self, average: Any, current: Any, _: Any) -> None:
        step = self._latest_update_step
        kept = min(self.decay, (1 + step) / (10 + step))
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - kept)
        else:  # counters of batch norm
            for mine, other in zip(average, current, strict=True):
                mine.copy_(other)

    @contextmanager
    def in_place(self, pl_module: LightningModule) -> Iterator[None]:
        """The averaged weights are the module's while the block runs."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)


class Best(ModelCheckpoint):
    """A name of its own, so that its state is not taken for that of a user's ModelCheckpoint."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Saves the weights that were validated: with an average these, which Lightning has put back by now."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        average = next((callback for callback in callbacks if isinstance(callback, Average)), None)
        with average.in_place(trainer.lightning_module) if average else nullcontext():
            super()._save_checkpoint(trainer, filepath)


class Last(ModelCheckpoint):
    """Likewise; a fit that has failed leaves the checkpoint from before."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves, unless the weights may be spoilt."""
        if not isinstance(exception, FailedRun):
            super().on_exception(trainer, pl_module, exception)


def checkpoints() -> list[Callback]:
    """best.ckpt, weights of the lowest val/loss, and last.ckpt, everything that a fit needs to go on.

    Two callbacks, because ModelCheckpoint's own save_last writes only when it has also saved a best one.
    """
    best = Best(filename="best", monitor="val/loss", save_weights_only=True, enable_version_counter=False)
    last = Last(filename="last", save_on_train_epoch_end=True, save_on_exception=True, enable_version_counter=False)
    return [best, last]


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints beside their target, and waits for the disk in a thread while the fit goes on.

    Lightning's own keeps a second copy in memory and, where the temporary folder is another file system, is not
    atomic. AlexNet with Adam is 685 MB: 0.6 s to write, 2.5 s more until the disk has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._settling: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns when the weights are safe to change; the file is in place some seconds later."""
        target = Path(path)
        unfinished = files.beside(target)
        try:
            torch.save(checkpoint, unfinished)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._settling.append(self._thread.submit(files.settle, unfinished, target))

    def remove_checkpoint(self, path: Any) -> None:
        """Waits until every checkpoint is in place: one that is removed must not come back."""
        self.teardown()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Waits until every checkpoint is in place."""
        while self._settling:
            self._settling.pop(0).result()


class Interruption(Callback):
    """The first Ctrl-C ends the fit after the batch in progress, the second one at once.

    Raised wherever the program stands, as Python does by default, the exception is now and then lost in a library.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C waits."""
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(130)
        self._asked = True

    def end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning saves and cleans up after this exception."""
        if self._asked:
            raise KeyboardInterrupt

    on_train_batch_end = on_validation_batch_end = end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As it was, if the fit has come to its end."""
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
