"""A moving average of the weights, validated and saved in their place."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


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
        """Puts the weights back where a validation was interrupted: a user's own callback may save them."""
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
    def swapped(self, pl_module: LightningModule, swapped: bool) -> Iterator[None]:
        """While the block runs, the module's weights are the averaged ones, or those of the last step."""
        before = self._swapped
        if before != swapped:
            self._swap_models(pl_module)
        try:
            yield
        finally:
            if before != swapped:
                self._swap_models(pl_module)


def swapped(trainer: Trainer, averaged: bool) -> AbstractContextManager[None]:
    """`Average.swapped` of a Trainer's average; nothing where it has none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Average):
            return callback.swapped(trainer.lightning_module, averaged)
    return nullcontext()
