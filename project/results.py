"""What a run has left, read back: predictions, curves, split, state; what is missing is made."""

import csv
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from project import calibration, curves, predictions, runs
from project.data import manifest
from project.data.folders import Findings
from project.data.splits import SPLITS, Row
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
        notice: What must be known of the test pictures; empty where nothing must.
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
    notice: str
    status: dict[str, Any]

    @property
    def positive(self) -> int | None:
        """Place of the class that is looked for, of two."""
        return positive(self.metadata)

    @property
    def majority(self) -> int:
        """Place of the class with most training pictures; where that is unknown, with most test pictures."""
        names, train = self.test.class_names, self.counts.get("train", {})
        known = [train.get(name, 0) for name in names]
        return int(np.argmax(known if any(known) else np.bincount(self.test.true, minlength=len(names))))


def positive(metadata: dict[str, Any]) -> int | None:
    """Place of the class that a network of two looks for: as its run chose it, or the second."""
    names, chosen = metadata["class_names"], metadata["config"]["model"].get("positive")
    return None if len(names) != 2 else names.index(chosen) if chosen in names else 1


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
        counts(run),
        measured,
        "",
        runs.status(run),
    )


def of_bundle(folder: Path, predictor: Predictor, data: str | None) -> Results:
    """What a bundle answers on the test pictures; the rest is from the run that it lies in, if it does.

    Args:
        folder: The bundle.
        predictor: It, loaded.
        data: The data set's folder or table; None means where the run had it.

    Raises:
        UserError: There are no test pictures.
    """
    run = folder.absolute().parent
    chosen = pictures(run, "test", predictor.metadata, data)
    there = [(path, label) for path, label in chosen.pairs if Path(path).is_file()]
    if not there:
        none = f"None of the {len(chosen.pairs):,} test pictures of {folder} is in {chosen.root}"
        raise UserError(f"{none}; give a data set's folder by --data.")
    return Results(
        folder,
        folder,
        predictor.metadata,
        _answers(predictor, there),
        None,
        None,
        curves.curves(run / curves.METRICS) if (run / curves.METRICS).exists() else {},
        counts(run),
        {"data": str(chosen.root)},
        chosen.notice,
        runs.status(run),
    )


class Pictures(NamedTuple):
    """Those of one split: path and class of each, the data set's folder or table, and what must be known of them."""

    pairs: list[tuple[str, str]]
    root: str
    notice: str


def pictures(run: Path, split: str, metadata: dict[str, Any], data: str | None) -> Pictures:
    """The pictures of one split; which these are, the run's split.csv says, and without it the run's options.

    Args:
        run: Where split.csv may be.
        split: train, val or test.
        metadata: Of the run's checkpoint, or of a bundle.
        data: The data set's folder or table; None means where the run had it.

    Raises:
        UserError: They are of classes that the network does not know, or which they are cannot be found out.
    """
    options, notice = metadata["config"]["data"], ""
    place = data or options.get("root")
    root = Path(place or "")
    try:
        is_there = bool(place) and root.exists()
    except OSError as error:
        raise UserError(f"Cannot read {root}: {error.strerror}; give the pictures' folder by --data.") from error
    if (run / SPLIT).is_file():
        pairs = [(row.path, row.label) for row in _split(run) if row.split == split]
    elif is_there:
        chosen: dict[str, Any] = {name: options.get(name) for name in ("group", "folds", "fold")}
        chosen |= {name: Path(options[name]) for name in ("split", "exclude") if options.get(name)}
        found = manifest.load(root, seed=options.get("split_seed") or 0, **chosen)
        pairs = [(found.paths[row], found.class_names[found.labels[row]]) for row in found.rows(split).tolist()]
        notice = (
            f"There is no {SPLIT} beside it: the pictures were dealt out again, as its training did. Where some have "
            f"come or gone since, it may have learned from some of these {split} pictures."
        )
    else:
        pairs = []
    if strange := sorted({label for _, label in pairs} - set(metadata["class_names"])):
        raise UserError(
            f"The pictures of {place} are of other classes ({', '.join(strange[:4])}) than the network knows "
            f"({', '.join(metadata['class_names'][:4])}); give a folder of these by --data."
        )
    folder = root.parent if root.is_file() else root
    return Pictures([(str(folder / path), label) for path, label in pairs], place or "no known folder", notice)


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


def _split(run: Path) -> list[Row]:
    file = run / SPLIT
    return manifest.read_csv(file, {"path", "label", "split"}, Findings()) if file.is_file() else []


def counts(run: Path) -> dict[str, dict[str, int]]:
    """Pictures of each class in each split, from the run's split.csv; none where it has none."""
    rows = _split(run)
    return {split: dict(Counter(row.label for row in rows if row.split == split)) for split in SPLITS}


def _predict(file: Path, predictor: Predictor, pairs: list[tuple[str, str]]) -> None:
    stream = predictor.stream(path for path, _ in pairs)
    labelled = (prediction.labelled(label) for prediction, (_, label) in zip(stream, pairs, strict=True))
    predictions.write(file, labelled, predictor.class_names)


def _answers(predictor: Predictor, pairs: list[tuple[str, str]]) -> Table:
    """Predictions that are not kept."""
    try:
        with tempfile.TemporaryDirectory(prefix="report-") as folder:
            _predict(Path(folder, TEST), predictor, pairs)
            return read(Path(folder, TEST))
    except OSError as error:
        raise UserError(f"The predictions need room in {tempfile.gettempdir()}: {error.strerror}.") from error


def _validation(checkpoint: Path, predictor: Predictor, measured: dict[str, Any]) -> Table | None:
    """Predictions on the validation pictures: kept in the run, or made now; None without the pictures."""
    run = runs.folder_of(checkpoint)
    file = run / VALIDATION
    if checkpoint.name == "best.ckpt" and _is_newer(file, checkpoint):
        return read(file)
    if not (run / SPLIT).is_file():
        return None
    pairs = pictures(run, "val", predictor.metadata, measured.get("data")).pairs
    if not pairs or not all(Path(path).exists() for path, _ in pairs):
        return None
    try:
        _predict(file, predictor, pairs)
    except OSError as error:
        print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
        return _answers(predictor, pairs)
    return read(file)


def _temperature(checkpoint: Path, val: Table | None) -> float | None:
    """Found on the validation pictures and kept beside the checkpoint; None where none can be found."""
    if val is None:
        return calibration.read(checkpoint)
    temperature = calibration.fit_temperature(val.true, val.probabilities)
    if temperature is None:
        calibration.forget(checkpoint)
        return None
    warm = Sample(val.true, calibration.at_temperature(val.probabilities, temperature))
    before, after = val.sample(None), warm
    figures = {"n": float(len(val.true)), "ece_before": before.ece(), "ece_after": after.ece()}
    losses = {"loss_before": before.figures()["loss"], "loss_after": after.figures()["loss"]}
    try:
        calibration.write(checkpoint, temperature, figures | losses)
    except OSError as error:
        print(f"the temperature cannot be kept beside {checkpoint}: {error.strerror}", file=sys.stderr)
    return temperature
