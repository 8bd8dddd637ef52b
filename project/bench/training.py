"""How fast AlexNet trains, beside the usual ways: python -m project.cli bench."""

import contextlib
import csv
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from project import models
from project.bench import rivals
from project.bench.pictures import Rows
from project.bench.reading import readable
from project.bench.turns import Begins, Course, Ends, Turn
from project.data import manifest
from project.errors import UserError
from project.training import Cli, quieten

BATCH, SIZE = 64, 224
OURS = "ours: fit, with its cache"
UNCACHED = "ours: fit --data.cache off"


def measure(root: Path, count: int, rounds: int, full: bool, scratch: Path) -> dict[str, Any]:
    """Prints who trains how fast, what a step of ours consists of and what would help; returns the figures."""
    table = manifest.load(root)
    chosen = itertools.islice(readable(table, mixed=True), count)
    labels = {path: table.class_names[label] for path, label in zip(table.paths, table.labels.tolist(), strict=True)}
    named = [(str((table.root / path).absolute()), labels[path]) for path in chosen]
    names = sorted({name for _, name in named})
    if len(names) < 2:
        raise UserError(
            f"The {len(named)} readable pictures taken from {root} are of one class; give a higher --count."
        )
    rows = [(path, names.index(name)) for path, name in named]
    batch = max(1, min(BATCH, len(rows) // 2))
    print(f"{root}: {len(rows):,} pictures, AlexNet, {SIZE} px, batches of {batch}, medians of {rounds} epochs\n")
    common = (rows, len(names), SIZE, batch)
    with inside(scratch):
        runs: dict[str, tuple[Any, ...]] = {
            "the article's loop": (rivals.article, *common),
            "a usual Lightning loop": (rivals.usual, *common),
            "tuned plain PyTorch": (rivals.tuned, *common),
            UNCACHED: (_ours, rows, names, SIZE, batch, "off"),
            OURS: (_ours, rows, names, SIZE, batch, "on"),
        }
        speed, durations = _compare(runs, len(rows) // batch * batch, len(rows), rounds)
    split = _split(durations, rounds)
    _show("a step of ours", {name: seconds * 1000 for name, seconds in split.items()}, "ms")
    ceiling = _ceiling(len(names), SIZE)
    share = speed[OURS] / ceiling["pictures_per_second"]
    print(
        f"A matrix product reaches {ceiling['gflops']:.0f} GFLOP/s here, which at {ceiling['gflop_per_picture']:.2f} "
        f"GFLOP a picture would be {ceiling['pictures_per_second']:.1f} pictures/s; ours is at {share:.0%} of that."
    )
    print(_advice(split))
    result = {"speed": speed, "step_seconds": split, "ceiling": ceiling}
    if full:
        result["sizes"] = _sizes(len(names))
    return result


def _compare(
    runs: dict[str, tuple[Any, ...]], whole: int, rows: int, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Pictures a second of each, the median over the rounds after one epoch that warms up; and our profile."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = {name: Turn(*run) for name, run in runs.items()}
    try:
        for number, (name, turn) in itertools.product(range(rounds + 1), turns.items()):
            took = turn.epoch()
            if number:
                seconds[name].append(took)
        durations = {name: turn.close() for name, turn in turns.items()}[OURS]
    finally:
        for turn in turns.values():
            turn.kill()
    # fit leaves an incomplete last batch out, the others take it
    speed = {n: (whole if n in (OURS, UNCACHED) else rows) / statistics.median(t) for n, t in seconds.items()}
    print(f"{'':30}  pictures/s   ours is")
    for name, value in speed.items():
        print(f"  {name:28}  {value:10.1f}   {speed[OURS] / value:6.2f} x")
    print()
    return speed, durations


def _ours(rows: Rows, names: list[str], size: int, batch: int, cache: str, course: Course) -> None:
    """`fit` itself, on a table of these pictures; its validation, which the others lack, is left out."""
    table = Path(f"cache-{cache}.csv")
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label", "split"))
        held_out = [next(row for row in rows if row[1] == label) for label in range(len(names))]
        writer.writerows((path, names[label], "train") for path, label in rows)
        for number, (path, label) in enumerate(held_out):  # fit wants some to validate on, though it does not here
            link = Path(f"val-{cache}-{number}{Path(path).suffix}")
            link.symlink_to(path)
            writer.writerow((link, names[label], "val"))
    profiler = SimpleProfiler()
    course.result = profiler.recorded_durations

    class Contestant(Cli):
        """fit that takes turns."""

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks = [Begins(course), *trainer.callbacks, Ends(course)]  # type: ignore[attr-defined]
            trainer.profiler = profiler  # type: ignore[attr-defined]
            return trainer

    options = {"data.root": table, "data.image_size": size, "data.batch_size": batch, "data.cache": cache}
    trainer = {"max_epochs": 1000, "limit_val_batches": 0, "enable_checkpointing": "false", "accelerator": "cpu"}
    options |= {f"trainer.{key}": value for key, value in trainer.items()}
    Contestant("fit", [f"--{key}={value}" for key, value in options.items()])


def _split(durations: dict[str, list[float]], rounds: int) -> dict[str, float]:
    """Seconds of a step's parts, means over the measured epochs' steps."""

    def total(ending: str) -> float:
        times = [value for name, values in durations.items() if name.endswith(ending) for value in values]
        return float(sum(times[-steps:]))

    epochs = durations["run_training_epoch"]
    steps = len(durations["run_training_batch"]) * rounds // max(1, len(epochs))
    waiting = total("train_dataloader_next")
    forward, backward = total(".training_step"), total(".backward")
    optimiser = total(".optimizer_step") - forward - backward
    parts = {
        "waiting for data": waiting,
        "transfer": total("batch_to_device"),
        "forward and loss": forward,
        "backward": backward,
        "optimiser": optimiser,
    }
    parts["logging and the rest"] = sum(epochs[-rounds:]) - sum(parts.values())
    return {name: seconds / max(1, steps) for name, seconds in parts.items()}


def _show(title: str, figures: dict[str, float], unit: str) -> None:
    print(f"{title:30}  {unit:>10}    share")
    for name, value in figures.items():
        print(f"  {name:28}  {value:10.1f}   {value / sum(figures.values()):6.1%}")
    print()


def _ceiling(classes: int, size: int) -> dict[str, float]:
    """What this machine could do if a step were one matrix product: the better of torch's two, BLAS's and oneDNN's."""
    side = 2048
    a, b = torch.randn(2, side, side)
    image = a.reshape(1, 64, side // 64, side).permute(0, 3, 1, 2)  # a convolution of one pixel is the same product
    kernel = b.reshape(side, side, 1, 1)
    products: tuple[Callable[[], torch.Tensor], ...] = (lambda: a @ b, lambda: nn.functional.conv2d(image, kernel))
    best = 0.0
    for product in products:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side**3 / statistics.median(times[1:]))
    network = models.build("alexnet", classes)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, size, size, dtype=torch.uint8)).sum().backward()
    each = counter.get_total_flops() / 2
    return {"gflops": best / 1e9, "gflop_per_picture": each / 1e9, "pictures_per_second": best / each}


def _advice(split: dict[str, float]) -> str:
    total = sum(split.values())
    if split["waiting for data"] > 0.1 * total:
        return "Advice: the step waits for pictures; leave --data.cache on and give --data.workers more."
    if split["optimiser"] > 0.2 * total:
        return "Advice: the optimiser takes long; larger batches or a smaller network need fewer of its steps."
    if split["logging and the rest"] > 0.1 * total:
        return "Advice: a tenth of the time goes into logging and callbacks; raise --trainer.log_every_n_steps."
    return (
        "Advice: nearly all of a step is the network's own arithmetic; a smaller --data.image_size, a smaller network "
        "or a GPU is what would help."
    )


def _sizes(classes: int) -> dict[str, float]:
    """Prints and returns pictures a second of a training step, by batch size and picture size."""
    batches, sides = (16, 32, 64, 128), (96, 128, 160, 224)
    print(f"{'pictures/s, batch of':>22}" + "".join(f"{batch:>9}" for batch in batches))
    speed = {}
    for side in sides:
        line = []
        for batch in batches:
            network = models.build("alexnet", classes).to(memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
            line.append(batch / seconds_per_step(network, optimizer, batch, side, torch.device("cpu"), steps=2))
            speed[f"{side} px, {batch}"] = line[-1]
        print(f"{side:>19} px" + "".join(f"{value:9.1f}" for value in line))
    print()
    return speed


def seconds_per_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: int, side: int, device: torch.device, steps: int = 3
) -> float:
    """Median time of a training step on made pictures, reading left out, after one step that warms up."""
    image = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    image = image.to(memory_format=torch.channels_last)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        network(image).float().logsumexp(1).mean().backward()
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The current folder is another while the block runs, for runs and caches; Lightning's advice is not shown."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            quieten()
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)
