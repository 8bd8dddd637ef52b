"""Runs side by side, on the test images that all of them have predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project import runs
from project.errors import UserError, command, some
from project.evaluation import figures, html, results, scores
from project.evaluation.results import Results, TestPredictions
from project.inference.load import locate


@dataclass(frozen=True)
class ComparedRun:
    """A run in the comparison."""

    name: str  # on the page
    test: TestPredictions
    curves: dict[str, runs.Curve]  # what the fit logged over its epochs
    calibration: str = "raw"  # of the probabilities in predictions.csv

    @classmethod
    def of(cls, path: str, data: str | None) -> "ComparedRun":
        """Reads the predictions of a tested run, or predicts with a bundle, on `data` or on the images of its run."""
        source = locate(path)
        if source.is_bundle:
            return cls.own(results.gather(source, source.load(), data))
        run = source.run
        if not results.is_tested(source.file):
            raise UserError(f"{path} has not been tested; run: {command('test', source.file)}")
        return cls(_name(run), TestPredictions.read(run / runs.PREDICTIONS), runs.curves(run / runs.METRICS))

    @classmethod
    def own(cls, result: Results) -> "ComparedRun":
        """The run that a report is about."""
        name = _name(result.source.file if result.source.is_bundle else result.source.run)
        return cls(name, result.test, result.curves, result.metadata.calibration)


def content(result: Results, others: Sequence[ComparedRun]) -> dict[str, Any]:
    """What the template shows."""
    compared = [ComparedRun.own(result), *others]
    samples = shared(compared, result.scored.positive)
    fits = {run.name: run.curves for run in compared if run.curves}
    return {
        "images": len(samples[0].true),
        "names": [f"{run.name} ({run.calibration})" for run in compared],
        "scores": [sample.scores() for sample in samples],
        "differences": [scores.differences(samples[0], sample) for sample in samples[1:]],
        "curves": html.drawing(figures.learning_curves, fits) if fits else None,
    }


def shared(compared: Sequence[ComparedRun], positive: int | None) -> list[scores.ScoredPredictions]:
    """The predictions of each run on the images that all runs have in common, in the same order."""
    own = compared[0]
    for run in compared[1:]:
        if run.test.class_names != own.test.class_names:
            classes = " and ".join(some(r.test.class_names) for r in (own, run))
            raise UserError(f"{own.name} and {run.name} cannot be compared: they have different classes, {classes}.")
    indices = [{path: index for index, path in enumerate(run.test.paths)} for run in compared]
    paths = [path for path in own.test.paths if all(path in index for index in indices)]
    if not paths:
        raise UserError(
            f"{' and '.join(run.name for run in compared)} have no test image in common; "
            "train them with the same --data.split or seed, and test them with the same --data.root."
        )
    samples = []
    for run, index in zip(compared, indices, strict=True):
        rows = np.array([index[path] for path in paths])
        samples.append(scores.ScoredPredictions(run.test.true[rows], run.test.probabilities[rows], positive))
        if (differ := np.flatnonzero(samples[-1].true != samples[0].true)).size:
            raise UserError(f"{own.name} and {run.name} have different labels of {paths[differ[0]]}; test both again.")
    return samples


def _name(run: Path) -> str:
    run = run.resolve()
    return f"{run.parent.name}/{run.name}"
