"""Checkpoints: read one, and load its network, or a bundle's, as a `TorchPredictor`.

A checkpoint holds all that a verb needs after training: weights, class names, sizes and the run's configuration, as
tensors and plain types. Nothing is ever unpickled: `torch.load(weights_only=True)` refuses code.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from project import models, parts
from project.data.images import Pixels
from project.errors import UserError, command
from project.inference import bundle, calibration
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor
from project.models import weights

METADATA = "metadata"  # the key of a checkpoint under which Metadata's values are


def read(path: Path) -> tuple[dict[str, Any], Metadata]:
    """A checkpoint's content, whose tensors stay on disk until they are used, and metadata; UserError if not usable."""
    if path.is_dir():
        from project.inference import sharded  # takes 0.6 s to import

        content: Any = sharded.read(path)
    else:
        content = weights.read(path)
    refusal = f"{path} is not a checkpoint of this project"
    metadata = Metadata.parse(content.get(METADATA) if isinstance(content, dict) else None, refusal)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{refusal}: it has no weights by name.")
    return content, metadata


class TorchPredictor(Predictor):
    """A trained PyTorch `network`, (B, 3, H, W) uint8 to logits (B, K), in evaluation mode."""

    def __init__(self, network: nn.Module, metadata: Metadata) -> None:
        super().__init__(metadata)
        self.network = network

    def probabilities(self, image: Pixels) -> npt.NDArray[np.float32]:
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            logits: Tensor = self.network(torch.from_numpy(image).permute(0, 3, 1, 2).to(device))
            return np.asarray((logits.float() / self.metadata.temperature).softmax(dim=1).cpu().numpy())


def load(
    path: Path, is_bundle: bool, calibrated: bool, device: str | None, threads: int | None, trust: Collection[str] = ()
) -> TorchPredictor:
    """Loads a checkpoint, if `calibrated` with the temperature in the file beside it, or the network of a bundle.

    Raises UserError where the file names a network that is not in `trust` nor in a library: see parts.py.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if is_bundle:
        metadata = bundle.verify(path, bundle.WEIGHTS)
        state = dict(weights.from_file(path / bundle.WEIGHTS).tensors)
    else:
        content, metadata = read(path)
        fitted, max_logits = calibration.read(path)
        temperature = fitted if calibrated else 1.0
        if temperature is None:
            raise UserError(f"No temperature is known for {path}; {command('report', path)} finds it.")
        metadata = replace(metadata, temperature=temperature, calibrated=calibrated, max_logits=max_logits)
        entries = content["state_dict"].items()
        state = {name.removeprefix("network."): tensor for name, tensor in entries if name.startswith("network.")}
    parts.require_trusted(metadata.part, trust, path)
    pixels = metadata.mean, metadata.std
    network = models.build(metadata.model, len(metadata.class_names), *pixels, str(path), metadata.part)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network {metadata.model} that it names; it is damaged.") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # float: training in lower precision may have left weights in lower precision
    network = network.float().to(memory_format=torch.channels_last).to(device or accelerator or "cpu")
    return TorchPredictor(network.eval(), metadata)
