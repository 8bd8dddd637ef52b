"""Runs side by side, on the pictures that all of them have predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project import bundle, curves, figures, page, results, runs, scores
from project.errors import UserError
from project.predictor import load
from project.results import Results, Table


@dataclass(frozen=True)
class Other:
    """A run beside the one that the page is about.

    Attributes:
        name: As it is called on the page.
        test: Its predictions on the test pictures.
        curves: What its fit logged.
    """

    name: str
    test: Table
    curves: dict[str, curves.Curve]

    @classmethod
    def of(cls, given: str, data: str | None = None) -> "Other":
        """The run of a checkpoint, or in a folder; or a bundle, which is asked now.

        Args:
            given: Its path.
            data: Where the pictures of a bundle are; None means where its run had them.

        Raises:
            UserError: It has not been tested.
        """
        if bundle.is_bundle(given):
            found = results.of_bundle(Path(given), load(given), data)
            return cls(_name(found.run), found.test, found.curves)
        checkpoint = runs.find(given)
        run = runs.folder_of(checkpoint)
        if not (run / results.TEST).exists():
            raise UserError(f"{given} has not been tested; run: python -m project.cli test --ckpt_path {checkpoint}")
        file = run / curves.METRICS
        return cls(_name(run), results.read(run / results.TEST), curves.curves(file) if file.exists() else {})


def content(found: Results, others: Sequence[Other]) -> dict[str, Any]:
    """What the template shows.

    Raises:
        UserError: The runs have other classes, no picture in common, or do not agree what the pictures are.
    """
    own = Other(_name(found.run), found.test, found.curves)
    everyone = [own, *others]
    samples = shared(everyone, found.positive)
    rows: list[dict[str, Any]] = []
    own_figures = samples[0].figures()
    gaps = [scores.differences(samples[0], sample) for sample in samples[1:]]
    for name in own_figures:
        cells: list[dict[str, Any]] = [{"value": page.figure(name, own_figures[name]), "difference": ""}]
        for sample, gap in zip(samples[1:], gaps, strict=True):
            middle, low, high = gap[name]
            text = (
                f"{_signed(name, middle)} [{_signed(name, low)}, {_signed(name, high)}]" if np.isfinite(middle) else ""
            )
            value = page.figure(name, sample.figures()[name])
            cells.append({"value": value, "difference": text, "sure": low > 0 or high < 0})
        rows.append({"name": page.NAMES.get(name, name), "cells": cells})
    fits = {other.name: other.curves for other in everyone if other.curves}
    return {
        "shared": f"{len(samples[0].true):,}",
        "first": own.name,
        "names": [other.name for other in everyone],
        "rows": rows,
        "curves": page.drawing(
            lambda: figures.learning_curves(fits),
            f"Learning curves of {', '.join(fits)}.",
            "Training dashed, validation solid.",
        )
        if fits
        else None,
    }


def shared(everyone: Sequence[Other], positive: int | None) -> list[scores.Sample]:
    """The same pictures of each run, in the same order."""
    own = everyone[0]
    for other in everyone[1:]:
        if other.test.class_names != own.test.class_names:
            raise UserError(
                f"{own.name} and {other.name} have different classes and cannot be compared: "
                f"{', '.join(own.test.class_names)}; {', '.join(other.test.class_names)}."
            )
    places = [{path: place for place, path in enumerate(other.test.paths)} for other in everyone]
    paths = [path for path in own.test.paths if all(path in place for place in places)]
    if not paths:
        raise UserError(
            f"{' and '.join(other.name for other in everyone)} have no test picture in common; "
            "train them with the same --data.split or seed, and test them with the same --data.root."
        )
    samples = []
    for other, place in zip(everyone, places, strict=True):
        rows = np.array([place[path] for path in paths])
        samples.append(scores.Sample(other.test.true[rows], other.test.probabilities[rows], positive))
        if (differ := np.flatnonzero(samples[-1].true != samples[0].true)).size:
            raise UserError(f"{own.name} and {other.name} do not agree what {paths[differ[0]]} is; test both again.")
    return samples


def _name(run: Path) -> str:
    run = run.resolve()
    return f"{run.parent.name}/{run.name}"


def _signed(name: str, value: float) -> str:
    return f"{100 * value:+.1f}" if name in page.SHARES else f"{value:+.3f}"
