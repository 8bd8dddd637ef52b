"""Verification: a bundle must predict the same as its checkpoint, from image files on, before anyone gets it."""

import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from project.data.images import Pixels
from project.errors import FailedRun, UserError
from project.evaluation import run_split
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor

MAX_IMAGES = 512  # to compare on: 0.2 points of accuracy each
MAX_SAMPLES = 128  # for the scales of 8 bits
TOLERANCE = 1e-4  # largest difference between two probabilities that count as equal


class LabelledImages(NamedTuple):
    """Images to compare on: their files, their classes, and where they are from, in words."""

    paths: list[str]
    labels: list[str]
    source: str


class Outputs(NamedTuple):
    """A predictor's probabilities (N, K) for the images that can be read, and its accuracy on them, 0 to 1."""

    probabilities: npt.NDArray[np.float64]
    accuracy: float


def validation_images(run: Path, metadata: Metadata, data: str | None) -> LabelledImages:
    """Draws validation images to compare on; without a split.csv in the run, prints how they were found.

    Args:
        run: The run's folder.
        metadata: Of its checkpoint.
        data: The data set's folder or table; None means where the run had it.

    Raises:
        UserError: None of the images is there.
    """
    images = run_split.images(run, "val", metadata, data)
    paths, labels = _draw(images, MAX_IMAGES, "validation images to compare the bundle with the checkpoint", run)
    if images.notice:
        print(images.notice)
    return LabelledImages(paths, labels, f"validation images of {images.root}")


def training_samples(run: Path, network: Predictor, data: str | None) -> list[Pixels]:
    """Draws training images for the scales of 8 bits; otherwise like `validation_images`.

    Returns:
        Arrays (B, H, W, 3) uint8, RGB, of up to 8 images.
    """
    images = run_split.images(run, "train", network.metadata, data)
    paths, _ = _draw(images, MAX_SAMPLES, "training images for the scales of 8 bits (or leave out --quantize)", run)
    batches = list(network.batches(paths, batch_size=8))
    samples = [batch.pixels for batch in batches if len(batch.pixels)]
    if not samples:
        reason = f"{paths[0]}: {batches[0].failed[0]}"
        raise UserError(f"None of the {len(paths):,} training images of {images.root} can be read: {reason}.")
    return samples


def _draw(images: run_split.SplitImages, count: int, purpose: str, run: Path) -> tuple[list[str], list[str]]:
    """Draws paths and labels from the images that are there."""
    order = np.random.default_rng(0).permutation(len(images.pairs)).tolist()
    pairs = list(islice((images.pairs[index] for index in order if Path(images.pairs[index][0]).is_file()), count))
    if not pairs:
        raise UserError(
            f"export needs {purpose}, but none of the {len(images.pairs):,} of {run} is in {images.root}; give the "
            "folder of the run's images by --data."
        )
    return [path for path, _ in pairs], [label for _, label in pairs]


def compare(network: Predictor, exported: Predictor, images: LabelledImages) -> tuple[dict[str, Any], Outputs]:
    """Compares two predictors on the same files, and prints how much they differ.

    A label counts as different only where the network's probabilities of the two classes differ by more than
    `TOLERANCE`: which of two equal probabilities is larger is chance.

    Returns:
        What was measured, and the outputs of the network.

    Raises:
        FailedRun: The outputs differ.
        UserError: No image can be read.
    """
    # batches of different size, so that neither can depend on it
    expected, outputs = predict(network, images, batch_size=64), predict(exported, images, batch_size=7)
    rows = np.arange(len(expected.probabilities))
    labels, others = expected.probabilities.argmax(axis=1), outputs.probabilities.argmax(axis=1)
    gap = expected.probabilities[rows, labels] - expected.probabilities[rows, others]
    flips, ties = int((gap > TOLERANCE).sum()), int(((labels != others) & (gap <= TOLERANCE)).sum())
    largest = float(np.abs(expected.probabilities - outputs.probabilities).max())
    if flips or not largest <= TOLERANCE:  # nan, too
        raise FailedRun(
            f"model.onnx does not predict the same as the checkpoint: of {len(rows):,} {images.source}, {flips:,} get "
            f"another label, and probabilities differ by up to {largest:.2g}, where {TOLERANCE:g} is allowed; no "
            "bundle was made."
        )
    print(
        f"compared on {len(rows):,} {images.source}, from file to prediction: the same labels"
        f"{f' ({ties:,} of them a tie)' if ties else ''}, probabilities differ by at most {largest:.2g}"
    )
    measured = {"largest_difference": largest, "accuracy": expected.accuracy, "ties": ties}
    return {"images": len(rows), "of": images.source, **measured}, expected


def predict(predictor: Predictor, images: LabelledImages, batch_size: int) -> Outputs:
    """Predicts images, without those that cannot be read; where none can, raises UserError."""
    predictions = predictor.predict(images.paths, batch_size)
    pairs = [(row, label) for row, label in zip(predictions, images.labels, strict=True) if not row.error]
    if not pairs:
        first = predictions[0]
        raise UserError(f"None of the {len(predictions):,} {images.source} can be read: {first.path}: {first.error}.")
    right = [row.label == label for row, label in pairs]
    return Outputs(np.array([row.probabilities for row, _ in pairs]), sum(right) / len(right))


def side_by_side(*runs: Callable[[], Any], rounds: int = 20, warm_up: int = 3) -> list[float]:
    """Returns the median seconds of each function over `rounds` in which they take turns, after some to warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(warm_up + rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[warm_up:]) for times in seconds]
