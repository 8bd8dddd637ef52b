"""Checkpoints: read one, and load its network, or a bundle's, as a `TorchPredictor`.

A checkpoint holds all that a verb needs after training: weights, class names, sizes and the run's configuration, as
tensors and plain types. Nothing is ever unpickled: `torch.load(weights_only=True)` refuses code.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from project import models
from project.data.images import Pixels
from project.errors import UserError
from project.inference import bundle, calibration
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor
from project.models import weights

METADATA = "metadata"  # the key of a checkpoint under which Metadata's values are


def read(path: Path) -> tuple[dict[str, Any], Metadata]:
    """Reads a checkpoint's content and its metadata; tensors stay on disk until they are used.

    Raises:
        UserError: The file is damaged, holds code, or is not a checkpoint of this project.
    """
    content, refusal = weights.read(path), f"{path} is not a checkpoint of this project"
    metadata = Metadata.parse(content.get(METADATA) if isinstance(content, dict) else None, refusal)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{refusal}: it has no weights by name.")
    return content, metadata


class TorchPredictor(Predictor):
    """A trained PyTorch network.

    Attributes:
        network: (B, 3, H, W) uint8 to logits (B, K), in evaluation mode.
        temperature: Divisor of the logits.
    """

    def __init__(self, network: nn.Module, metadata: Metadata, temperature: float = 1.0) -> None:
        super().__init__(metadata)
        self.network, self.temperature = network, temperature

    def probabilities(self, image: Pixels) -> npt.NDArray[np.float32]:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            logits: Tensor = self.network(torch.from_numpy(image).permute(0, 3, 1, 2).to(device))
            result: npt.NDArray[np.float32] = (logits.float() / self.temperature).softmax(dim=1).cpu().numpy()
        return result


def load(file: Path, calibrated: bool = False, device: str | None = None) -> TorchPredictor:
    """Loads a checkpoint, if `calibrated` with the temperature in the file beside it; see the function in load.py."""
    content, metadata = read(file)
    temperature = calibration.read(file) if calibrated else 1.0
    if temperature is None:
        raise UserError(f"No temperature is known for {file}; python -m project.cli report {file} finds it.")
    entries = content["state_dict"].items()
    state = {name.removeprefix("network."): tensor for name, tensor in entries if name.startswith("network.")}
    return _restore(file, metadata, state, temperature, device)


def load_bundle(folder: Path, device: str | None = None) -> TorchPredictor:
    """Loads the PyTorch network of a bundle, at the bundle's temperature; otherwise like `load`."""
    metadata = bundle.verify(folder, bundle.WEIGHTS)
    state = dict(weights.from_file(folder / bundle.WEIGHTS).tensors)
    return _restore(folder, metadata, state, metadata.temperature, device)


def _restore(
    path: Path, metadata: Metadata, state: dict[str, Tensor], temperature: float, device: str | None
) -> TorchPredictor:
    network = models.build(metadata.model, len(metadata.class_names), metadata.mean, metadata.std)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network {metadata.model} that it names; it is damaged.") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # float: training in lower precision may have left weights in lower precision
    network = network.float().to(memory_format=torch.channels_last).to(device or accelerator or "cpu")
    return TorchPredictor(network.eval(), metadata, temperature)
