"""Transfer learning at the cost of its last layer: the frozen layers run once, and the head is solved, not trained."""

import os
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from project.data.datamodule import ImageData
from project.data.dataset import Features
from project.training import linear_probe
from project.training.callbacks import data_of, duration


class FrozenFeatures(Callback):
    """Before a fit on given weights, solves a new head as a logistic regression on the output of the other layers.

    With --model.freeze backbone that is all: the output is the same in every epoch if nothing augments the images, and
    replaces them; one epoch measures the result. Otherwise the fit starts from that head (LP-FT, arXiv:2202.10054):
    a random one would first change the weights below it for the worse.
    """

    solution: linear_probe.Head | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Runs the network once over the training and the validation images, before any loader is made."""
        model, data = pl_module, data_of(trainer)
        is_frozen = model.transfer == "backbone"
        if not is_frozen and (model.transfer == "gradual" or not model.has_new_head):
            return
        changing = [f"--data.augment {data.augment}"] * (data.augment != "none")
        changing += ["--data.transforms"] * bool(data.transforms) + ["--model.mix"] * bool(model.mix)
        if is_frozen and changing:
            model.print(
                f"frozen layers: run for every image in every epoch, because {' and '.join(changing)} changes it; "
                "--data.augment none would compute them once"
            )
            return
        features: dict[str, Features] = {}
        start, rows = time.monotonic(), sum(len(data.dataset(split)) for split in ("train", "val"))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16e9
        model.eval().to(trainer.strategy.root_device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            image = torch.zeros(2, 3, data.image_size, data.image_size, dtype=torch.uint8, device=model.device)
            inputs, logits = features_and_logits(model, image)
            needed = rows * inputs[0].numel() * 4 * trainer.num_devices
            is_last = inputs.ndim == 2 and torch.allclose(model.head(inputs), logits, atol=1e-5)
            if is_frozen and model.hparams["loss"] != "cross_entropy":
                note = "trained, because the solution has the lowest cross-entropy, which is not --model.loss"
            elif not is_last or not isinstance(model.head, nn.Linear) or model.head.bias is None:
                note = f"trained, because {model.name} has operations after its last layer"
            elif needed > memory / 4:
                note = f"trained, because the output of the layers below would take {needed / 1e9:.1f} GB of memory"
            else:
                features = {split: _compute(model, data, split, inputs.shape[1]) for split in ("train", "val")}
                if not all(each.values.isfinite().all() for each in features.values()):
                    note, features = f"trained, because features are infinite in {trainer.precision}", {}
        if features:
            note = self._solve(model, data, **features)
        if features and is_frozen:
            data.use_features(features)
            model.solved = True
            note += "; one epoch measures it"
        model.train()
        model.print(f"head: {note} ({duration(time.monotonic() - start)})")

    def _solve(self, model: Any, data: ImageData, train: Features, val: Features) -> str:
        weights = None if data.balance == "none" else torch.tensor(data.balanced_weights(), dtype=torch.float32)
        options = (len(model.class_names), weights, model.hparams["label_smoothing"])
        self.solution = linear_probe.solve(train, val, *options)
        self._set_head(model)
        return (
            f"solved for the features of {len(train):,} images; of all penalties, {self.solution.penalty:.1g} has the "
            f"lowest loss on {len(val):,} validation images, {self.solution.loss:.4f}"
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The head of a checkpoint is that of another fit."""
        self._set_head(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Nothing changes in further epochs, but the first ones may be without validation."""
        is_measured = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        trainer.should_stop = trainer.should_stop or (pl_module.solved and is_measured)

    def _set_head(self, model: Any) -> None:
        if self.solution is not None:
            with torch.no_grad():
                model.head.weight.copy_(self.solution.weight)
                model.head.bias.copy_(self.solution.bias)


def _compute(model: Any, data: ImageData, split: str, size: int) -> Features:
    """The input of the head (N, size) for the images of a split."""
    output, failed = torch.zeros(len(data.dataset(split)), size, dtype=torch.float32), list[int]()
    for batch in data.in_order(split):
        for row, reason in batch.failed:
            failed.append(row)
            if model.transfer == "backbone":  # else the fit reads it, too
                model.print(f"left out, unreadable: {data.dataset(split).path(row)}: {reason}")
        if len(batch.row):
            output[batch.row] = features_and_logits(model, batch.image.to(model.device))[0].float().cpu()
    return Features(data.dataset(split), output, failed)


def features_and_logits(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """The input of a Classifier's head and its logits for images (B, 3, H, W) uint8."""
    inputs: list[Tensor] = []
    with model.head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        logits: Tensor = model.network(image)
    return inputs[-1], logits
