"""Classifier: the network with its loss, metrics and optimiser. A loss is in losses.py, an optimiser in optim.py."""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from project import losses, models, optim, parts
from project.batch import Batch, as_batch
from project.errors import UserError
from project.inference import metadata
from project.metrics import Mean, MetricFactory
from project.metrics import metrics as measures
from project.models import weights as sources
from project.models.normalize import BATCH_NORMS

if TYPE_CHECKING:
    Network = str | dict[str, Any]
    Loss = Network
    Optimizer = Network
    LRScheduler = Network
    Factory = Network
else:  # for the command line's parser, which gives a class path and its arguments
    Network, Loss, Factory = nn.Module, nn.Module, MetricFactory
    Optimizer, LRScheduler = torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler


class Classifier(LightningModule):
    """Trains a network to classify images, by default with cross-entropy and Adam.

    Args:
        class_names: K names, from the data.
        image_size: Side of the square images, in pixels, from the data.
        name: The network: alexnet, any of torchvision's classification networks, or timm/NAME.
        network: Instead of `name`, the class path of a network that takes num_classes, with its other arguments.
        weights: What it starts from: none (random), DEFAULT or another name of published weights, or a file: a
            checkpoint of this project, a state dict, safetensors. If the classes differ, the head is re-initialised.
        freeze: Transfer learning: backbone trains the head alone, at the lr of no weights; gradual starts with the head
            and unfreezes the layers below from the top downwards during the first half of the fit.
        freeze_bn: Batch norm keeps the mean and variance of the weights; by default where the head is new above given
            weights, whose other layers expect them: those of a few small batches can differ by far.
        loss: cross_entropy; focal (gamma 2); bce, each class against the rest; or the class path of a module that makes
            one number, or one an image, of logits (B, K) and labels (B,); --data.balance and --model.label_smoothing
            set its weight and label_smoothing. Probabilities stay the softmax.
        optimizer: adam, adamw, sgd (with momentum 0.9), or the class path of another, which gets lr and weight_decay.
        lr: Peak learning rate; by default 3e-4, with a new head above weights 1e-3, for sgd 0.01, of a class its own.
        backbone_lr: Learning rate below the head, as a share of `lr`; by default 1, with weights 0.3 below a new head
            and else 0.1.
        layer_decay: Factor of the learning rate from each layer below the head to the next lower one, e.g. 0.75.
        scheduler: cosine, step (to a tenth after each third), one-cycle (arXiv:1708.07120), plateau (to a tenth after 4
            validations without a lower val/loss), constant, or the class path of an LRScheduler, which goes on after
            each epoch, or after each step if it takes total_steps.
        warmup: Share of steps in which the rate rises; by default 0.1 for cosine and step, 0.3 for one-cycle, else 0.
        weight_decay: Pull of weights towards 0 at each step; biases and norms have none.
        label_smoothing: Share of the target that is spread over all classes, in training; by default 0, with a new
            head above weights 0.1.
        positive: Of two classes, the one that precision, recall and F1 are about; by default the second.
        metrics: Class paths of further metrics, such as torchmetrics.CohenKappa with task: multiclass; they are given
            num_classes and validate_args: false, and their name is cohen_kappa.
        mix: Training images are blended (mixup, arXiv:1710.09412) or cut and pasted (cutmix, arXiv:1905.04899) in
            pairs, their labels likewise: none, mixup or cutmix.
        compile: Compile the network by torch.compile; if that fails, a message says so and the fit continues without.
        class_weights: Weight of each class in the training loss, from the data; None means the same.
    """

    peaks: Sequence[float] = ()  # highest learning rate of each parameter group
    run_metadata: dict[str, Any] | None = None  # the run's options and provenance, where a verb trains
    watched = optim.WATCHED

    def __init__(
        self,
        class_names: list[str],
        image_size: int,
        name: str = "alexnet",
        network: Network | None = None,
        weights: str = "none",
        freeze: Literal["none", "backbone", "gradual"] = "none",
        freeze_bn: bool | None = None,
        loss: losses.Name | Loss = "cross_entropy",
        optimizer: optim.Rule | Optimizer = "adam",
        lr: PositiveFloat | None = None,
        backbone_lr: PositiveFloat | None = None,
        layer_decay: ClosedUnitInterval = 1.0,
        scheduler: optim.Shape | LRScheduler = "cosine",
        warmup: ClosedUnitInterval | None = None,
        weight_decay: NonNegativeFloat = 0.0,
        label_smoothing: ClosedUnitInterval | None = None,
        positive: str | None = None,
        metrics: list[Factory] | None = None,
        mix: Literal["none", "mixup", "cutmix"] = "none",
        compile: bool = False,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore="weights")  # when resuming, `weights` is the run's checkpoint
        # plain numbers: jsonargparse's types would be code in a checkpoint
        self.hparams.update({key: float(value) for key, value in self.hparams.items() if isinstance(value, float)})
        measured = measures(class_names, positive, metrics or ())
        if network is not None:
            if name != "alexnet":
                raise UserError(f"--model.name {name} and --model.network are two networks; leave one out.")
            self.hparams["network"] = network = parts.part(network)
            name = network["class_path"]
        self.name, self.class_names, self.image_size = name, class_names, image_size
        self.transfer, self.compiled = freeze, compile
        self.solved = False  # the head is the solution of a logistic regression: nothing is left to train
        built, self.weights_note, self.has_new_head = sources.start(name, class_names, weights, network)
        self.fine_tunes = self.has_new_head and freeze != "backbone"
        self.hparams["optimizer"] = optimizer if str(optimizer) in optim.RULES else parts.part(optimizer)
        for option, value in optim.defaults(self.hparams, weights, self.fine_tunes).items():
            given = self.hparams[option]
            self.hparams[option] = value if given is None else float(given)
        self.network = built.to(memory_format=torch.channels_last)
        models.require_size(self.network, name, image_size, len(class_names))
        self.head_name = models.head(self.network)[0]
        if freeze != "none" and not self.head_name:
            raise UserError(f"--model.freeze {freeze} needs a last layer, Linear or Conv2d, which {name} has not.")
        if freeze == "backbone":
            self.network.requires_grad_(False).eval()
            self.head.requires_grad_(True)
        self.hparams["freeze_bn"] = self.has_new_head if freeze_bn is None else freeze_bn
        self.batch_norm = any(isinstance(m, BATCH_NORMS) for m in self.network.modules())
        classes = len(class_names)
        mixers = {"mixup": v2.MixUp(alpha=0.2, num_classes=classes), "cutmix": v2.CutMix(num_classes=classes)}
        self.mix = mixers.get(mix)  # with alpha as in torchvision's reference training
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", torch.tensor(class_weights) if class_weights else None, persistent=False)
        if str(loss) not in losses.LOSSES:
            self.hparams["loss"] = loss = parts.part(loss)
            if label_smoothing is None and not parts.taken(loss, "model.loss", {"label_smoothing": 0}):
                self.hparams["label_smoothing"] = 0.0
        smoothing = self.hparams["label_smoothing"]
        self.loss = losses.LOSSES.get(str(loss)) or losses.Loss(loss, classes, self.class_weights, smoothing, mix)
        self.train_loss, self.val_loss, self.test_loss, self.train_accuracy = (Mean() for _ in range(4))
        self.val_metrics, self.test_metrics = measured.clone("val/"), measured.clone("test/")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, trust: Collection[str] = (), **options: Any) -> Any:
        """As Lightning's; refuses class paths in the checkpoint that are neither well-known nor in `trust`."""
        content: Any = sources.read(Path(checkpoint_path))
        parts.require_trusted_hyperparameters(content, "model", trust, checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **options | {"weights_only": True})

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
        self.network.train(mode and self.transfer != "backbone")
        for layer in self.network.modules():
            if isinstance(layer, BATCH_NORMS) and self.hparams["freeze_bn"]:
                layer.eval()
        return self

    def on_fit_start(self) -> None:
        """Compiles the network if --model.compile is set and it works here."""
        if not self.compiled:
            return
        trainer: Any = self.trainer
        images = getattr(trainer.datamodule, "batch_size", 2) // trainer.world_size
        shape = (max(2, images), 3, self.image_size, self.image_size)
        image = torch.zeros(shape, dtype=torch.uint8, device=self.device).to(memory_format=torch.channels_last)
        trial = copy.deepcopy(self.network)  # a failure leaves the network as it is; otherwise the code is cached
        trial.compile()
        try:
            with trainer.precision_plugin.forward_context():
                loss = trial(image).sum()
            loss.backward()
        except Exception as error:  # compilers and their drivers fail in many ways
            reason = str(error).strip().splitlines()[0]
            self.print(f"--model.compile does not work here, continuing without: {reason}")
        else:
            self.network.compile()

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            optim.reset_rates(config.scheduler, self.peaks)

    def on_train_batch_start(self, *_: Any) -> None:
        optim.set_mode(self.trainer.optimizers, "train")

    def on_validation_start(self) -> None:
        optim.set_mode(self.trainer.optimizers, "eval")

    on_train_epoch_end = on_validation_start

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            optim.step_plateau(self.trainer.lr_scheduler_configs, self.trainer.callback_metrics)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _ = self._step(as_batch(batch), "train")
        self.log_epoch()
        trainer: Any = self.trainer
        if trainer.world_size > 1 and trainer.datamodule and isinstance(batch, Batch):
            # DDP takes the mean of the ranks, whose shares of the batch may differ
            share = (len(batch.row) + len(batch.failed)) / trainer.datamodule.batch_size
            loss = loss * (share * trainer.world_size)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    def log_epoch(self) -> None:
        """Logs loss and accuracy of the training epoch at its end."""
        means = {"train/loss": self.train_loss, "train/accuracy": self.train_accuracy}
        self.log_dict(means, on_step=False, on_epoch=True)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """Sum and count of loss and accuracy in the training epoch so far, on this rank."""
        return [(metric.total, metric.count) for metric in (self.train_loss, self.train_accuracy)]

    def take_sums(self, sums: Sequence[tuple[float, float]]) -> None:
        """Continues an epoch with the sums of a checkpoint."""
        for metric, (total, count) in zip((self.train_loss, self.train_accuracy), sums, strict=True):
            metric.update(torch.tensor(total, device=self.device), count)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Adds a batch to the validation metrics and returns its probabilities (B, K)."""
        return self._evaluate(as_batch(batch), "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Adds a batch to the test metrics and returns its probabilities (B, K)."""
        return self._evaluate(as_batch(batch), "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities (B, K) of the images that could be read."""
        logits: Tensor = self.network(as_batch(batch).image)
        return logits.float().softmax(dim=1)

    def _evaluate(self, batch: Batch, split: str) -> Tensor:
        _, logits = self._step(batch, split)
        probabilities = logits.float().softmax(dim=1)
        measured: MetricCollection = getattr(self, f"{split}_metrics")
        if len(batch.label):
            measured.update(probabilities, batch.label)
        elif self.trainer.world_size > 1:  # a rank's list without any tensor could not be gathered
            for metric in measured.values():
                if any(isinstance(state, list) for state in metric.metric_state.values()):
                    metric.update(probabilities, batch.label)
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
            self.train()
        if not len(target):  # no image could be read; the batch still takes part, so that no rank waits for another
            return logits.sum(), logits
        weight, smoothing = (self.class_weights, self.hparams["label_smoothing"]) if split == "train" else (None, 0.0)
        loss = self.loss(logits, target, weight, smoothing)
        mean: Mean = getattr(self, f"{split}_loss")
        mean.update(loss.detach(), len(target))
        if split == "train":
            likeliest = logits.detach().argmax(dim=1)  # a mixed image is right in part
            right = likeliest == target if target.ndim == 1 else target.gather(1, likeliest[:, None])
            self.train_accuracy.update(right.sum(), len(target))
        return loss / len(target), logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser and its schedule; see optim.py."""
        fused = self.trainer.precision != "16-mixed"  # a fused Adam would unscale gradients after they are clipped
        steps = self.trainer.estimated_stepping_batches
        options = {**self.hparams, "watched": self.watched} | ({"lr": 0.0} if self.solved else {})
        made = optim.configure(self.network, self.head, options, total_steps=steps, fused=fused)
        self.peaks = [group["initial_lr"] for group in made["optimizer"].param_groups]
        return made

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips here because Lightning 2.6 refuses to with a fused optimiser, also under bf16-mixed."""
        clip: Any = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        if gradient_clip_val:
            clip(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the metadata that readers of the checkpoint need, as plain types."""
        normalize: Any = self.network[0]
        added = checkpoint.get("metadata", {})  # by callbacks
        checkpoint["metadata"] = added | (self.run_metadata or metadata.of_plain_fit(self.trainer, self.hparams))
        checkpoint["metadata"] |= {
            "model": self.name,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": (normalize.mean.flatten() / 255).tolist(),
            "std": (normalize.std.flatten() / 255).tolist(),
            "metrics": {key: float(value) for key, value in self.trainer.callback_metrics.items()},
        }
