"""Classifier: the network with its loss, metrics and optimiser. Change the loss or the optimiser here."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from project import models
from project.errors import UserError
from project.metrics import metrics
from project.models.normalize import Normalize

if TYPE_CHECKING:
    from project.data.dataset import Batch

Mix = Literal["none", "mixup", "cutmix"]
# alpha as in torchvision's reference training
MIXERS: dict[str, Callable[[int], Any]] = {
    "none": lambda _: None,
    "mixup": lambda classes: v2.MixUp(alpha=0.2, num_classes=classes),
    "cutmix": lambda classes: v2.CutMix(alpha=1.0, num_classes=classes),
}


class Classifier(LightningModule):
    """Trains a network to tell classes apart, with cross-entropy and Adam.

    Args:
        class_names: K names, from the data.
        image_size: Side of the square images, in pixels, from the data.
        name: The network: alexnet, or any of torchvision's classification networks.
        lr: Highest learning rate. Adam's usual 1e-3 is known to be too high for AlexNet, which has no batch norm.
        warmup: Share of the steps over which the learning rate rises, before it falls along a cosine.
        positive: Of two classes, the one that precision, recall and F1 are about; by default the second.
        mix: Training pictures are blended (mixup, arXiv:1710.09412) or cut and pasted (cutmix, arXiv:1905.04899) in
            pairs, their labels likewise: none, mixup or cutmix.
        class_weights: What each class weighs in the training loss, from the data; None means the same.
    """

    def __init__(
        self,
        class_names: list[str],
        image_size: int,
        name: str = "alexnet",
        lr: float = 3e-4,
        warmup: float = 0.1,
        positive: str | None = None,
        mix: Mix = "none",
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if lr <= 0 or not 0 <= warmup < 1:
            raise UserError(f"--model.lr must be above 0 and --model.warmup from 0 to below 1, not {lr} and {warmup}.")
        measured = metrics(class_names, positive)
        self.name, self.class_names, self.image_size = name, class_names, image_size
        self.lr, self.warmup = lr, warmup
        self.network = models.build(name, len(class_names)).to(memory_format=torch.channels_last)
        models.require_size(self.network, name, image_size)
        self.batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())
        self.mix = MIXERS[mix](len(class_names))
        weights = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.train_accuracy = MeanMetric()
        self.val_metrics, self.test_metrics = measured.clone("val/"), measured.clone("test/")
        self.class_weights: Tensor | None
        self.metadata: dict[str, Any] = {}  # what else a checkpoint should say; the command line fills it

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) uint8 to logits (B, K)."""
        logits: Tensor = self.network(image)
        return logits

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _ = self._step(batch, "train")
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: "Batch", batch_idx: int) -> None:
        """Adds a batch to the validation figures."""
        _, logits = self._step(batch, "val")
        if len(batch.label):
            self.val_metrics.update(logits.float().softmax(dim=1), batch.label)
        self.log_dict(self.val_metrics)

    def test_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """Adds a batch to the test figures and returns its probabilities (B, K)."""
        _, logits = self._step(batch, "test")
        probabilities = logits.float().softmax(dim=1)
        if len(batch.label):
            self.test_metrics.update(probabilities, batch.label)
        self.log_dict(self.test_metrics)
        return probabilities

    def _step(self, batch: "Batch", split: str) -> tuple[Tensor, Tensor]:
        too_few = self.batch_norm and self.training and len(batch.label) < 2
        if too_few:  # one picture, or none, has no batch statistics
            self.network.eval()
        image, target = self.network[0](batch.image), batch.label  # (B, 3, H, W) float, (B,)
        if split == "train" and self.mix and len(target):
            image, target = self.mix(image, target)  # after normalising: v2 refuses uint8; target is (B, K)
        logits = self.network[1](image)  # (B, K)
        if too_few:
            self.network.train()
        mean: MeanMetric = getattr(self, f"{split}_loss")
        if not len(target):  # none of them could be read; it still takes part, so that no rank waits for another
            loss = logits.sum()
        else:
            weight = self.class_weights if split == "train" else None
            loss = functional.cross_entropy(logits, target, weight, reduction="sum") / len(target)
            mean.update(loss.detach(), weight=len(target))
            if split == "train":
                self.train_accuracy.update(_right(logits.detach(), target))
        self.log(f"{split}/loss", mean, on_step=False, on_epoch=True)
        return loss, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its learning rate a function of the step."""
        # One kernel for all parameters: the step takes 43 ms instead of 504 at 57 M parameters on two cores. Under
        # 16-mixed it would take the gradients' scaling out only inside the step, after they have been clipped.
        optimizer = Adam(self.parameters(), lr=self.lr, fused=self.trainer.precision != "16-mixed")
        factor = partial(lr_factor, total=self.trainer.estimated_stepping_batches, warmup=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips here because Lightning refuses to with a fused optimiser under mixed precision."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a reader of the checkpoint needs, as plain types."""
        normalize = self.network[0]
        assert isinstance(normalize, Normalize)
        checkpoint["metadata"] = self.metadata | {
            "model": self.name,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": (normalize.mean.flatten() / 255).tolist(),
            "std": (normalize.std.flatten() / 255).tolist(),
            "metrics": {key: float(value) for key, value in self.trainer.callback_metrics.items()},
        }


def _right(logits: Tensor, target: Tensor) -> Tensor:
    """How much of each target the likeliest class has right: (B,) of 0 or 1; between them for mixed targets (B, K)."""
    likeliest = logits.argmax(dim=1)
    if target.ndim == 1:
        return (likeliest == target).float()
    return target.gather(1, likeliest[:, None])[:, 0]


def lr_factor(step: int, total: float, warmup: float) -> float:
    """The learning rate's share of its highest value: a linear rise, then half a cosine down to a hundredth.

    Args:
        step: Optimiser steps made so far.
        total: Optimiser steps of the whole fit; beyond it, and where it is infinite, the factor stays.
        warmup: Share of `total` that the rise takes; 100 steps where `total` is infinite.
    """
    rise = max(1.0, warmup * total) if math.isfinite(total) else 100.0
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, total - rise)) if math.isfinite(total) else 0.0
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
