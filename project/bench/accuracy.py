"""Time to an accuracy, beside a usual Lightning loop: python -m project.cli bench accuracy --target 0.95."""

import time
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


class Target(Callback):
    """Ends a fit when the validation accuracy is there, and knows when that was."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.seconds: float | None = None
        self.best = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

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
        options = {"trainer.max_epochs": epochs, "trainer.enable_checkpointing": "false"}
        options |= {"data.root": place} if place else {}
        options |= {"data.image_size": image_size} if image_size else {}
        data = ImageData(str(place) if place else str(digits.ROOT), image_size=image_size, cache="off")
        parts = {split: _rows(data, split) for split in ("train", "val")}
        ours, usual = Target(target), Target(target)

        class Contestant(Cli):
            """fit that stops at the target."""

            def instantiate_trainer(self, **kwargs: Any) -> Trainer:
                trainer = super().instantiate_trainer(**kwargs)
                trainer.callbacks.append(ours)  # type: ignore[attr-defined]
                return trainer

        print("ours: fit")
        Contestant("fit", [f"--{key}={value}" for key, value in options.items()])
        print("a usual Lightning loop")
        trainer = Trainer(
            max_epochs=epochs,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            callbacks=[usual],
        )
        flip = place is not None
        trainer.fit(
            rivals.UsualModule(len(data.class_names)),
            rivals.usual_loader(parts["train"], data.image_size, BATCH, train=True, flip=flip),
            rivals.usual_loader(parts["val"], data.image_size, BATCH, train=False, flip=flip),
        )
    result: dict[str, Any] = {"target": target}
    for name, run in (("ours", ours), ("usual", usual)):
        said = f"{run.seconds:.0f} s" if run.seconds else f"not within {epochs} epochs, {run.whole:.0f} s"
        print(f"{name:6}  validation accuracy {target:.3f}: {said}; best {run.best:.4f}")
        result[name] = {"seconds": run.seconds, "whole": run.whole, "best": run.best}
    if ours.seconds:
        least = "" if usual.seconds else "less than "
        print(f"ours takes {least}{ours.seconds / (usual.seconds or usual.whole):.2f} of the usual time")
    return result


def _rows(data: ImageData, split: str) -> Rows:
    dataset = data.dataset(split)
    return [(str(Path(dataset.path(row)).absolute()), int(dataset.labels[row])) for row in range(len(dataset))]
