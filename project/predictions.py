"""predictions.csv: one row a picture, the same columns whoever writes it."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from project import files

FIRST, CLASS = ("path", "true", "label", "probability", "error"), "p:"  # columns, and what a class's begins with


@dataclass(frozen=True)
class Prediction:
    """What is said of one picture.

    Attributes:
        path: As it was given.
        label: Name of the likeliest class; empty where the picture could not be read.
        probability: Of that class, 0 to 1.
        probabilities: Of each class, in class order; empty where the picture could not be read.
        error: Why it could not be read; empty where it could.
        true: The class it really is; empty where that is unknown.
    """

    path: str
    label: str = ""
    probability: float = 0.0
    probabilities: tuple[float, ...] = ()
    error: str = ""
    true: str = ""

    @classmethod
    def of(cls, path: str, probabilities: Sequence[float], class_names: Sequence[str], true: str = "") -> "Prediction":
        """From a row of probabilities."""
        best = max(range(len(class_names)), key=probabilities.__getitem__)
        return cls(path, class_names[best], probabilities[best], tuple(probabilities), true=true)

    def labelled(self, true: str) -> "Prediction":
        """The same, where the true class is known."""
        return replace(self, true=true)


def write(
    file: Path, predictions: Iterable[Prediction], class_names: Sequence[str], min_confidence: float | None = None
) -> None:
    """Writes predictions as CSV; the file appears whole or not at all. The columns are those of `write_into`."""
    with files.replacing(file) as stream:
        write_into(stream, predictions, class_names, min_confidence)


def write_into(
    stream: TextIO, predictions: Iterable[Prediction], class_names: Sequence[str], min_confidence: float | None = None
) -> None:
    """Writes predictions as CSV.

    Columns: path, true, label, probability, error, then p:<class> for each class; nine significant digits. With a
    `min_confidence`, after error, also abstained: 1 where the probability is below it, 0 where it is not, empty where
    the picture could not be read. The label stays what is likeliest, so that no other threshold needs a new prediction.
    """
    writer = csv.writer(stream)
    abstained = [] if min_confidence is None else ["abstained"]
    writer.writerow([*FIRST, *abstained, *(f"{CLASS}{name}" for name in class_names)])
    for row in predictions:
        numbers = [f"{p:.9g}" for p in row.probabilities] or [""] * len(class_names)
        probability = "" if row.error else f"{row.probability:.9g}"
        if min_confidence is not None:
            abstained = ["" if row.error else str(int(row.probability < min_confidence))]
        writer.writerow([row.path, row.true, row.label, probability, row.error, *abstained, *numbers])


def read(file: Path) -> Iterator[Prediction]:
    """Reads back, one by one, what `write` has written without a `min_confidence`."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream)
        next(rows)
        for path, true, label, probability, error, *numbers in rows:
            probabilities = () if error else tuple(map(float, numbers))
            yield Prediction(path, label, float(probability or 0), probabilities, error, true)
