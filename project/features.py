"""Transfer learning at the cost of its last layer: what frozen layers make of the pictures is computed once."""

import os
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from project.callbacks import data_of, duration


class FrozenFeatures(Callback):
    """Before a fit with --model.freeze backbone, replaces pictures by the frozen layers' output where it is the same.

    It is the same in every epoch if nothing augments the pictures, and it is enough if the head comes last.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs the frozen layers once over the training and the validation pictures, before any loader is made."""
        model: Any = pl_module  # the Classifier
        data = data_of(trainer)
        if model.transfer != "backbone":
            return
        changing = [f"--data.augment {data.augment}"] * (data.augment != "none") + ["--model.mix"] * bool(model.mix)
        if changing:
            model.print(
                f"frozen layers: run for every picture in every epoch, because {' and '.join(changing)} changes it; "
                "--data.augment none would compute them once"
            )
            return
        start = time.monotonic()
        rows = sum(len(data.dataset(split)) for split in ("train", "val"))
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 if hasattr(os, "sysconf") else 4e9
        model.eval().to(trainer.strategy.root_device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            picture = torch.zeros(2, 3, data.image_size, data.image_size, dtype=torch.uint8, device=model.device)
            inputs, logits = before(model.network, model.head, picture)
            need = rows * inputs[0].numel() * 4
            if inputs.ndim != 2 or not torch.allclose(model.head(inputs), logits, atol=1e-5):
                note = f"run in every epoch, because {model.name} computes on after its last layer"
            elif need > room:
                note = f"run in every epoch, because their output would take {need / 1e9:.1f} GB of memory"
            else:
                for split in ("train", "val"):
                    values, failed = self._of(data, split, model)
                    data.use_features(split, values, failed)
                took = duration(time.monotonic() - start)
                note = f"computed once for {rows:,} pictures ({took}); from here on only {model.head_name} is run"
        model.train()
        model.print(f"frozen layers: {note}")

    def _of(self, data: Any, split: str, model: Any) -> tuple[Tensor, dict[int, str]]:
        """The output (N, F) for a split's rows, and why a row has none."""
        values: Tensor | None = None
        failed: dict[int, str] = {}
        for batch in data.in_order(split):
            failed |= dict(batch.failed)
            if not len(batch.row):
                continue
            inputs, _ = before(model.network, model.head, batch.image.to(model.device))
            if values is None:
                values = torch.zeros(len(data.dataset(split)), inputs.shape[1], dtype=torch.float32)
            values[batch.row] = inputs.float().cpu()
        assert values is not None  # ImageData.setup has read a picture of each split
        return values, failed


def before(network: nn.Module, head: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the head, and the network's logits, for images (B, 3, H, W) uint8."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: Any) -> None:
        seen.append(inputs[0])

    handle = head.register_forward_pre_hook(look)
    try:
        logits: Tensor = network(image)
    finally:
        handle.remove()
    return seen[-1], logits
