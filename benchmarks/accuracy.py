"""Time to a validation accuracy, beside a usual Lightning loop at each of three learning rates."""

import contextlib
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks import baselines
from project.data import digits
from project.data.datamodule import ImageData
from project.data.workers import usable_cores
from project.training.cli import Cli
from project.training.trainer import quieten

BATCH, OURS = 64, "fit"
RATES = (1e-3, 3e-4, 1e-4)  # of Adam; the first is its default


def accuracy(
    target: float, root: str | None = None, epochs: int = 12, image_size: int | None = None, seeds: int = 3
) -> dict[str, Any]:
    """Trains all on the same rows, in turn, until they reach the accuracy; the median of the seeds counts.

    Args:
        target: The validation accuracy, 0 to 1.
        root: The images, as fit takes them; by default the bundled digits.
        epochs: Epochs of each, at most.
        image_size: Side of the images, in pixels; by default as in fit.
        seeds: Number of seeds, from 0; the split is the same for all.
    """
    quieten()
    source = str(Path(root).absolute() if root else digits.ROOT)
    stop: Any = {"monitor": "val/accuracy", "mode": "max", "stopping_threshold": target, "patience": epochs}
    words = [f"--data.root={source}", *([f"--data.image_size={image_size}"] if image_size else [])]
    words += [f"--trainer.max_epochs={epochs}", "--trainer.enable_checkpointing=false", "--trainer.devices=1"]
    words += ["--trainer.callbacks=EarlyStopping", *(f"--trainer.callbacks.{key}={stop[key]}" for key in stop)]
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *map(str, RATES))}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for seed, (name, times) in ((seed, entry) for seed in range(seeds) for entry in seconds.items()):
            started = time.perf_counter()
            if name == OURS:
                trainer = Cli("fit", [*words, f"--seed_everything={seed}"]).trainer
            else:
                seed_everything(seed)
                data = ImageData(source, image_size=image_size, cache="off")
                trainer = Trainer(max_epochs=epochs, devices=1, callbacks=[EarlyStopping(**stop)], **baselines.QUIET)
                module = baselines.UsualModule(len(data.class_names), float(name))
                trainer.fit(module, _loader(data, "train", flip=root is not None), _loader(data, "val", flip=False))
            last = float(trainer.callback_metrics["val/accuracy"])  # EarlyStopping's best_score is without it
            times.append(time.perf_counter() - started if last >= target else math.inf)
            print(f"seed {seed}, {name}: {last:.4f}, {times[-1]:.0f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in medians if name != OURS), key=medians.__getitem__)
    print(f"\nto {target}: fit {medians[OURS]:.0f} s; a usual loop at its best rate, {best}, {medians[best]:.0f} s")
    return {"target": target, "seconds": seconds, "ratio": medians[OURS] / medians[best]}


def _loader(data: ImageData, split: str, flip: bool) -> Any:
    dataset = data.dataset(split)
    rows = [(str(dataset.path(row)), int(dataset.labels[row])) for row in range(len(dataset))]
    transform = baselines.resized(data.image_size, *baselines.floats(normalised=True), flip=flip)
    return baselines.batches(rows, transform, BATCH, usable_cores(), shuffle=split == "train")
