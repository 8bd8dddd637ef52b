"""Transfer learning at the cost of its last layer: the output of the frozen layers is computed once."""

import os
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from project.data.datamodule import ImageData
from project.training.callbacks import data_of, duration


class FrozenFeatures(Callback):
    """Before a fit with --model.freeze backbone, replaces images by the frozen layers' output where that is exact.

    The output is the same in every epoch if nothing augments the images, and sufficient if the head is the last layer.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Runs the frozen layers once over the training and the validation images, before any loader is made."""
        model, data = pl_module, data_of(trainer)
        if model.transfer != "backbone":
            return
        changing = [f"--data.augment {data.augment}"] * (data.augment != "none") + ["--model.mix"] * bool(model.mix)
        if changing:
            model.print(
                f"frozen layers: run for every image in every epoch, because {' and '.join(changing)} changes it; "
                "--data.augment none would compute them once"
            )
            return
        start, rows = time.monotonic(), sum(len(data.dataset(split)) for split in ("train", "val"))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16e9
        model.eval().to(trainer.strategy.root_device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            image = torch.zeros(2, 3, data.image_size, data.image_size, dtype=torch.uint8, device=model.device)
            features, logits = features_and_logits(model, image)
            needed = rows * features[0].numel() * 4
            if features.ndim != 2 or not torch.allclose(model.head(features), logits, atol=1e-5):
                note = f"run in every epoch, because {model.name} has operations after its last layer"
            elif needed > memory / 4:
                note = f"run in every epoch, because their output would take {needed / 1e9:.1f} GB of memory"
            else:
                for split in ("train", "val"):
                    _compute(model, data, split, features.shape[1])
                took = duration(time.monotonic() - start)
                note = f"computed once for {rows:,} images ({took}); from here on only {model.head_name} is run"
        model.train()
        model.print(f"frozen layers: {note}")


def _compute(model: Any, data: ImageData, split: str, size: int) -> None:
    """Makes a split's batches hold the frozen layers' output (N, size)."""
    output, failed = torch.zeros(len(data.dataset(split)), size), dict[int, str]()
    for batch in data.in_order(split):
        failed |= dict(batch.failed)
        if len(batch.row):
            output[batch.row] = features_and_logits(model, batch.image.to(model.device))[0].float().cpu()
    data.use_features(split, output, failed)


def features_and_logits(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """The input of a Classifier's head and its logits for images (B, 3, H, W) uint8."""
    inputs: list[Tensor] = []
    with model.head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        logits: Tensor = model.network(image)
    return inputs[-1], logits
