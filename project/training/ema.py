"""An exponential moving average of the weights, validated and saved in their place."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights; validations measure it, and checkpoints and the end of a fit hold it.

    The decay starts low and grows with the number of steps (as in TensorFlow's ExponentialMovingAverage with
    num_updates), so that a short fit does not end near its initial weights.
    """

    _swapped = False  # whether the module holds the averaged weights

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._update)
        self._decay = decay  # share of the average that a step keeps

    def _update(self, averages: Any, weights: Any, updates: Any) -> None:
        kept: Tensor = ((1 + updates) / (10 + updates)).clamp(max=self._decay)  # a tensor: nothing waits for the device
        for average, current in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(current, (1 - kept).to(average.dtype))
            else:  # counters of batch norm
                average.copy_(current)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves the module to its device and precision first: Lightning copies it while it is still on the CPU."""
        pl_module.to(trainer.strategy.root_device)
        trainer.precision_plugin.convert_module(pl_module)
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.swap_back(trainer, pl_module)  # a user's own callback may save the weights

    def swap_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the current weights back into the module where a validation is interrupted."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the weights alone until last.ckpt holds them, which `on_fit_end` of another callback saves."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
