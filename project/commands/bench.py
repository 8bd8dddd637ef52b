"""How fast this machine trains and reads, and what saving costs: python -m project.cli bench [training|data|saving]."""

import contextlib
import csv
import io
import itertools
import json as json_format
import statistics
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image

from project import files
from project.data import images, manifest
from project.data.workers import usable_cores
from project.errors import UserError
from project.export.verify import side_by_side

BATCH, SIZE = 64, 224


def bench(
    what: Literal["training", "data", "saving"] = "training",
    /,
    root: str | None = None,
    count: PositiveInt = 192,
    rounds: PositiveInt = 3,
    json: str | None = None,
) -> int:
    """Measures the parts of a training step, the speed of reading, or the cost of checkpoints.

    Comparisons with other programs are in a checkout's benchmarks/: make bench.

    Args:
        what: `training`: the parts of a step of `fit` with AlexNet, and the same network's forward, backward and
            optimizer on a batch in memory. `data`: reading, on one core and with workers, with and without the cache.
            `saving`: a whole `fit` with and without checkpoints.
        root: The images, as fit takes them; by default generated ones of 475 x 404 pixels, for `saving` the digits.
        count: Number of images; `saving` takes all.
        rounds: How often each is measured, in turn; the median counts.
        json: Write the figures into this file too; must not exist.
    """
    if json is not None:
        files.require_new(Path(json), "json")
    source = Path(root).absolute() if root else None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if what == "saving":
            figures = _saving(f"--data.root={source}" if source else "--data.cache=on", rounds)
        else:
            count = len(write_table(source or make_photographs(Path("photos"), count), count))
            figures = (_training if what == "training" else _data)(count, rounds)
    if json is not None:
        with files.replacing(Path(json)) as stream:
            json_format.dump(figures, stream, indent=2)
    return 0


def make_photographs(root: Path, count: int) -> Path:
    """Writes JPEGs of two classes, as detailed as photographs: noise of all scales, 65 kB each."""
    random = np.random.default_rng(0)
    for number in range(count):
        scales = [Image.fromarray(random.integers(0, 256, (2**k, 2**k, 3), np.uint8)) for k in range(1, 10)]
        layers = [np.asarray(scale.resize((475, 404), Image.Resampling.BICUBIC)) for scale in scales]
        pixels = np.mean(layers, axis=0)
        file = root / "ab"[number % 2] / f"{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)
    return root


def write_table(root: Path, count: int) -> list[tuple[str, str]]:
    """Writes about `count` readable images of a data set into images.csv; returns path and label of those for training.

    One of each class is for validation, without which fit does not start.
    """
    table, rows, classes = manifest.load(root), list[tuple[str, str]](), set[str]()
    with files.replacing(Path("images.csv")) as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label", "split"))
        for row in np.random.default_rng(0).permutation(len(table.paths)).tolist():
            path, label = str((table.root / table.paths[row]).absolute()), table.class_names[table.labels[row]]
            with contextlib.suppress(images.ImageError):
                images.read(path, SIZE)
                writer.writerow((path, label, "train" if label in classes else "val"))
                rows += [(path, label)] if label in classes else []
                classes.add(label)
            if len(rows) + len(classes) >= count and {label for _, label in rows} == classes:
                break
    if not rows:
        raise UserError(f"Of the images in {root}, too few can be read; see: python -m project.cli check {root}")
    print(f"{root}: {len(rows):,} training images, {SIZE} px, batches of {min(BATCH, len(rows))}\n")
    return rows


def _fit(*options: str) -> Any:
    """Runs `fit` in the current folder without its output; returns its Trainer."""
    from project.training import cli as trainer_cli
    from project.training.trainer import quieten

    quieten()
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer_cli.Cli("fit", list(options)).trainer


def _training(count: int, rounds: int) -> dict[str, Any]:
    """Runs fit for one epoch that warms up and `rounds` that count; after each, as many steps from memory."""
    from project.training.throughput import StepsInMemory

    batch = min(BATCH, count)
    data = ["--data.root=images.csv", f"--data.image_size={SIZE}", f"--data.batch_size={batch}", "--data.cache=on"]
    only_steps = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    watch = ["--trainer.profiler=simple", f"--trainer.callbacks={StepsInMemory.__module__}.StepsInMemory"]
    trainer = _fit(*data, *only_steps, *watch, f"--trainer.max_epochs={rounds + 1}")
    (memory,) = (callback for callback in trainer.callbacks if isinstance(callback, StepsInMemory))
    split = _split(trainer.profiler.recorded_durations, rounds)
    step, limit = sum(split.values()), statistics.median(memory.seconds[1:])
    print(f"{'a step of fit':30}          ms    share")
    for name, seconds in split.items():
        print(f"  {name:28}  {1e3 * seconds:10.1f}   {seconds / step:6.1%}")
    print(
        f"\n{batch / step:.1f} images/s: a step takes {step / limit:.2f} times as long as the same network's forward, "
        f"backward and optimizer on a batch in memory, {batch / limit:.1f} images/s.\nIf it waits for data, leave "
        "--data.cache on and increase --data.workers; if logging takes long, increase --trainer.log_every_n_steps."
    )
    return {"step_seconds": split, "images_per_second": batch / step, "limit": batch / limit}


def _split(durations: dict[str, list[float]], rounds: int) -> dict[str, float]:
    """Seconds of each part of a step, the mean over the steps of the last `rounds` epochs."""
    steps = len(durations["run_training_batch"]) * rounds // len(durations["run_training_epoch"])

    def total(ending: str, count: int = steps) -> float:
        times = [value for name, values in durations.items() if name.endswith(ending) for value in values]
        return float(sum(times[-count:]))

    forward, backward = total(".training_step"), total(".backward")
    parts = {
        "waiting for data": total("train_dataloader_next"),
        "transfer": total("batch_to_device"),
        "forward and loss": forward,
        "backward": backward,
        "optimiser": total(".optimizer_step") - forward - backward,
    }
    parts["logging and the rest"] = total("run_training_epoch", rounds) - sum(parts.values())
    return {name: seconds / steps for name, seconds in parts.items()}


def loaders(workers: int) -> dict[str, Any]:
    """The loaders of fit for the training images of images.csv, each image once."""
    from project.data.datamodule import ImageData

    def loader(cache: Literal["on", "off"], augment: Literal["flip", "crop"] = "flip") -> Any:
        data = ImageData("images.csv", image_size=SIZE, batch_size=BATCH, cache=cache, augment=augment, workers=workers)
        return data.in_order("train")

    crop = loader("on", "crop")
    return {"first epoch": loader("off"), "from the cache": loader("on"), "from the cache, augment crop": crop}


def _data(count: int, rounds: int) -> dict[str, Any]:
    """Reads all images by each loader in turn."""
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    torch.set_num_threads(1)
    readers = loaders(0) | {f"{name}, {cores} workers": loader for name, loader in loaders(cores).items()}
    epochs: list[partial[deque[Any]]] = [partial(deque, loader, 0) for loader in readers.values()]
    seconds = side_by_side(*epochs, rounds=rounds, warm_up=1)  # warming up fills the cache
    torch.set_num_threads(threads)
    speed = {name: count / taken for name, taken in zip(readers, seconds, strict=True)}
    print(f"{'reading':40}    images/s")
    for name, value in speed.items():
        print(f"  {name:38}  {value:10,.0f}")
    return {"images_per_second": speed}


def _saving(data: str, rounds: int) -> dict[str, Any]:
    """Runs fit with and without checkpoints, in turn, after an epoch that fills the cache."""
    seconds: dict[str, list[float]] = {"true": [], "false": []}
    _fit(data, "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false")
    for _, saves in itertools.product(range(rounds), seconds):
        started = time.perf_counter()
        _fit(data, f"--trainer.enable_checkpointing={saves}")
        seconds[saves].append(time.perf_counter() - started)
    saving, without = (statistics.median(times) for times in seconds.values())
    cost = saving / without - 1
    print(
        f"fit takes {saving:.1f} s with checkpoints and {without:.1f} s without: saving costs {cost:.1%} of its time."
    )
    return {"with_checkpoints": saving, "without_checkpoints": without, "cost": cost}
