"""The one door to a trained classifier: what a path means, and how it is loaded.

No other module decides whether a path is a checkpoint, a run or a bundle. torch is imported for checkpoints only.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from project import files, runs
from project.data.images import is_image
from project.data.workers import limit_threads
from project.errors import UserError, command
from project.inference import bundle, hub
from project.inference.predictor import Predictor

if TYPE_CHECKING:
    from project.inference.checkpoint import TorchPredictor


@dataclass(frozen=True)
class Source:
    """A trained classifier on disk."""

    file: Path  # the checkpoint, or the bundle's folder
    is_bundle: bool
    trust: tuple[str, ...] = ()  # class paths of networks that it may name: see parts.py

    @property
    def run(self) -> Path:
        """The run folder of a checkpoint; of a bundle, the folder that contains it, which usually is its run."""
        return self.file.absolute().parent if self.is_bundle else runs.folder_of(self.file)

    def load(self, calibrated: bool = False, device: str | None = None, threads: int | None = None) -> Predictor:
        """Like the function `load`; a batch is computed on the CPU with `threads`, by default one per core."""
        if not self.is_bundle:
            return self.load_network(calibrated, device, threads)
        predictor = bundle.OnnxPredictor(self.file, threads)
        if calibrated and not predictor.metadata.calibrated:
            raise UserError(f"{self.file} gives raw probabilities; make another bundle by export --calibrated.")
        return predictor

    def load_network(
        self, calibrated: bool = False, device: str | None = None, threads: int | None = None
    ) -> "TorchPredictor":
        """Like `load`, but always as a PyTorch network, a bundle's at the bundle's own temperature."""
        limit_threads()
        try:
            from project.inference import checkpoint
        except ModuleNotFoundError as error:
            raise UserError(f"{self.file} needs {error.name}; without it, predict and serve take bundles.") from error
        return checkpoint.load(self.file, self.is_bundle, calibrated, device, threads, self.trust)


def locate(path: str | os.PathLike[str] | None = None, trust: Collection[str] = ()) -> Source:
    """The classifier that a path means, by default the newest run's best.ckpt; UserError where it means none."""
    trusted = tuple(trust)
    if path is None:
        return Source(runs.newest_checkpoint(), False, trusted)
    if str(path).startswith(hub.PREFIX):
        return Source(hub.download(str(path)), True, trusted)
    try:
        target = runs.resolve_latest(Path(path))
        if _is_bundle(target):
            return Source(target, True, trusted)
        if (target / ".metadata").is_file():  # a sharded checkpoint
            return Source(target, False, trusted)
        file = target / "checkpoints" / "best.ckpt" if target.is_dir() else target
        if file.name in bundle.PARTS and _is_bundle(file.parent):
            raise UserError(f"{file} is a part of a bundle; give the folder, {file.parent}.")
        is_data = is_image(file.name) or files.is_table(file.name)
        if file.is_file() and not is_data:
            return Source(file, False, trusted)
        is_data |= any(is_image(found.name) for depth in ("*", "*/*", "*/*/*") for found in target.glob(depth))
    except OSError as error:  # a name that is too long, a folder without permission
        raise UserError(f"Cannot read {path}: {error.strerror}; give a .ckpt file or a run's folder.") from error
    if (last := file.with_name("last.ckpt")).is_file():
        raise UserError(f"There is no {file}, because its fit ended before a validation; resume it, or give {last}.")
    if is_data:
        example = command("test", "runs/latest", "--data.root", path)
        raise UserError(f"{path} can be images, but is no run; put a run before it, such as runs/latest, or: {example}")
    raise UserError(f"There is no checkpoint {file}; give a .ckpt file or another run, runs/<name>/version_N.")


def _is_bundle(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (bundle.MODEL, bundle.CONFIG))  # damaged or not


def locate_checkpoint(path: str | os.PathLike[str] | None = None) -> Path:
    """Like `locate`, but refuses bundles, and returns the file."""
    source = locate(path)
    if source.is_bundle:
        raise UserError(f"{path} is a bundle, not a checkpoint; give a .ckpt file or a run, runs/<name>/version_N.")
    return source.file


def load(
    path: str | os.PathLike[str] | None = None,
    calibrated: bool = False,
    device: str | None = None,
    trust: Collection[str] = (),
) -> Predictor:
    """Loads a trained classifier; UserError where the path means none that can be used, or no temperature is known.

    Args:
        path: A checkpoint, also a sharded one, a run's folder, a bundle made by `export`, or hf://user/name, one
            on the Hugging Face hub; None means the newest run's best.ckpt.
        calibrated: Divide the logits by the temperature that `report` has found, so that probabilities match
            frequencies; by default, probabilities are raw. Those of a bundle are what `export` was told to make them:
            a raw one is refused. `metadata.calibrated` tells which they are.
        device: Where the network computes; by default the accelerator, if there is one. A bundle uses the CPU.
        trust: Class paths that a checkpoint may name though they are not of torch, torchvision, timm or this package.
    """
    return locate(path, trust).load(calibrated, device)
