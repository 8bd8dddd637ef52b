"""The results of a tested run: predictions, learning curves, temperature. Missing predictions are computed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import runs
from project.data import shards, splits
from project.errors import UserError, command
from project.evaluation import run_split
from project.evaluation.scores import ScoredPredictions
from project.inference import calibration, predictions
from project.inference.load import Source
from project.inference.metadata import Metadata
from project.inference.predictions import Prediction
from project.inference.predictor import Predictor


@dataclass(frozen=True)
class TestPredictions:
    """Predictions on N images of known classes."""

    class_names: list[str]  # K names
    paths: list[str]
    true: npt.NDArray[np.int64]  # (N,) indices of the classes
    probabilities: npt.NDArray[np.float64]  # (N, K)
    errors: dict[str, str]  # reason by path, of images that could not be read

    @classmethod
    def of(cls, rows: Iterable[Prediction], class_names: list[str], source: str) -> "TestPredictions":
        """Collects predictions; refuses a source without a readable image of a known class."""
        paths, true, probabilities, errors = [], [], [], {}
        for row in rows:
            if row.error:
                errors[row.path] = row.error
            elif row.true:
                paths.append(row.path)
                true.append(class_names.index(row.true))
                probabilities.append(np.array(row.probabilities))
        if not paths:
            raise UserError(f"{source} has no readable image of a known class; there is nothing to report.")
        return cls(class_names, paths, np.array(true), np.stack(probabilities), errors)

    @classmethod
    def read(cls, file: Path) -> "TestPredictions":
        """Reads a predictions.csv; UserError where it is damaged or has no readable image of a known class."""
        try:
            class_names = predictions.read_class_names(file)
            table = cls.of(predictions.read(file), class_names, str(file))
            if table.probabilities.shape[1] != len(class_names):
                raise ValueError("its rows do not fit its header")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}); python -m project.cli test writes it anew.") from error
        return table

    def scored(self, positive: int | None) -> ScoredPredictions:
        """The predictions without their paths."""
        return ScoredPredictions(self.true, self.probabilities, positive)


@dataclass(frozen=True)
class Results:
    """What is known of a trained classifier."""

    source: Source
    metadata: Metadata
    test: TestPredictions
    val: TestPredictions | None  # None for a bundle, or where the images are missing
    temperature: float | None  # fitted on the validation images
    curves: dict[str, runs.Curve]  # what the fit logged over its epochs
    counts: dict[str, dict[str, int]]  # images of each class in each split, by their names; empty where unknown
    measured: dict[str, Any]  # content of test_metrics.json
    notice: str  # a caveat about the test images; empty if there is none
    status: dict[str, Any]  # of the fit; see `runs.read_status`
    folds: Mapping[str, "Results"] = field(default_factory=dict)  # by name, where these are the results of several

    @cached_property
    def scored(self) -> ScoredPredictions:
        """The test predictions, with the positive class of two."""
        from project.metrics import positive_index  # which imports torchmetrics for seconds

        return self.test.scored(positive_index(self.test.class_names, self.metadata.config["model"].get("positive")))

    @property
    def majority(self) -> int:
        """Index of the class with most training images, or, where these are unknown, with most test images."""
        names = self.test.class_names
        counts = [self.counts.get(name, {}).get("train", 0) for name in names]
        return int(np.argmax(counts if any(counts) else np.bincount(self.test.true, minlength=len(names))))


def all_scores(scored: ScoredPredictions, measured: Mapping[str, Any]) -> dict[str, float]:
    """The scores, and what the test has measured besides: metrics of one's own, a loss other than cross-entropy."""
    values = scored.scores() | {"ece": scored.ece()}
    names = [key.removeprefix("test/") for key in measured if key.startswith("test/")]
    own = {name: float(np.nan if measured[f"test/{name}"] is None else measured[f"test/{name}"]) for name in names}
    if np.isclose(own.get("loss", np.nan), values["cross-entropy"], rtol=0.01):
        del own["loss"]
    return values | own | values  # in this order; where both have a name, that of the scores


def table(tested: Mapping[str, Results]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (n - 1) and the value of each run by name, of every figure that all runs have."""
    each = {name: all_scores(result.scored, result.measured) for name, result in tested.items()}
    rows = {}
    for figure in (name for name in next(iter(each.values())) if all(name in values for values in each.values())):
        row = {name: values[figure] for name, values in each.items()}
        rows[figure] = {"mean": float(np.mean([*row.values()])), "sd": float(np.std([*row.values()], ddof=1))} | row
    return rows


def pool(folds: Mapping[str, Results], file: Path) -> Results:
    """Writes the test predictions of all folds into one file; returns their results as those of one test."""
    first = next(iter(folds.values()))
    config = first.metadata.config
    rows = [row for fold in folds.values() for row in predictions.read(fold.source.run / runs.PREDICTIONS)]
    predictions.write(file, sorted(rows), first.test.class_names)
    return replace(
        first,
        source=Source(file, is_bundle=False),
        metadata=replace(first.metadata, config=config | {"data": config["data"] | {"fold": None}}),
        test=TestPredictions.read(file),
        val=None,
        temperature=None,
        counts={},
        measured={"data": first.measured.get("data", "")},
        notice=f"Each was predicted once, by the one of {len(folds)} networks that was trained without it.",
        status={key: sum(fold.status.get(key, 0) for fold in folds.values()) for key in ("seconds", "step")}
        | {"state": "finished"},
        folds=folds,
    )


def gather(source: Source, predictor: Predictor, data: str | None = None) -> Results:
    """Collects the results of a tested checkpoint, or predicts the test images with a bundle.

    What a bundle does not hold is read from the run that it lies in; `data` is its data set, by default the run's.
    UserError where a file is damaged, or there are no test images.
    """
    run, metadata, val, temperature, notice = source.run, predictor.metadata, None, None, ""
    if source.is_bundle:
        images = run_split.images(run, "test", metadata, data)
        pairs = [(path, label) for path, label in images.pairs if shards.is_file(path)]
        if not pairs:
            raise UserError(f"No test image of {source.file} is in {images.root}; give the data's folder by --data.")
        test = TestPredictions.of(_predict(predictor, pairs), predictor.class_names, images.root)
        measured, notice = {"data": images.root}, images.notice
    else:
        test = TestPredictions.read(run / runs.PREDICTIONS)
        if test.class_names != predictor.class_names:
            raise UserError(f"{run}/{runs.PREDICTIONS} is of other classes; run: {command('test', source.file)}")
        measured = _measured(run)
        val = _validation(source.file, predictor, measured)
        temperature, max_logits = _calibrate(source.file, val)
        metadata = replace(metadata, max_logits=max_logits)
    curves, counts, status = runs.curves(run / runs.METRICS), splits.counts(run_split.rows(run)), runs.read_status(run)
    return Results(source, metadata, test, val, temperature, curves, counts, measured, notice, status)


def is_tested(checkpoint: Path, root: str | None = None) -> bool:
    """Whether the predictions in the checkpoint's run are its own, and newer than it."""
    run = runs.folder_of(checkpoint)
    if root is not None:  # also of all test images of the run, from this folder or table
        measured, count = _measured(run), sum(row.split == "test" for row in run_split.rows(run))
        if (measured.get("data"), measured.get("n")) != (root, count):
            return False
    return has_results(checkpoint) and _is_newer(run / runs.PREDICTIONS, checkpoint)


def has_results(checkpoint: Path) -> bool:
    """Whether the results in the folder of the checkpoint are those of a test of this file."""
    return Path(str(_measured(runs.folder_of(checkpoint)).get("checkpoint"))).name == checkpoint.name


def _measured(run: Path) -> dict[str, Any]:
    """The content of test_metrics.json; empty where the file is missing or damaged."""
    try:
        content = json.loads((run / runs.TEST_METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_newer(file: Path, than: Path) -> bool:
    return file.exists() and than.exists() and file.stat().st_mtime >= than.stat().st_mtime


def _predict(predictor: Predictor, pairs: list[tuple[str, str]]) -> Iterator[Prediction]:
    stream = predictor.stream(path for path, _ in pairs)
    return (prediction._replace(true=label) for prediction, (_, label) in zip(stream, pairs, strict=True))


def _validation(checkpoint: Path, predictor: Predictor, measured: dict[str, Any]) -> TestPredictions | None:
    """Predictions on the validation images, from the run or computed now; None if the images are missing."""
    run, is_best = runs.folder_of(checkpoint), checkpoint.name == "best.ckpt"
    file = run / runs.VAL_PREDICTIONS
    if is_best and _is_newer(file, checkpoint):
        return TestPredictions.read(file)
    if not (run / run_split.FILE).is_file() and not run_split.shards_of(run):
        return None
    pairs = run_split.images(run, "val", predictor.metadata, measured.get("data")).pairs
    if not pairs or not all(shards.is_file(path) for path, _ in pairs):
        return None
    rows = list(_predict(predictor, pairs))
    if is_best:
        with suppress(OSError):  # the run may be read-only
            predictions.write(file, rows, predictor.class_names)
    return TestPredictions.of(rows, predictor.class_names, "The validation split")


def _calibrate(checkpoint: Path, val: TestPredictions | None) -> tuple[float | None, list[float]]:
    """The temperature and the maximum logits of the validation images, which are kept beside the checkpoint."""
    if val is None:
        return calibration.read(checkpoint)
    temperature = calibration.fit_temperature(val.true, val.probabilities)
    max_logits = calibration.quantiles(calibration.max_logits(val.probabilities))
    with suppress(OSError):  # the run may be read-only
        calibration.write(checkpoint, temperature, max_logits)
    return temperature, max_logits
