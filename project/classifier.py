"""Classifier: the network with its loss, metrics and optimiser. Change the loss here, the optimiser in optim.py."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from project import models, optim
from project.batch import Batch
from project.metrics import Mean, metrics
from project.models import weights as sources
from project.models.normalize import BATCH_NORMS, Normalize

if TYPE_CHECKING:
    Share = float
else:
    Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)])

Mix = Literal["none", "mixup", "cutmix"]
Freeze = Literal["none", "backbone", "gradual"]
# alpha as in torchvision's reference training
MIXERS: dict[str, Callable[[int], Any]] = {
    "none": lambda _: None,
    "mixup": lambda classes: v2.MixUp(alpha=0.2, num_classes=classes),
    "cutmix": lambda classes: v2.CutMix(alpha=1.0, num_classes=classes),
}


class Classifier(LightningModule):
    """Trains a network to classify images, with cross-entropy and Adam.

    Args:
        class_names: K names, from the data.
        image_size: Side of the square images, in pixels, from the data.
        name: The network: alexnet, any of torchvision's classification networks, or timm/NAME.
        weights: What it starts from: none (random), DEFAULT or another name of published weights, or a file: a
            checkpoint of this project, a state dict, safetensors. If the classes differ, the head is re-initialised.
        freeze: Transfer learning: backbone trains the head alone; gradual starts with the head and unfreezes the
            layers below from the top downwards during the first half of the fit.
        optimizer: adam, adamw or sgd (with momentum 0.9).
        lr: Highest learning rate; by default 3e-4, for sgd 0.01.
        backbone_lr: Learning rate below the head, as a share of `lr`; by default 0.1 with weights, else 1.
        warmup: Share of the steps over which the learning rate rises, before it falls along a cosine.
        weight_decay: Pull of weights towards 0 at each step; biases and norms have none.
        label_smoothing: Share of the target that is spread over all classes, in training.
        positive: Of two classes, the one that precision, recall and F1 are about; by default the second.
        mix: Training images are blended (mixup, arXiv:1710.09412) or cut and pasted (cutmix, arXiv:1905.04899) in
            pairs, their labels likewise: none, mixup or cutmix.
        compile: Compile the network by torch.compile; if that fails, a message says so and the fit continues without.
        class_weights: Weight of each class in the training loss, from the data; None means the same.
    """

    def __init__(
        self,
        class_names: list[str],
        image_size: int,
        name: str = "alexnet",
        weights: str = "none",
        freeze: Freeze = "none",
        optimizer: optim.Rule = "adam",
        lr: PositiveFloat | None = None,
        backbone_lr: PositiveFloat | None = None,
        warmup: Share = 0.1,
        weight_decay: NonNegativeFloat = 0.0,
        label_smoothing: Share = 0.0,
        positive: str | None = None,
        mix: Mix = "none",
        compile: bool = False,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore="weights")  # when resuming, `weights` is the run's checkpoint
        measured = metrics(class_names, positive)
        self.name, self.class_names, self.image_size = name, class_names, image_size
        self.transfer, self.compiled, self.rule = freeze, compile, optimizer
        self.lr = float(lr or optim.RATES[optimizer])
        self.backbone_lr = float(backbone_lr or (1.0 if weights == "none" else 0.1))
        self.warmup, self.weight_decay, self.label_smoothing = map(float, (warmup, weight_decay, label_smoothing))
        # plain numbers: jsonargparse's types would be code in a checkpoint
        plain = {name: float(value) for name, value in self.hparams.items() if isinstance(value, float)}
        self.hparams.update(plain | {"backbone_lr": self.backbone_lr})
        network, self.weights_note = sources.start(name, class_names, weights)
        self.network = network.to(memory_format=torch.channels_last)
        models.require_size(self.network, name, image_size)
        self.head_name, head = models.head(self.network)
        if freeze == "backbone":
            self.network.requires_grad_(False).eval()
            head.requires_grad_(True)
        self.batch_norm = any(isinstance(m, BATCH_NORMS) for m in self.network.modules())
        self.mix = MIXERS[mix](len(class_names))
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", torch.tensor(class_weights) if class_weights else None, persistent=False)
        self.train_loss, self.val_loss, self.test_loss, self.train_accuracy = (Mean() for _ in range(4))
        self.val_metrics, self.test_metrics = measured.clone("val/"), measured.clone("test/")
        self.metadata: dict[str, Any] = {}  # further entries of a checkpoint's metadata; the command line fills it

    def forward(self, image: Tensor) -> Any:
        """Maps images (B, 3, H, W) uint8 to logits (B, K)."""
        return self.network(image)

    @property
    def head(self) -> nn.Module:
        """The layer that computes the logits."""
        return self.network.get_submodule(self.head_name)

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode; frozen layers stay in evaluation mode, without dropout and with their batch statistics."""
        super().train(mode)
        if self.transfer == "backbone":
            self.network.eval()
        return self

    def on_fit_start(self) -> None:
        """Compiles the network if --model.compile is set and it works here."""
        if not self.compiled:
            return
        trainer: Any = self.trainer
        shape = (max(2, trainer.datamodule.batch_size // trainer.world_size), 3, self.image_size, self.image_size)
        image = torch.zeros(shape, dtype=torch.uint8, device=self.device).to(memory_format=torch.channels_last)
        # A copy is compiled first, with its gradients: if that fails, the network itself is unchanged; if not, the
        # code is in the compiler's cache.
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
            self.print(f"--model.compile does not work here, continuing without: {reason}")
        else:
            self.network.compile()

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            optim.reset_rates(config.scheduler)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
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
        """Logs loss and accuracy of the training epoch at its end."""
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """Sum and count of loss and accuracy in the training epoch so far, on this rank."""
        return [(metric.total, metric.count) for metric in (self.train_loss, self.train_accuracy)]

    def take_sums(self, sums: Sequence[tuple[float, float]]) -> None:
        """Continues an epoch with the sums of a checkpoint."""
        for metric, (total, count) in zip((self.train_loss, self.train_accuracy), sums, strict=True):
            metric.update(torch.tensor(total, device=self.device), count)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Adds a batch to the validation metrics and returns its probabilities (B, K)."""
        return self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Adds a batch to the test metrics and returns its probabilities (B, K)."""
        return self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Batch, split: str, measured: MetricCollection) -> Tensor:
        _, logits = self._step(batch, split)
        probabilities = logits.float().softmax(dim=1)
        if len(batch.label):
            measured.update(probabilities, batch.label)
        self.log(f"{split}/loss", getattr(self, f"{split}_loss"))
        self.log_dict(measured)
        return probabilities

    def _step(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and logits (B, K) of a batch."""
        target = batch.label  # (B,), when mixed (B, K)
        too_few = self.batch_norm and self.network.training and len(target) < 2
        if too_few:  # one image, or none, has no batch statistics
            self.network.eval()
        if batch.image.ndim == 2:  # the output of the frozen layers, (B, F): see training/frozen_features.py
            logits: Tensor = self.head(batch.image)
        elif split == "train" and self.mix and len(target):
            image, target = self.mix(self.network[0](batch.image), target)  # after normalising: v2 refuses uint8
            logits = self.network[1](image)
        else:
            logits = self.network(batch.image)
        if too_few:
            self.network.train()
        if not len(target):  # no image could be read; the batch still takes part, so that no rank waits for another
            return logits.sum(), logits
        weight, smoothing = (self.class_weights, self.label_smoothing) if split == "train" else (None, 0.0)
        loss = functional.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=smoothing)
        mean: Mean = getattr(self, f"{split}_loss")
        mean.update(loss.detach(), len(target))
        if split == "train":
            self.train_accuracy.update(_right(logits.detach(), target), len(target))
        return loss / len(target), logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser and its schedule; see optim.py."""
        return optim.configure(
            self.network,
            self.head,
            rule=self.rule,
            lr=self.lr,
            backbone_lr=self.backbone_lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            freeze=self.transfer,
            total_steps=self.trainer.estimated_stepping_batches,
            fused=self.trainer.precision != "16-mixed",  # a fused Adam would unscale gradients after they are clipped
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips here because Lightning 2.6 refuses to with a fused optimiser, also under bf16-mixed."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the metadata that readers of the checkpoint need, as plain types."""
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
    """Share of the targets, (B,) or when mixed (B, K), that the likeliest classes have, summed over the batch."""
    likeliest = logits.argmax(dim=1)
    if target.ndim == 1:
        return (likeliest == target).float().sum()
    return target.gather(1, likeliest[:, None]).sum()
