"""Checkpoints: read one, and load it as a Predictor.

A checkpoint is all that a verb needs after training: weights, class names, sizes and the run's configuration, as
tensors and plain types. Nothing is ever unpickled: `torch.load(weights_only=True)` refuses code.
"""

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from project import models, runs
from project.data import images
from project.data.dataset import ImageDataset, loader
from project.data.sampler import BatchSampler
from project.errors import UserError
from project.models.weights import read as read_file
from project.predictions import Prediction

METADATA = "metadata"  # the key under which a checkpoint says what it is
LARGEST = 16_384  # side of a picture, in pixels: a foreign file must not decide how much memory is taken


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(n, float) and math.isfinite(n) for n in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(n, str) for n in value)


def _sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), dict) for name in ("data", "model", "trainer"))


# what a checkpoint must say of itself: a test, and the words for it
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a name"),
    "class_names": (lambda value: _names(value) and len(set(value)) == len(value), "a list of different names"),
    "image_size": (lambda value: type(value) is int and 0 < value <= LARGEST, f"a number of pixels up to {LARGEST}"),
    "resize": (lambda value: value in get_args(images.Resize), f"one of {', '.join(get_args(images.Resize))}"),
    "mean": (_numbers, "three numbers"),
    "std": (lambda value: _numbers(value) and all(n > 0 for n in value), "three numbers above 0"),
    "config": (_sections, "a configuration"),
}


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content; tensors stay on disk until they are used.

    Raises:
        UserError: It is damaged, holds code, or is not one of this project's.
    """
    content = read_file(path)
    metadata = content.get(METADATA) if isinstance(content, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} was not written by this project: it has no {METADATA}; give a best.ckpt of a run.")
    for key, (is_right, expected) in EXPECTED.items():
        if not is_right(metadata.get(key)):
            raise UserError(f"{path} is not a checkpoint of this project: its {key} is not {expected}.")
    weights = content.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a checkpoint of this project: it has no weights by name.")
    return dict(content)


@dataclass(frozen=True)
class Predictor:
    """A trained classifier, ready to be used.

    Attributes:
        network: (B, 3, H, W) uint8 to logits (B, K), in evaluation mode.
        class_names: K names.
        image_size: Side of the square images, in pixels.
        resize: How a picture becomes square; see `images.read`.
        metadata: Everything else the checkpoint says of itself: configuration, figures, versions, git commit.
    """

    network: nn.Module
    class_names: list[str]
    image_size: int
    resize: images.Resize
    metadata: dict[str, Any]

    def probabilities(self, image: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) uint8 to probabilities (B, K) float32 on the CPU."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            logits: Tensor = self.network(image.to(device))
            return logits.float().softmax(dim=1).cpu()

    def predict(
        self, pictures: Sequence[str | os.PathLike[str]], batch_size: int = 64, workers: int = 0
    ) -> list[Prediction]:
        """One `Prediction` a picture, in the order given; an unreadable one has its `error` set."""
        return list(self.stream(pictures, batch_size, workers))

    def stream(
        self, pictures: Sequence[str | os.PathLike[str]], batch_size: int = 64, workers: int = 0
    ) -> Iterator[Prediction]:
        """As `predict`, one by one as they are ready."""
        paths = [os.fspath(picture) for picture in pictures]
        dataset = ImageDataset(Path(), paths, None, self.image_size, self.resize)
        for batch in loader(dataset, BatchSampler(len(paths), batch_size, shuffle=False), workers):
            made = {row: Prediction(paths[row], error=reason) for row, reason in batch.failed}
            if len(batch.row):
                rows = zip(batch.row.tolist(), self.probabilities(batch.image).tolist(), strict=True)
                made |= {row: Prediction.of(paths[row], p, self.class_names) for row, p in rows}
            yield from (made[row] for row in sorted(made))


def load(path: str | os.PathLike[str] | None = None, device: str | torch.device | None = None) -> Predictor:
    """Loads a trained classifier.

    Args:
        path: A checkpoint or a run's folder; None means the newest run's best.ckpt.
        device: Where it computes; by default the accelerator, where there is one.

    Raises:
        UserError: There is no such checkpoint, or it cannot be used.
    """
    file = runs.find(path)
    content = read(file)
    metadata = content[METADATA]
    network = models.build(metadata["model"], len(metadata["class_names"]), metadata["mean"], metadata["std"])
    prefix = "network."
    weights = {
        key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)
    }
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the network {metadata['model']} that it names; it is damaged.") from error
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    network = network.to(memory_format=torch.channels_last).to(device or "cpu")
    return Predictor(network.eval(), metadata["class_names"], metadata["image_size"], metadata["resize"], metadata)


def provenance() -> dict[str, Any]:
    """Versions of what computes, and the git commit of this code (with "+" where it was changed since)."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "pillow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""  # not a git checkout, or no git
