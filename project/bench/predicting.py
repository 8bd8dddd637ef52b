"""How fast files are labelled, beside plain loops: python -m project.cli bench predict."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from project import models, predictions
from project.bench import rivals
from project.bench.reading import readable
from project.bench.turns import Course, Turn
from project.checkpoint import Network
from project.data import manifest
from project.data.workers import usable_cores
from project.errors import UserError

BATCH, SIZE, CLASSES = 64, 224, 1000
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OURS = "ours: predict"
SAME = 1e-3  # how far a contestant's probabilities may be from another's


def measure(root: Path, count: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Runs all in turn, prints the table and returns it: pictures a second by contestant, and ours by the others'."""
    table = manifest.load(root)
    paths = [str((table.root / path).absolute()) for path in itertools.islice(readable(table), count)]
    if not paths:
        raise UserError(f"None of the pictures in {root} can be read; python -m project.cli check {root} says why.")
    cores = usable_cores()
    print(f"{root}: {len(paths):,} pictures, AlexNet, {SIZE} px, medians of {rounds} rounds\n")
    runs: dict[str, tuple[Any, ...]] = {
        "a loop, one file at a time": (rivals.one_by_one, paths, SIZE),
        f"a DataLoader, batches of {BATCH}": (rivals.by_loader, paths, SIZE, BATCH, 0),
        f"a DataLoader, {cores} workers": (rivals.by_loader, paths, SIZE, BATCH, cores),
        OURS: (_ours, paths, SIZE, BATCH, scratch / "predictions.csv"),
    }
    speed, probabilities = _compare(runs, len(paths), rounds)
    for name, found in probabilities.items():
        assert np.allclose(found, probabilities[OURS], atol=SAME), f"{name} has other answers"
    return {"speed": speed, "ratio": {name: speed[OURS] / value for name, value in speed.items()}}


def _compare(
    runs: dict[str, tuple[Any, ...]], pictures: int, rounds: int
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """Pictures a second of each, the median over the rounds after one that warms up; and what each has answered."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = {name: Turn(*run) for name, run in runs.items()}
    try:
        for number, (name, turn) in itertools.product(range(rounds + 1), turns.items()):
            took = turn.epoch()
            if number:
                seconds[name].append(took)
        answers = {name: turn.close() for name, turn in turns.items()}
    finally:
        for turn in turns.values():
            turn.kill()
    speed = {name: pictures / statistics.median(times) for name, times in seconds.items()}
    print(f"{'':30}  pictures/s   ours is")
    for name, value in speed.items():
        print(f"  {name:28}  {value:10.1f}   {speed[OURS] / value:6.2f} x")
    return speed, answers


def _ours(paths: list[str], size: int, batch: int, file: Path, course: Course) -> None:
    """What `predict` does once the checkpoint is loaded, with the CSV file that the others do not write."""
    import torch

    network = models.build("alexnet", CLASSES, MEAN, STD)
    network[1].load_state_dict(rivals.reference(CLASSES).state_dict())
    names = [f"class {number}" for number in range(CLASSES)]
    network = network.to(memory_format=torch.channels_last)
    predictor = Network(network.eval(), {"class_names": names, "image_size": size, "resize": "stretch"})
    while True:
        course.begin()
        course.start()
        predictions.write(file, predictor.stream(paths, batch), names)
        course.end()
        course.result = [list(row.probabilities) for row in predictions.read(file)]
