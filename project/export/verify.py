"""Verification: a bundle must predict the same as its checkpoint, from image files on, before anyone gets it."""

from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from project.data import shards
from project.data.images import Pixels
from project.errors import FailedRun, UserError
from project.evaluation import run_split
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor

MAX_IMAGES = 512  # to compare on: 0.2 points of accuracy each
MAX_SAMPLES = 128  # for the scales of 8 bits
TOLERANCE = 1e-4  # largest difference between two probabilities that count as equal


class LabelledImages(NamedTuple):
    """Images to compare on: their files, or the bytes of these, their classes, and where they are from, in words."""

    paths: list[str] | list[bytes]
    labels: list[str]
    source: str


class Outputs(NamedTuple):
    """A predictor's probabilities (N, K) for the images that can be read, and its accuracy on them, 0 to 1."""

    probabilities: npt.NDArray[np.float64]
    accuracy: float


def draw_images(
    run: Path, split: Literal["train", "val"], count: int, metadata: Metadata, data: str | None
) -> LabelledImages:
    """Draws up to `count` images of a run's split; without a split.csv in the run, prints how they were found.

    Generated images stand for those of data of one's own, which has no files. UserError where none of the images is
    there, or they have other classes.
    """
    kind, found = {"train": "training", "val": "validation"}[split], run_split.images(run, split, metadata, data)
    order = np.random.default_rng(0).permutation(len(found.pairs)).tolist()
    pairs = list(islice((found.pairs[index] for index in order if shards.is_file(found.pairs[index][0])), count))
    if not pairs and "class_path" in metadata.config["data"] and (split, data) == ("val", None):
        random = np.random.default_rng(0)  # 64 pixels an image, in the format PPM
        return LabelledImages([b"P6 8 8 255\n" + random.bytes(192) for _ in range(64)], [""] * 64, "generated images")
    if not pairs:
        raise UserError(
            f"export needs {kind} images, but none of the {len(found.pairs):,} of {run} is in {found.root}; give the "
            "folder of the run's images by --data."
        )
    if found.notice:
        print(found.notice)
    paths, labels = zip(*pairs, strict=True)
    return LabelledImages(list(paths), list(labels), f"{kind} images of {found.root}")


def training_samples(run: Path, network: Predictor, data: str | None) -> list[Pixels]:
    """Training images for the scales of 8 bits, up to 8 an array (B, H, W, 3) uint8, RGB; UserError without any."""
    images = draw_images(run, "train", MAX_SAMPLES, network.metadata, data)
    batches = list(network.batches(images.paths, batch_size=8))
    samples = [batch.pixels for batch in batches if len(batch.pixels)]
    if not samples:
        raise UserError(f"None of the {len(images.paths):,} {images.source} can be read: {batches[0].failed[0]}.")
    return samples


def compare(network: Predictor, exported: Predictor, images: LabelledImages) -> tuple[dict[str, Any], Outputs]:
    """Compares two predictors on the same files, prints how much they differ, and returns that and the first's outputs.

    Where all probabilities are equal within `TOLERANCE`, another label is a tie: which of two equal probabilities is
    larger is chance. FailedRun where the outputs differ, UserError where no image can be read.
    """
    # batches of different size, so that neither can depend on it
    expected, outputs = predict(network, images, batch_size=64), predict(exported, images, batch_size=7)
    count, largest = len(outputs.probabilities), float(np.abs(expected.probabilities - outputs.probabilities).max())
    others = int((expected.probabilities.argmax(axis=1) != outputs.probabilities.argmax(axis=1)).sum())
    if not largest <= TOLERANCE:  # nan, too
        raise FailedRun(
            f"model.onnx does not predict the same as the checkpoint: of {count:,} {images.source}, {others:,} get "
            f"another label, and probabilities differ by up to {largest:.2g}, where {TOLERANCE:g} is allowed; no "
            "bundle was made."
        )
    print(
        f"compared on {count:,} {images.source}, from file to prediction: the same labels"
        f"{f' ({others:,} of them a tie)' if others else ''}, probabilities differ by at most {largest:.2g}"
    )
    measured = {"largest_difference": largest, "accuracy": expected.accuracy, "ties": others}
    return {"images": count, "of": images.source, **measured}, expected


def predict(predictor: Predictor, images: LabelledImages, batch_size: int) -> Outputs:
    """Predicts images, without those that cannot be read; where none can, raises UserError."""
    predictions = predictor.predict(images.paths, batch_size)
    pairs = [(row, label) for row, label in zip(predictions, images.labels, strict=True) if not row.error]
    if not pairs:
        first = predictions[0]
        raise UserError(f"None of the {len(predictions):,} {images.source} can be read: {first.path}: {first.error}.")
    right = [row.label == label for row, label in pairs]
    return Outputs(np.array([row.probabilities for row, _ in pairs]), sum(right) / len(right))
