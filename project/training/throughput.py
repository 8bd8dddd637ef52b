"""Training throughput: images per second, and the share of time spent waiting for images."""

import copy
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from project.training.callbacks import data_of, log_scalars, point


class Throughput(Callback):
    """Measures each epoch, for all loggers but metrics.csv: nothing there depends on a clock."""

    waited = wait_share = 0.0  # seconds of this epoch between a batch and the next, and their share of the epoch
    _now = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waited, self._worked, self._images, self._now = 0.0, 0.0, 0, time.monotonic()

    on_train_start = on_train_epoch_start  # a fit resumed within an epoch has no on_train_epoch_start

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._now = self._now, time.monotonic()
        return self._now - before

    def on_train_batch_start(self, *_: Any) -> None:
        self.waited += self._lap()

    def on_train_batch_end(self, _: Any, __: Any, ___: Any, batch: Any, *____: Any) -> None:
        self._worked += self._lap()
        self._images += len(batch.row)

    def on_validation_end(self, *_: Any) -> None:
        self._lap()  # a validation within an epoch does not count as waiting

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        seconds = max(self.waited + self._worked, 1e-9)  # of an epoch that is resumed at its end, none
        share = self.wait_share = self.waited / seconds
        shown = {"speed/images_per_second": self._images * trainer.world_size / seconds, "speed/data_wait_share": share}
        log_scalars(trainer, shown, point(trainer) - 1)  # the step of the epoch's other metrics


class StepsInMemory(Callback):
    """After each epoch, times as many steps of a copy of the network from memory: the limit of a fit's speed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # median of a step, for each epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = copy.deepcopy(pl_module.network)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        data, steps = data_of(trainer), int(trainer.num_training_batches)
        self.seconds.append(seconds_per_step(network, optimizer, data.batch_size, data.image_size, steps))


def seconds_per_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: int, side: int, steps: int = 3
) -> float:
    """Median seconds of a training step on random images in memory, after one step that warms up."""
    device = next(network.parameters()).device
    image = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    image = image.to(memory_format=torch.channels_last)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        network(image).float().logsumexp(1).mean().backward()
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
