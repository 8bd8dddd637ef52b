"""Checkpoints: read one, and load it as a `Network`.

A checkpoint is all that a verb needs after training: weights, class names, sizes and the run's configuration, as
tensors and plain types. Nothing is ever unpickled: `torch.load(weights_only=True)` refuses code.
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from project import bundle, calibration, expected, models, runs
from project.data import images, workers
from project.errors import UserError
from project.models.weights import from_file
from project.models.weights import read as read_file
from project.predictor import Predictor

METADATA = "metadata"  # the key under which a checkpoint says what it is


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content; tensors stay on disk until they are used.

    Raises:
        UserError: It is damaged, holds code, or is not one of this project's.
    """
    content = read_file(path)
    metadata = content.get(METADATA) if isinstance(content, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} was not written by this project: it has no {METADATA}; give a best.ckpt of a run.")
    if fault := expected.fault(metadata):
        raise UserError(f"{path} is not a checkpoint of this project: {fault}.")
    weights = content.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a checkpoint of this project: it has no weights by name.")
    return dict(content)


class Network(Predictor):
    """A trained network of PyTorch, ready to be used.

    Attributes:
        network: (B, 3, H, W) uint8 to logits (B, K), in evaluation mode.
        temperature: What the logits are divided by.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any], temperature: float = 1.0) -> None:
        self.network, self.metadata, self.temperature = network, metadata, temperature
        self.class_names: list[str] = metadata["class_names"]
        self.image_size: int = metadata["image_size"]
        self.resize: images.Resize = metadata["resize"]

    def probabilities(self, image: images.Pixels) -> npt.NDArray[np.float32]:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            logits: Tensor = self.network(torch.from_numpy(image).permute(0, 3, 1, 2).to(device))
            found: npt.NDArray[np.float32] = (logits.float() / self.temperature).softmax(dim=1).cpu().numpy()
        return found


def load(
    path: str | os.PathLike[str] | None = None, calibrated: bool = False, device: str | torch.device | None = None
) -> Network:
    """Loads a trained network.

    Args:
        path: A checkpoint, a run's folder or a bundle; None means the newest run's best.ckpt.
        calibrated: Divide the logits by the temperature kept beside the checkpoint. A bundle has it built in, if it was
            known.
        device: Where it computes; by default the accelerator, where there is one.

    Raises:
        UserError: There is no such checkpoint, it cannot be used, or no temperature is kept beside it.
    """
    if path is not None and bundle.is_bundle(path):
        file = Path(path)
        metadata = bundle.verify(file, bundle.WEIGHTS)
        if calibrated:
            bundle.require_calibrated(file, metadata)
        temperature, weights = metadata["temperature"], dict(from_file(file / bundle.WEIGHTS).tensors)
    else:
        file = runs.find(path)
        content = read(file)
        metadata, prefix = content[METADATA], "network."
        temperature = calibration.require(file) if calibrated else 1.0
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    network = models.build(metadata["model"], len(metadata["class_names"]), metadata["mean"], metadata["std"])
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the network {metadata['model']} that it names; it is damaged.") from error
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # float: a fit of less precision may have left weights of less
    network = network.float().to(memory_format=torch.channels_last).to(device or "cpu")
    return Network(network.eval(), metadata, temperature)


def provenance() -> dict[str, Any]:
    """Versions of what computes, the machine, and the git commit of this code ("+": it was changed since)."""
    packages = ["torch", "torchvision", "lightning", "torchmetrics", "pillow", "numpy"]
    packages += ["timm"] if importlib.util.find_spec("timm") else []
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return {"versions": versions, "machine": _machine(), "git_commit": _git_commit()}


def _machine() -> str:
    parts = [platform.system(), platform.machine(), f"{workers.usable_cores()} cores"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        parts.append(f"{torch.accelerator.device_count()} x {kind}")
    return ", ".join(parts)


def _git_commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""  # not a git checkout, or no git
