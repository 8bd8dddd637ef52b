"""How fast files are predicted, beside plain loops over torchvision's network and transforms."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import baselines
from benchmarks.runner import Stopwatch, compare, show, training_images
from project import models
from project.commands.bench import BATCH, SIZE
from project.data.workers import usable_cores
from project.inference import predictions
from project.inference.checkpoint import TorchPredictor
from project.inference.metadata import Metadata

CLASSES = 1000
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OURS = "predict"


def predict(root: str | None = None, count: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Predicts the same files in each way, in turn, and checks that all give the same probabilities.

    Args:
        root: The images, as fit takes them; by default generated ones of 475 x 404 pixels.
        count: Number of images.
        rounds: How often each is run.
    """
    cores = usable_cores()
    with training_images(root, count) as table:
        paths = [path for path, _ in table]
        seconds, probabilities = compare(
            {
                "a loop, one file at a time": (baselines.one_by_one, paths, SIZE),
                f"a DataLoader, batches of {BATCH}": (baselines.by_loader, paths, SIZE, BATCH, 0),
                f"a DataLoader, {cores} workers": (baselines.by_loader, paths, SIZE, BATCH, cores),
                OURS: (_ours, paths, Path("predictions.csv")),
            },
            rounds,
        )
        probabilities[OURS] = [list(row.probabilities) for row in predictions.read(Path("predictions.csv"))]
    for name, found in probabilities.items():
        assert np.allclose(found, probabilities[OURS], atol=1e-3), f"{name} predicts differently"
    speed = {name: len(paths) / taken for name, taken in seconds.items()}
    return {"images_per_second": speed, "ratio": show(speed, OURS)}


def _ours(paths: list[str], file: Path, stopwatch: Stopwatch) -> None:
    """The work of the verb `predict` once the checkpoint is loaded, with the CSV file that the others do not write."""
    network = models.build("alexnet", CLASSES, MEAN, STD)
    network[1].load_state_dict(baselines.reference(CLASSES).state_dict())
    names = [f"class {number}" for number in range(CLASSES)]
    network = network.eval().to(memory_format=torch.channels_last)
    sections: dict[str, Any] = {"data": {}, "model": {}, "trainer": {}}
    predictor = TorchPredictor(network, Metadata("alexnet", names, SIZE, "stretch", MEAN, STD, sections))
    while True:
        stopwatch.next_round()
        stopwatch.start()
        predictions.write(file, predictor.stream(paths, BATCH), names)
