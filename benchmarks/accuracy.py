"""Time to a validation accuracy, beside a usual Lightning loop with its default recipe."""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks import baselines
from project.data import digits
from project.data.datamodule import ImageData
from project.data.workers import usable_cores
from project.training.cli import Cli
from project.training.trainer import quieten

BATCH = 64
USUAL = {"usual, Adam at its default 1e-3": 1e-3, "usual, Adam at 3e-4": 3e-4}


def accuracy(target: float, root: str | None = None, epochs: int = 12, image_size: int | None = None) -> dict[str, Any]:
    """Trains all on the same rows, ours first, until they reach the accuracy.

    Args:
        target: The validation accuracy, 0 to 1.
        root: The images, as fit takes them; by default the bundled digits.
        epochs: Epochs of each, at most.
        image_size: Side of the images, in pixels; by default as in fit.
    """
    quieten()
    source = str(Path(root).absolute() if root else digits.ROOT)
    stop: Any = {"monitor": "val/accuracy", "mode": "max", "stopping_threshold": target, "patience": epochs}
    figures: dict[str, Any] = {"target": target}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        started = time.perf_counter()
        words = [f"--data.root={source}", *([f"--data.image_size={image_size}"] if image_size else [])]
        words += [f"--trainer.max_epochs={epochs}", "--trainer.enable_checkpointing=false", "--trainer.devices=1"]
        words += ["--trainer.callbacks=EarlyStopping", *(f"--trainer.callbacks.{key}={stop[key]}" for key in stop)]
        _show(figures, "ours: fit", Cli("fit", words).trainer, started)
        data = ImageData(source, image_size=image_size, cache="off")
        for name, rate in USUAL.items():
            started = time.perf_counter()
            trainer = Trainer(max_epochs=epochs, devices=1, callbacks=[EarlyStopping(**stop)], **baselines.QUIET)
            module = baselines.UsualModule(len(data.class_names), rate)
            trainer.fit(module, _loader(data, "train", flip=root is not None), _loader(data, "val", flip=False))
            _show(figures, name, trainer, started)
    return figures


def _loader(data: ImageData, split: str, flip: bool) -> Any:
    dataset = data.dataset(split)
    rows = [(str(dataset.path(row)), int(dataset.labels[row])) for row in range(len(dataset))]
    transform = baselines.resized(data.image_size, *baselines.floats(normalised=True), flip=flip)
    return baselines.batches(rows, transform, BATCH, usable_cores(), shuffle=split == "train")


def _show(figures: dict[str, Any], name: str, trainer: Any, started: float) -> None:
    seconds = time.perf_counter() - started
    (stopping,) = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))
    best, target = float(stopping.best_score), figures["target"]
    reached = f"{target:.3f} reached" if best >= target else f"{target:.3f} not reached, {best:.4f} at best,"
    print(f"{name}: validation accuracy {reached} in {seconds:.0f} s", flush=True)
    figures[name] = {"seconds": seconds if best >= target else None, "whole": seconds, "best": best}
