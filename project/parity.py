"""Whether two predictors say the same of the same files: what a bundle must pass before anyone gets it."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from project import results
from project.data.images import Pixels
from project.errors import FailedRun, UserError
from project.predictor import Predictor

PICTURES = 512  # at most so many are compared: 0.2 points of accuracy each
SAMPLES = 128  # at most so many show the scales of 8 bits
CLOSE = 1e-4  # how far two probabilities may be apart that should be the same


class Labelled(NamedTuple):
    """Pictures to compare on: their files, classes, and where they are from, in words."""

    paths: list[str]
    labels: list[str]
    source: str


class Answers(NamedTuple):
    """What a predictor says: probabilities (N, K) of the pictures it could read, and its accuracy on them, 0 to 1."""

    probabilities: npt.NDArray[np.float64]
    accuracy: float


def validation(run: Path, metadata: dict[str, Any], data: str | None) -> Labelled:
    """A run's validation pictures that are there, `PICTURES` at most, mixed.

    Args:
        run: Its folder; where it has no split.csv, the pictures are dealt out again by its options, which is said.
        metadata: Of its checkpoint.
        data: The data set's folder or table; None means where the run had it.

    Raises:
        UserError: There are none.
    """
    pairs, root, notice = results.pictures(run, "val", metadata, data)
    there = _some(pairs, PICTURES)
    if not there:
        raise UserError(
            f"The bundle must be compared with the checkpoint, but none of the {len(pairs):,} validation pictures of "
            f"{run} is in {root}; give the folder of the run's pictures by --data."
        )
    if notice:
        print(notice)
    return Labelled([path for path, _ in there], [label for _, label in there], f"validation pictures of {root}")


def samples(run: Path, network: Predictor, data: str | None) -> list[Pixels]:
    """A run's training pictures, `SAMPLES` at most, as the network takes them.

    Args:
        run: Its folder.
        network: Of its checkpoint.
        data: As for `validation`.

    Returns:
        Arrays (B, H, W, 3) uint8, RGB, of 8 pictures or less.

    Raises:
        UserError: There are none, or none can be read.
    """
    pairs, root, _ = results.pictures(run, "train", network.metadata, data)
    there = [path for path, _ in _some(pairs, SAMPLES)]
    if not there:
        raise UserError(
            f"8 bits need training pictures, which show the scales, but none of the {len(pairs):,} of {run} is in "
            f"{root}; give the folder of the run's pictures by --data, or leave out --quantize."
        )
    batches = list(network.batches(there, batch_size=8))
    if not (found := [batch.pixels for batch in batches if len(batch.pixels)]):
        raise UserError(
            f"None of the {len(there):,} training pictures of {root} can be read: {there[0]}: {batches[0].failed[0]}."
        )
    return found


def _some(pairs: Sequence[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """Those that are there, mixed."""
    mixed = [pairs[place] for place in np.random.default_rng(0).permutation(len(pairs)).tolist()]
    return list(islice((pair for pair in mixed if Path(pair[0]).is_file()), most))


def compare(network: Predictor, made: Predictor, pictures: Labelled) -> tuple[dict[str, Any], Answers]:
    """Asks both for the same files, and says how far they are apart.

    A label counts as another one only where the first predictor has more than `CLOSE` between the two classes: which
    of two equal probabilities is the larger is chance.

    Returns:
        What was measured, and the answers of the first.

    Raises:
        FailedRun: The answers differ.
        UserError: No picture can be read.
    """
    # batches of different size, so that neither can depend on it
    expected, found = ask(network, pictures, batch_size=64), ask(made, pictures, batch_size=7)
    rows = np.arange(len(expected.probabilities))
    own, other = (answers.probabilities.argmax(axis=1) for answers in (expected, found))
    gap = expected.probabilities[rows, own] - expected.probabilities[rows, other]
    flips, ties = int((gap > CLOSE).sum()), int(((own != other) & (gap <= CLOSE)).sum())
    largest = float(np.abs(expected.probabilities - found.probabilities).max())
    if flips or not largest <= CLOSE:  # nan, too
        raise FailedRun(
            f"model.onnx does not answer as the checkpoint does: of {len(rows):,} {pictures.source}, {flips:,} get "
            f"another label, and probabilities differ by up to {largest:.2g}, where {CLOSE:g} is allowed; no bundle "
            "was made."
        )
    print(
        f"compared on {len(rows):,} {pictures.source}, from file to answer: the same labels"
        f"{f' ({ties:,} of them a tie)' if ties else ''}, probabilities differ by at most {largest:.2g}"
    )
    measured = {"largest_difference": largest, "accuracy": expected.accuracy, "ties": ties}
    return {"pictures": len(rows), "of": pictures.source, **measured}, expected


def ask(predictor: Predictor, pictures: Labelled, batch_size: int) -> Answers:
    """Predicts pictures, leaving out those that cannot be read.

    Raises:
        UserError: None can be read.
    """
    made = predictor.predict(pictures.paths, batch_size)
    answered = [(one, label) for one, label in zip(made, pictures.labels, strict=True) if not one.error]
    if not answered:
        raise UserError(f"None of the {len(made):,} {pictures.source} can be read: {made[0].path}: {made[0].error}.")
    right = [one.label == label for one, label in answered]
    return Answers(np.array([one.probabilities for one, _ in answered]), sum(right) / len(right))


def side_by_side(*runs: Callable[[], Any], rounds: int = 20, warm_up: int = 3) -> list[float]:
    """Seconds that each takes, the median of so many rounds in which they take turns, after some that warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(warm_up + rounds):
        for run, mine in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine[warm_up:]) for mine in seconds]
