"""Classifier: the network with its loss, metrics and optimiser. Change the loss or the optimiser here."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from project import models
from project.errors import UserError
from project.metrics import Mean, metrics
from project.models import weights as sources
from project.models.normalize import Normalize

if TYPE_CHECKING:
    from project.data.dataset import Batch

Mix = Literal["none", "mixup", "cutmix"]
Freeze = Literal["none", "backbone", "gradual"]
Rule = Literal["adam", "adamw", "sgd"]
# the highest learning rate unless told. Adam's usual 1e-3 is known to be too high for AlexNet, which has no batch norm;
# 0.01 is the one of torchvision's reference recipe for it
RATES: dict[Rule, float] = {"adam": 3e-4, "adamw": 3e-4, "sgd": 0.01}
STAGES = 4  # into which `gradual` cuts what is below the head
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
        name: The network: alexnet, any of torchvision's classification networks, or timm/NAME.
        weights: What it starts from: none (random), DEFAULT or another name of published weights, or a file: a
            checkpoint of this project, a state dict, safetensors. Of other classes' weights the head is left out.
        freeze: Transfer learning: backbone trains the head alone; gradual starts with the head, and what is below joins
            from the top downwards during the first half of the fit.
        optimizer: adam, adamw or sgd (with momentum 0.9).
        lr: Highest learning rate; by default 3e-4, for sgd 0.01.
        backbone_lr: Learning rate below the head, as a share of `lr`; by default 0.1 with weights, else 1.
        warmup: Share of the steps over which the learning rate rises, before it falls along a cosine.
        weight_decay: Pull of weights towards 0 at each step; biases and norms have none.
        label_smoothing: Share of the target that is spread over all classes, in training.
        positive: Of two classes, the one that precision, recall and F1 are about; by default the second.
        mix: Training pictures are blended (mixup, arXiv:1710.09412) or cut and pasted (cutmix, arXiv:1905.04899) in
            pairs, their labels likewise: none, mixup or cutmix.
        compile: Compile the network by torch.compile; where that does not work here, it says so and goes on without.
        class_weights: What each class weighs in the training loss, from the data; None means the same.
    """

    def __init__(
        self,
        class_names: list[str],
        image_size: int,
        name: str = "alexnet",
        weights: str = "none",
        freeze: Freeze = "none",
        optimizer: Rule = "adam",
        lr: float | None = None,
        backbone_lr: float | None = None,
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        positive: str | None = None,
        mix: Mix = "none",
        compile: bool = False,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore="weights")  # in a fit that goes on they are a checkpoint's
        for option, value, right, range_ in (
            ("lr", lr, lr is None or lr > 0, "above 0"),
            ("backbone_lr", backbone_lr, backbone_lr is None or backbone_lr > 0, "above 0"),
            ("warmup", warmup, 0 <= warmup < 1, "from 0 to below 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "from 0 to below 1"),
        ):
            if not right:
                raise UserError(f"--model.{option} is {value}; it must be {range_}.")
        measured = metrics(class_names, positive)
        self.name, self.class_names, self.image_size = name, class_names, image_size
        self.rule, self.lr, self.warmup = optimizer, lr if lr is not None else RATES[optimizer], warmup
        self.backbone_lr = backbone_lr if backbone_lr is not None else 1.0 if weights == "none" else 0.1
        self.hparams["backbone_lr"] = self.backbone_lr
        self.weight_decay, self.label_smoothing = weight_decay, label_smoothing
        network, self.weights_note = sources.start(name, class_names, weights)
        self.network = network.to(memory_format=torch.channels_last)
        models.require_size(self.network, name, image_size)
        self.head_name, head = models.head(self.network)
        self.transfer, self.compiled = freeze, compile
        if freeze == "backbone":
            self.network.requires_grad_(False).eval()
            head.requires_grad_(True)
        self.batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())
        self.mix = MIXERS[mix](len(class_names))
        weighed = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("class_weights", weighed, persistent=False)
        self.train_loss, self.val_loss, self.test_loss, self.train_accuracy = (Mean() for _ in range(4))
        self.val_metrics, self.test_metrics = measured.clone("val/"), measured.clone("test/")
        self.class_weights: Tensor | None
        self.metadata: dict[str, Any] = {}  # what else a checkpoint should say; the command line fills it

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) uint8 to logits (B, K)."""
        logits: Tensor = self.network(image)
        return logits

    @property
    def head(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.network.get_submodule(self.head_name)

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode; frozen layers stay in evaluation mode, without dropout and with their batch statistics."""
        super().train(mode)
        if self.transfer == "backbone":
            self.network.eval()
        return self

    def on_fit_start(self) -> None:
        """Compiles the network, where that is wished and possible."""
        if not self.compiled:
            return
        trainer: Any = self.trainer
        rows = max(2, trainer.datamodule.batch_size // trainer.world_size)
        image = torch.zeros(rows, 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.device)
        image = image.to(memory_format=torch.channels_last)
        # a copy is tried first, with its gradients: where its code cannot be built, the network itself is as it was;
        # what could be built is in the compiler's cache
        trial = copy.deepcopy(self.network)
        try:
            trial.compile()
            with trainer.precision_plugin.forward_context():
                loss = trial(image).sum()
            loss.backward()
            with trainer.precision_plugin.forward_context(), torch.inference_mode():
                trial.eval()(image)
        except Exception as error:  # compilers and their drivers fail in many ways
            reason = str(error).strip().splitlines()[0]
            self.print(f"--model.compile does not work here, going on without: {reason}")
        else:
            self.network.compile()

    def on_train_start(self) -> None:
        """The rate of the next step is that of this schedule, also where a fit goes on that had fewer epochs."""
        for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(schedule, LambdaLR):  # not that of tune
                groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
                for group, base, factor in groups:
                    group["lr"] = base * factor(schedule.last_epoch)

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _ = self._step(batch, "train")
        self.log_epoch()
        trainer: Any = self.trainer
        if trainer.world_size > 1:  # DDP takes the mean of the ranks, whose shares of the batch may differ
            share = (len(batch.row) + len(batch.failed)) / trainer.datamodule.batch_size
            loss = loss * (share * trainer.world_size)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def log_epoch(self) -> None:
        """Has the figures of the training epoch logged at its end."""
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """What the training epoch's figures have summed so far, on this rank."""
        return [metric.sums for metric in (self.train_loss, self.train_accuracy)]

    def take_sums(self, sums: Sequence[tuple[float, float]]) -> None:
        """Goes on from them."""
        for metric, pair in zip((self.train_loss, self.train_accuracy), sums, strict=True):
            metric.sums = pair

    def validation_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """Adds a batch to the validation figures and returns its probabilities (B, K)."""
        return self._measure(batch, "val", self.val_metrics)

    def test_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """Adds a batch to the test figures and returns its probabilities (B, K)."""
        return self._measure(batch, "test", self.test_metrics)

    def _measure(self, batch: "Batch", split: str, measured: MetricCollection) -> Tensor:
        _, logits = self._step(batch, split)
        probabilities = logits.float().softmax(dim=1)
        if len(batch.label):
            measured.update(probabilities, batch.label)
        self.log(f"{split}/loss", getattr(self, f"{split}_loss"))
        self.log_dict(measured)
        return probabilities

    def _step(self, batch: "Batch", split: str) -> tuple[Tensor, Tensor]:
        target = batch.label  # (B,), when mixed (B, K)
        too_few = self.batch_norm and self.network.training and len(target) < 2
        if too_few:  # one picture, or none, has no batch statistics
            self.network.eval()
        if batch.image.ndim == 2:  # what the frozen layers make of the pictures, (B, F): see features.py
            logits: Tensor = self.head(batch.image)
        elif split == "train" and self.mix and len(target):
            image, target = self.mix(self.network[0](batch.image), target)  # after normalising: v2 refuses uint8
            logits = self.network[1](image)
        else:
            logits = self.network(batch.image)  # (B, K)
        if too_few:
            self.network.train()
        mean: Mean = getattr(self, f"{split}_loss")
        if not len(target):  # none of them could be read; it still takes part, so that no rank waits for another
            loss = logits.sum()
        else:
            weight, smoothing = (self.class_weights, self.label_smoothing) if split == "train" else (None, 0.0)
            loss = functional.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=smoothing)
            loss = loss / len(target)
            mean.update(loss.detach(), weight=len(target))
            if split == "train":
                self.train_accuracy.update(_right(logits.detach(), target))
        return loss, logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, AdamW or SGD; each group's learning rate is a function of the step alone."""
        # One kernel for all parameters: the step takes 43 ms instead of 504 at 57 M parameters on two cores. Under
        # 16-mixed it would take the gradients' scaling out only inside the step, after they have been clipped.
        fused = self.trainer.precision != "16-mixed"
        total = self.trainer.estimated_stepping_batches
        groups: list[dict[str, Any]] = []
        factors: list[Callable[[int], float]] = []
        for stage, parameters in self._stages():
            rate = self.lr * (self.backbone_lr if stage else 1)
            joins = stage / STAGES / 2 if self.transfer == "gradual" else 0.0
            without = [p for p in parameters if p.ndim <= 1] if self.weight_decay else []  # biases and norms
            decayed = [p for p in parameters if p.ndim > 1] if self.weight_decay else parameters
            for name, decay, members in (("", self.weight_decay, decayed), (", no decay", 0.0, without)):
                if members:
                    place = f"below {stage}" if stage else "head"
                    groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": f"{place}{name}"})
                    factors.append(partial(lr_factor, total=total, warmup=self.warmup, joins=joins))
        if len(groups) == 1:
            del groups[0]["name"]
        optimizer = make_optimizer(self.rule, groups, fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def _stages(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """The trained parameters, the head's as stage 0, then those below it; 1 is the uppermost of `STAGES`."""
        if self.transfer == "none" and self.backbone_lr == 1:
            yield 0, list(self.network.parameters())
            return
        of_head = list(self.head.parameters())
        below = [p for p in self.network.parameters() if p.requires_grad and not any(p is other for other in of_head)]
        yield 0, of_head
        if self.transfer != "gradual":
            yield 1, below
            return
        for stage in range(STAGES):
            start, end = (len(below) * part // STAGES for part in (stage, stage + 1))
            yield STAGES - stage, below[start:end]

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


def make_optimizer(rule: Rule, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
    """The optimiser of a name, for groups that say their own learning rate and weight decay."""
    if rule == "sgd":
        return SGD(groups, momentum=0.9, fused=fused)
    return (Adam if rule == "adam" else AdamW)(groups, fused=fused)


def lr_factor(step: int, total: float, warmup: float, joins: float = 0.0) -> float:
    """The learning rate's share of its highest value: a linear rise, then half a cosine down to a hundredth.

    Args:
        step: Optimiser steps made so far.
        total: Optimiser steps of the whole fit; beyond it, and where it is infinite, the factor stays.
        warmup: Share of `total` that the rise takes; 100 steps where `total` is infinite.
        joins: Share of `total` (or of 1,000 steps) before which it is 0.
    """
    if step < joins * (total if math.isfinite(total) else 1000):
        return 0.0
    rise = max(1.0, warmup * total) if math.isfinite(total) else 100.0
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, total - rise)) if math.isfinite(total) else 0.0
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
