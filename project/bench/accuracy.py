"""Time to an accuracy, beside a usual Lightning loop: python -m project.cli bench accuracy --target 0.95."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from project.bench import rivals
from project.bench.pictures import Rows
from project.bench.training import inside
from project.data import digits
from project.data.datamodule import ImageData
from project.training import Cli

BATCH = 64
USUAL = {"usual, Adam at its default 1e-3": 1e-3, "usual, Adam at 3e-4": 3e-4}


class Target(Callback):
    """Ends a fit when the validation accuracy is there, and knows when that was."""

    def __init__(self, target: float) -> None:
        self.target = target
        self._start = time.perf_counter()
        self.seconds: float | None = None
        self.best = 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Looks."""
        accuracy = float(trainer.callback_metrics["val/accuracy"])
        self.best, self.whole = max(self.best, accuracy), time.perf_counter() - self._start
        print(f"  epoch {trainer.current_epoch + 1}: {accuracy:.4f} after {self.whole:.0f} s", flush=True)
        if accuracy >= self.target and self.seconds is None:
            self.seconds = self.whole
            trainer.should_stop = True


def measure(root: str | None, target: float, epochs: int, image_size: int | None, scratch: Path) -> dict[str, Any]:
    """Trains both on the same rows, ours first, and prints and returns the seconds they took."""
    place = Path(root).absolute() if root else None
    with inside(scratch):
        options = {"trainer.max_epochs": epochs, "trainer.enable_checkpointing": "false", "trainer.devices": 1}
        options |= {"data.root": place} if place else {}
        options |= {"data.image_size": image_size} if image_size else {}
        data = ImageData(str(place) if place else str(digits.ROOT), image_size=image_size, cache="off")
        parts = {split: _rows(data, split) for split in ("train", "val")}
        watch = {"ours": Target(target)}

        class Contestant(Cli):
            """fit that stops at the target."""

            def instantiate_trainer(self, **kwargs: Any) -> Trainer:
                trainer = super().instantiate_trainer(**kwargs)
                trainer.callbacks.append(watch["ours"])  # type: ignore[attr-defined]
                return trainer

        print("ours: fit")
        Contestant("fit", [f"--{key}={value}" for key, value in options.items()])
        for name, rate in USUAL.items():
            print(name)
            loader = partial(rivals.usual_loader, size=data.image_size, batch_size=BATCH, flip=place is not None)
            watch[name] = Target(target)
            trainer = Trainer(
                max_epochs=epochs,
                devices=1,
                enable_model_summary=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                num_sanity_val_steps=0,
                callbacks=[watch[name]],
            )
            module = rivals.UsualModule(len(data.class_names), rate)
            trainer.fit(module, loader(parts["train"], train=True), loader(parts["val"], train=False))
    result: dict[str, Any] = {"target": target}
    ours = watch["ours"].seconds
    for name, run in watch.items():
        said = f"{run.seconds:.0f} s" if run.seconds else f"not within {epochs} epochs, {run.whole:.0f} s"
        least = "less than " * (run.seconds is None)
        ratio = (
            f"; ours takes {least}{ours / (run.seconds or run.whole):.2f} of that" if ours and name != "ours" else ""
        )
        print(f"{name}: validation accuracy {target:.3f}: {said}; best {run.best:.4f}{ratio}")
        result[name] = {"seconds": run.seconds, "whole": run.whole, "best": run.best}
    return result


def _rows(data: ImageData, split: str) -> Rows:
    dataset = data.dataset(split)
    return [(str(Path(dataset.path(row)).absolute()), int(dataset.labels[row])) for row in range(len(dataset))]
