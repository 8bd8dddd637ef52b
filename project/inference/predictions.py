"""predictions.csv: one row per image, with the same columns whoever writes it."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from project import files
from project.inference import calibration

COLUMNS, CLASS = ("path", "true", "label", "probability", "error"), "p:"  # the prefix of a class's column


class Prediction(NamedTuple):
    """What is predicted for one image; label and probabilities are empty where it could not be read."""

    path: str  # as it was given
    label: str = ""  # name of the likeliest class
    probability: float = 0.0  # of that class, 0 to 1
    probabilities: tuple[float, ...] = ()  # of each class, in class order
    error: str = ""  # why the image could not be read; empty where it could
    true: str = ""  # the true class; empty where it is unknown

    @property
    def max_logit(self) -> float:
        """See `calibration.max_logits`; nan of an image that could not be read."""
        return float("nan") if self.error else float(calibration.max_logits([self.probabilities])[0])

    @classmethod
    def of(cls, path: str, probabilities: Sequence[float], class_names: Sequence[str]) -> "Prediction":
        """Makes a prediction from a row of probabilities."""
        best = max(range(len(class_names)), key=probabilities.__getitem__)
        return cls(path, class_names[best], probabilities[best], tuple(probabilities))


def write(file: Path, predictions: Iterable[Prediction], class_names: Sequence[str], *thresholds: float | None) -> None:
    """Writes predictions as CSV, with the columns of `write_into`; the file appears complete or not at all."""
    with files.replacing(file) as stream:
        write_into(stream, predictions, class_names, *thresholds)


def write_into(
    stream: TextIO,
    predictions: Iterable[Prediction],
    class_names: Sequence[str],
    min_confidence: float | None = None,
    unknown_below: float | None = None,
) -> None:
    """Writes predictions as CSV.

    The columns are path, true, label, probability, error, then p:<class> for each class, with nine significant digits.
    With a `min_confidence`, abstained follows error: 1 where the probability is below it, else 0, or empty with error.
    With `unknown_below`, so does unknown: 1 where the maximum logit is lower, else 0, or empty with error.
    """
    writer = csv.writer(stream)
    more = ["abstained"] * (min_confidence is not None) + ["unknown"] * (unknown_below is not None)
    writer.writerow([*COLUMNS, *more, *(f"{CLASS}{name}" for name in class_names)])
    for row in predictions:
        numbers = [f"{p:.9g}" for p in row.probabilities] or [""] * len(class_names)
        probability = "" if row.error else f"{row.probability:.9g}"
        flags = [] if min_confidence is None else [row.probability < min_confidence]
        flags += [] if unknown_below is None else [row.max_logit < unknown_below]
        more = ["" if row.error else str(int(flag)) for flag in flags]
        writer.writerow([row.path, row.true, row.label, probability, row.error, *more, *numbers])


def read(file: Path) -> Iterator[Prediction]:
    """Reads predictions that were written without a `min_confidence`, one by one."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream)
        next(rows, None)
        for path, true, label, probability, error, *numbers in rows:
            probabilities = () if error else tuple(map(float, numbers))
            yield Prediction(path, label, float(probability or 0), probabilities, error, true)


def read_class_names(file: Path) -> list[str]:
    """Reads the class names from the columns of a predictions.csv."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return [name.removeprefix(CLASS) for name in next(csv.reader(stream), []) if name.startswith(CLASS)]
