"""How good predictions are, from arrays alone: scores, curves, bootstrap intervals, and how they are written.

The definitions are those of metrics.py; tests compare both with scikit-learn. Here each image has a weight, so that a
thousand bootstrap samples take about a second.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from project.inference import calibration

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]
REPEATS = 1000
BINS = 15  # of confidence, as in Guo et al. 2017
NAMES = {"auroc": "AUROC", "f1": "F1", "brier": "Brier score", "ece": "ECE"}
SHARES = ("accuracy", "precision", "recall")  # written as percentages


@dataclass(frozen=True)
class ScoredPredictions:
    """Predictions and the true classes."""

    true: Integers  # (N,) indices of the true classes
    probabilities: Floats  # (N, K)
    positive: int | None = None  # index of the positive class of two; None to score each class against the rest

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) indices of the likeliest classes; of equally likely ones, the first, as in predictions.csv."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def confidence(self) -> Floats:
        """(N,) probability of the likeliest class."""
        return np.asarray(self.probabilities.max(axis=1))

    @cached_property
    def ranked(self) -> dict[int, "RankedScores"]:
        """The probabilities of each class by its index, or of the positive class only, sorted."""
        columns = range(self.probabilities.shape[1]) if self.positive is None else [self.positive]
        return {column: RankedScores(self.probabilities[:, column], self.true == column) for column in columns}

    @cached_property
    def _losses(self) -> tuple[Floats, Floats]:
        own = self.probabilities[np.arange(len(self.true)), self.true]
        squares = (self.probabilities**2).sum(axis=1) - 2 * own + 1
        return -np.log(np.maximum(own, calibration.SMALLEST)), squares

    def at_temperature(self, temperature: float) -> "ScoredPredictions":
        """The same predictions as if the logits had been divided by a temperature."""
        return replace(self, probabilities=calibration.at_temperature(self.probabilities, temperature))

    def constant(self, index: int) -> "ScoredPredictions":
        """The same images, all predicted as one class."""
        return replace(self, probabilities=np.eye(self.probabilities.shape[1])[np.full(len(self.true), index)])

    def confusion(self, weight: Floats | None = None) -> Floats:
        """(K, K) images by true class (rows) and predicted class (columns)."""
        classes = self.probabilities.shape[1]
        cells = np.bincount(self.true * classes + self.predicted, weight, classes**2)
        return cells.reshape(classes, classes).astype(np.float64)

    def per_class(self, weight: Floats | None = None) -> dict[str, Floats]:
        """Images, precision, recall and F1 of each class, (K,); 0 where a score is undefined."""
        counts = self.confusion(weight)
        correct, support, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        return {
            "support": support,
            "precision": correct / np.maximum(predicted, 1e-12),
            "recall": correct / np.maximum(support, 1e-12),
            "f1": 2 * correct / np.maximum(support + predicted, 1e-12),
        }

    def aurocs(self, weight: Floats | None = None) -> Floats:
        """(K,) exact area under each class's ROC curve, or (1,) of the positive class; nan where undefined."""
        return np.array([ranked.auroc(weight) for ranked in self.ranked.values()])

    def scores(self, weight: Floats | None = None) -> dict[str, float]:
        """All scores by name, macro averages over the classes that occur; `weight` (N,): how often an image counts."""
        each, aurocs = self.per_class(weight), self.aurocs(weight)
        absent = np.where(each["support"] > 0, 0.0, np.nan)
        averaged: Any = absent == 0 if self.positive is None else [self.positive]
        losses, squares = self._losses
        return {
            "accuracy": float(np.average(self.predicted == self.true, weights=weight)),
            **{name: float((each[name] + absent)[averaged].mean()) for name in ("precision", "recall", "f1")},
            "auroc": float(np.nanmean(aurocs)) if np.isfinite(aurocs).any() else np.nan,
            "cross-entropy": float(np.average(losses, weights=weight)),
            "brier": float(np.average(squares, weights=weight)),
        }

    def bins(self) -> tuple[Floats, Floats, Floats]:
        """Images, mean confidence and accuracy in each of `BINS` bins of confidence; nan in an empty bin."""
        index = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        count, confidence = np.bincount(index, minlength=BINS), np.bincount(index, self.confidence, BINS)
        correct = np.bincount(index, self.predicted == self.true, BINS)
        with np.errstate(invalid="ignore"):
            return count.astype(np.float64), confidence / count, correct / count

    def ece(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy."""
        count, confidence, accuracy = self.bins()
        return float(np.nansum(count * np.abs(confidence - accuracy)) / count.sum())

    def coverage(self) -> tuple[Floats, Floats, Floats]:
        """Abstaining below a confidence: share of images that are kept, accuracy on them, and that confidence."""
        ranked = RankedScores(self.confidence, self.predicted == self.true)
        correct, wrong = ranked.counts()
        kept = correct + wrong
        return (kept / kept[-1])[1:], correct[1:] / kept[1:], ranked.thresholds


class RankedScores:
    """Probabilities (N,) of a class, sorted once for all curves and bootstrap samples; `positive` images are of it."""

    def __init__(self, score: Floats, positive: npt.NDArray[np.bool_]) -> None:
        self.order = np.argsort(-score, kind="stable")
        score, self.positive = score[self.order], positive[self.order]
        last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # of equal scores
        self.thresholds, self.above = score[last], np.insert(last + 1, 0, 0)

    def counts(self, weight: Floats | None = None) -> tuple[Floats, Floats]:
        """True and false positives at each threshold, from the highest, after (0, 0)."""
        weights = np.ones(len(self.order)) if weight is None else weight[self.order]
        hits = np.cumsum(np.append(0.0, weights * self.positive))[self.above]
        return hits, np.cumsum(np.append(0.0, weights))[self.above] - hits

    def auroc(self, weight: Floats | None = None) -> float:
        """Area under the ROC curve; nan where all images are of the class, or none."""
        hits, alarms = self.counts(weight)
        return float(np.trapezoid(hits, alarms) / hits[-1] / alarms[-1]) if hits[-1] and alarms[-1] else np.nan

    def roc(self) -> tuple[Floats, Floats]:
        """False and true positive rate at each threshold, after the point (0, 0)."""
        hits, alarms = self.counts()
        return alarms / max(alarms[-1], 1), hits / max(hits[-1], 1)

    def precision_recall(self) -> tuple[Floats, Floats]:
        """Recall and precision at each threshold."""
        hits, alarms = self.counts()
        return hits[1:] / max(hits[-1], 1), hits[1:] / (hits + alarms)[1:]

    def average_precision(self) -> float:
        """Mean precision over recall; nan where no image is of the class."""
        recall, precision = self.precision_recall()
        return float((np.diff(recall, prepend=0.0) * precision).sum()) if self.positive.any() else np.nan


def intervals(sample: ScoredPredictions) -> dict[str, tuple[float, float]]:
    """95 % intervals of the scores, by resampling the images (percentile bootstrap)."""
    return {name: _interval(values) for name, values in _resampled(sample).items()}


def differences(first: ScoredPredictions, second: ScoredPredictions) -> dict[str, tuple[float, float, float]]:
    """Second minus first on the same images: the difference, and its 95 % interval by resampling the pairs."""
    before, after, draws = first.scores(), second.scores(), [_resampled(first), _resampled(second)]
    return {name: (after[name] - before[name], *_interval(draws[1][name] - draws[0][name])) for name in before}


def _resampled(sample: ScoredPredictions) -> dict[str, Floats]:
    """The scores of many samples drawn with replacement: the same images for all predictions on N images."""
    random, count = np.random.default_rng(0), len(sample.true)
    repeats = min(REPEATS, max(200, 200_000_000 // sample.probabilities.size))  # 38 s for 50,000 of 100 classes
    draws = (np.bincount(random.integers(count, size=count), minlength=count) for _ in range(repeats))
    scores = [sample.scores(draw.astype(np.float64)) for draw in draws]
    return {name: np.array([score[name] for score in scores]) for name in scores[0]}


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values, (2.5, 97.5)) if np.isfinite(values).any() else (np.nan, np.nan)
    return float(low), float(high)


def decimals(name: str, *values: float) -> int:
    """How many decimals a score needs: 1 (percentage), 4 (loss) or 3; more where a value below 1 would read as 1."""
    scale, count = (100, 1) if name in SHARES else (1, 4 if name == "loss" else 3)
    while any(value < 1 and round(scale * value, count) >= scale for value in values):
        count += 1
    return count


def format_score(name: str, *values: float) -> str:
    """Formats a score or the ends of its interval, as `91.2 %`, `0.9999`, `0.9998 to 1.0000`; `-` where undefined."""
    if not all(map(math.isfinite, values)):
        return "-"
    scale, unit = (100, " %") if name in SHARES else (1, "")
    return " to ".join(f"{scale * value:.{decimals(name, *values)}f}" for value in values) + unit


def format_scores(values: Mapping[str, Any]) -> str:
    """Formats scores and their names, which may begin with a split: `val/accuracy 91.2 %  val/f1 0.912`."""
    texts = {name: format_score(name.rpartition("/")[2], float(value)) for name, value in values.items()}
    return "  ".join(f"{NAMES.get(name, name)} {text}" for name, text in texts.items())


def format_difference(name: str, difference: tuple[float, float, float], *values: float) -> str:
    """Formats the difference of two scores and its interval with the decimals of the scores; empty where undefined."""
    if not all(map(math.isfinite, difference)):
        return ""
    scale, count = 100 if name in SHARES else 1, decimals(name, *values)
    middle, low, high = (f"{scale * value:+.{count}f}" for value in difference)
    return f"{middle} [{low}, {high}]"
