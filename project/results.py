"""What a run has left, read back: predictions, curves, split, state; what is missing is made."""

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import calibration, curves, predictions, runs
from project.data import manifest
from project.data.splits import SPLITS
from project.errors import UserError
from project.predictor import Predictor
from project.scores import Sample

TEST, VALIDATION, MEASURED, SPLIT = "predictions.csv", "val_predictions.csv", "test_metrics.json", "split.csv"


@dataclass(frozen=True)
class Table:
    """A predictions.csv.

    Attributes:
        class_names: K names.
        paths: Of the N pictures that could be read and whose class is known.
        true: (N,) places of their classes.
        probabilities: (N, K).
        errors: Reason by path of those that could not be read.
    """

    class_names: list[str]
    paths: list[str]
    true: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    errors: dict[str, str]

    def sample(self, positive: int | None) -> Sample:
        """For measuring."""
        return Sample(self.true, self.probabilities, positive)


def read(file: Path) -> Table:
    """Reads a predictions.csv whose true classes are known.

    Raises:
        UserError: It is damaged, or says of no picture what it is.
    """
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = csv.reader(stream)
            columns = next(rows)
            first = min(place for place, name in enumerate(columns) if name.startswith("p:"))
            names = [name.removeprefix("p:") for name in columns[first:]]
            path, true, error = (columns.index(name) for name in ("path", "true", "error"))
            paths, labels, numbers, errors = [], [], [], {}
            for row in rows:
                if row[error]:
                    errors[row[path]] = row[error]
                elif row[true]:
                    paths.append(row[path])
                    labels.append(names.index(row[true]))
                    numbers.append(np.array(row[first:], dtype=np.float64))
        if numbers and {len(row) for row in numbers} != {len(names)}:
            raise ValueError("rows of different length")
    except (OSError, ValueError, StopIteration, IndexError) as trouble:
        raise UserError(
            f"{file} is not a predictions.csv ({trouble}); python -m project.cli test writes it anew."
        ) from trouble
    if not paths:
        raise UserError(f"{file} has no picture that could be read and whose class is known; nothing can be reported.")
    return Table(names, paths, np.array(labels), np.stack(numbers), errors)


@dataclass(frozen=True)
class Results:
    """A run's checkpoint, and how good it is.

    Attributes:
        run: Its folder; of a bundle, the bundle's.
        checkpoint: The file, or the bundle.
        metadata: What the checkpoint says of itself.
        test: Predictions on the test pictures.
        val: On the validation pictures; None where these are not there any more.
        temperature: Found on the latter.
        curves: What the fit logged, over its epochs.
        counts: Pictures of each class in each split, from split.csv.
        measured: test_metrics.json.
        status: How the fit stands; see `runs.status`.
    """

    run: Path
    checkpoint: Path
    metadata: dict[str, Any]
    test: Table
    val: Table | None
    temperature: float | None
    curves: dict[str, curves.Curve]
    counts: dict[str, dict[str, int]]
    measured: dict[str, Any]
    status: dict[str, Any]

    @property
    def positive(self) -> int | None:
        """Place of the class that is looked for, of two."""
        names = self.test.class_names
        chosen = self.metadata["config"]["model"].get("positive")
        return None if len(names) != 2 else names.index(chosen) if chosen in names else 1

    @property
    def majority(self) -> int:
        """Place of the class with most training pictures; where that is unknown, with most test pictures."""
        names, train = self.test.class_names, self.counts.get("train", {})
        known = [train.get(name, 0) for name in names]
        return int(np.argmax(known if any(known) else np.bincount(self.test.true, minlength=len(names))))


def gather(checkpoint: Path, predictor: Predictor) -> Results:
    """Reads a run that has been tested; predicts its validation pictures where that has not been done.

    Args:
        checkpoint: The file.
        predictor: The classifier in it.

    Raises:
        UserError: Something is damaged.
    """
    run = runs.folder_of(checkpoint)
    test = read(run / TEST)
    if test.class_names != predictor.class_names:
        raise UserError(
            f"{run / TEST} is of the classes {', '.join(test.class_names)}, {checkpoint} of "
            f"{', '.join(predictor.class_names)}; run: python -m project.cli test --ckpt_path {checkpoint}"
        )
    measured = json.loads((run / MEASURED).read_text(encoding="utf-8")) if (run / MEASURED).exists() else {}
    val = _validation(checkpoint, predictor, measured)
    return Results(
        run,
        checkpoint,
        predictor.metadata,
        test,
        val,
        _temperature(checkpoint, val),
        curves.curves(run / curves.METRICS) if (run / curves.METRICS).exists() else {},
        _counts(_split(run)),
        measured,
        runs.status(run),
    )


def of_bundle(folder: Path, predictor: Predictor, data: str | None) -> Results:
    """What a bundle answers on the test pictures; the rest is from the run that it lies in, if it does.

    Args:
        folder: The bundle; its predictions are written into it.
        predictor: It, loaded.
        data: The data set's folder or table; None means where the run had it.

    Raises:
        UserError: There are no test pictures.
    """
    run, root = folder.absolute().parent, Path(data or predictor.metadata["config"]["data"].get("root") or "")
    pairs = pictures(run, "test", root)
    there = [(path, label) for path, label in pairs if Path(path).is_file()]
    if not there:
        raise UserError(
            f"None of the {len(pairs):,} test pictures of {folder} is in {root}; give a data set's folder by --data."
        )
    _predict(folder / TEST, predictor, there)
    rows = _split(run)
    return Results(
        folder,
        folder,
        predictor.metadata,
        read(folder / TEST),
        None,
        None,
        curves.curves(run / curves.METRICS) if (run / curves.METRICS).exists() else {},
        _counts(rows),
        {"data": str(root)},
        runs.status(run),
    )


def pictures(run: Path, split: str, root: Path) -> list[tuple[str, str]]:
    """Path and class of the pictures of one split.

    Args:
        run: Where its split.csv may be; without it, the pictures are those that a new fit would take.
        split: train, val or test.
        root: The data set's folder or table.
    """
    if (run / SPLIT).is_file():
        pairs = [(row["path"], row["label"]) for row in _split(run) if row["split"] == split]
    elif root.exists() and str(root) != ".":
        found = manifest.load(root)
        pairs = [(found.paths[row], found.class_names[found.labels[row]]) for row in found.rows(split).tolist()]
    else:
        pairs = []
    folder = root.parent if root.is_file() else root
    return [(str(folder / path), label) for path, label in pairs]


def is_tested(checkpoint: Path) -> bool:
    """Whether the predictions in the checkpoint's run are its own, and newer than it."""
    run = runs.folder_of(checkpoint)
    try:
        measured = json.loads((run / MEASURED).read_text(encoding="utf-8"))
        same = Path(measured["checkpoint"]).name == checkpoint.name
        return same and _is_newer(run / TEST, checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_newer(file: Path, than: Path) -> bool:
    return file.exists() and file.stat().st_mtime >= than.stat().st_mtime


def _split(run: Path) -> list[dict[str, str]]:
    file = run / SPLIT
    if not file.exists():
        return []
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return list(csv.DictReader(stream))


def _counts(rows: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    return {split: dict(Counter(row["label"] for row in rows if row["split"] == split)) for split in SPLITS}


def _predict(file: Path, predictor: Predictor, pairs: list[tuple[str, str]]) -> None:
    stream = predictor.stream(path for path, _ in pairs)
    labelled = (prediction.labelled(label) for prediction, (_, label) in zip(stream, pairs, strict=True))
    predictions.write(file, labelled, predictor.class_names)


def _validation(checkpoint: Path, predictor: Predictor, measured: dict[str, Any]) -> Table | None:
    """Predictions on the validation pictures: kept in the run, or made now; None without the pictures."""
    run = runs.folder_of(checkpoint)
    file = run / VALIDATION
    if checkpoint.name == "best.ckpt" and _is_newer(file, checkpoint):
        return read(file)
    root = Path(measured.get("data") or predictor.metadata["config"]["data"].get("root", ""))
    pairs = pictures(run, "val", root) if (run / SPLIT).is_file() else []
    if not pairs or not all(Path(path).exists() for path, _ in pairs):
        return None
    _predict(file, predictor, pairs)
    return read(file)


def _temperature(checkpoint: Path, val: Table | None) -> float | None:
    """Found on the validation pictures and kept beside the checkpoint; None without them."""
    if val is None:
        return calibration.read(checkpoint)
    temperature = calibration.fit_temperature(val.true, val.probabilities)
    warm = Sample(val.true, calibration.at_temperature(val.probabilities, temperature))
    before, after = val.sample(None), warm
    figures = {"n": float(len(val.true)), "ece_before": before.ece(), "ece_after": after.ece()}
    losses = {"loss_before": before.figures()["loss"], "loss_after": after.figures()["loss"]}
    try:
        calibration.write(checkpoint, temperature, figures | losses)
    except OSError as error:
        print(f"the temperature cannot be kept beside {checkpoint}: {error.strerror}", file=sys.stderr)
    return temperature
