"""predictions.csv: one row a picture, the same columns whoever writes it."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from project import files


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


def write(file: Path, predictions: Iterable[Prediction], class_names: Sequence[str]) -> None:
    """Writes predictions as CSV; the file appears whole or not at all.

    Columns: path, true, label, probability, error, then p:<class> for each class; nine significant digits.
    """
    with files.replacing(file) as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "true", "label", "probability", "error", *(f"p:{name}" for name in class_names)])
        for row in predictions:
            numbers = [f"{p:.9g}" for p in row.probabilities] or [""] * len(class_names)
            probability = "" if row.error else f"{row.probability:.9g}"
            writer.writerow([row.path, row.true, row.label, probability, row.error, *numbers])
