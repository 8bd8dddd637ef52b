"""How good predictions are, from arrays alone, and how sure that is: the report's numbers.

The definitions are those of metrics.py (tests hold both, and scikit-learn, to each other); here each picture has a
weight, which makes a bootstrap of a thousand repeats a matter of a second.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]
REPEATS = 1000
BINS = 15  # of confidence, as in Guo et al. 2017
SMALLEST = 1e-30  # probability whose logarithm is still taken


@dataclass(frozen=True)
class Sample:
    """Predictions and the truth.

    Args:
        true: (N,) places of the true classes.
        probabilities: (N, K).
        positive: Place of the class that is looked for, of two; None for the figures of more than two classes.
    """

    true: Integers
    probabilities: Floats
    positive: int | None = None

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.probabilities.shape[1])

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) places of the likeliest classes; with a positive class, that one from a probability above a half on."""
        if self.positive is None:
            return np.asarray(self.probabilities.argmax(axis=1))
        is_positive = self.probabilities[:, self.positive] > 0.5
        return np.where(is_positive, self.positive, 1 - self.positive)

    @cached_property
    def confidence(self) -> Floats:
        """(N,) probability of the likeliest class."""
        return np.asarray(self.probabilities.max(axis=1))

    @cached_property
    def _ranked(self) -> list["Ranked"]:
        columns = range(self.classes) if self.positive is None else [self.positive]
        return [Ranked(self.probabilities[:, column], self.true == column) for column in columns]

    @cached_property
    def _losses(self) -> tuple[Floats, Floats]:
        own = self.probabilities[np.arange(len(self.true)), self.true]
        squares = (self.probabilities**2).sum(axis=1) - 2 * own + 1
        return -np.log(np.maximum(own, SMALLEST)), squares

    def confusion(self, weight: Floats | None = None) -> Floats:
        """(K, K) pictures by true class (rows) and predicted class (columns)."""
        cells = np.bincount(self.true * self.classes + self.predicted, weight, self.classes**2)
        return cells.reshape(self.classes, self.classes).astype(np.float64)

    def per_class(self, weight: Floats | None = None) -> dict[str, Floats]:
        """Support, precision, recall and F1 of each class, (K,); 0 where undefined."""
        counts = self.confusion(weight)
        right, support, given = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        return {
            "support": support,
            "precision": right / np.maximum(given, 1e-12),
            "recall": right / np.maximum(support, 1e-12),
            "f1": 2 * right / np.maximum(support + given, 1e-12),
            "given": given,
        }

    def aurocs(self, weight: Floats | None = None) -> Floats:
        """Area under the ROC curve, exact: (K,) each class against the rest, or (1,) the positive one; else nan."""
        return np.array([ranked.auroc(weight) for ranked in self._ranked])

    def figures(self, weight: Floats | None = None) -> dict[str, float]:
        """The headline figures.

        Args:
            weight: (N,) how often each picture counts; by default once.
        """
        each = self.per_class(weight)
        shown: Any = self.positive if self.positive is not None else each["support"] + each["given"] > 0
        aurocs = self.aurocs(weight)
        nlls, squares = self._losses
        return {
            "accuracy": float(np.average(self.predicted == self.true, weights=weight)),
            **{name: float(each[name][shown].mean()) for name in ("precision", "recall", "f1")},
            "auroc": float(np.nanmean(aurocs)) if np.isfinite(aurocs).any() else np.nan,
            "loss": float(np.average(nlls, weights=weight)),
            "brier": float(np.average(squares, weights=weight)),
        }

    def bins(self) -> tuple[Floats, Floats, Floats]:
        """Pictures, mean confidence and share of right answers in each of `BINS` bins of confidence; nan if empty."""
        place = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        count, sure = np.bincount(place, minlength=BINS), np.bincount(place, self.confidence, BINS)
        right = np.bincount(place, self.predicted == self.true, BINS)
        with np.errstate(invalid="ignore"):
            return count.astype(np.float64), sure / count, right / count

    def ece(self) -> float:
        """Expected calibration error: how far confidence is from the share of right answers, on average."""
        count, sure, right = self.bins()
        return float(np.nansum(count * np.abs(sure - right)) / count.sum())

    def coverage(self) -> tuple[Floats, Floats, Floats]:
        """What abstaining below a confidence gives: share of pictures answered, accuracy on them, that confidence."""
        order = np.argsort(-self.confidence, kind="stable")
        sure = self.confidence[order]
        last = np.append(sure[1:] != sure[:-1], True)  # pictures of equal confidence are answered together
        answered = np.arange(1, len(order) + 1)
        right = np.cumsum((self.predicted == self.true)[order])
        return (answered / len(order))[last], (right / answered)[last], sure[last]

    def majority(self, place: int) -> "Sample":
        """The same pictures if one class were always the answer."""
        constant = np.zeros_like(self.probabilities)
        constant[:, place] = 1
        return Sample(self.true, constant, self.positive)


class Ranked:
    """One class's scores, sorted once: what all resamples of them need.

    Args:
        score: (N,)
        positive: (N,) bool, whether the picture is of the class.
    """

    def __init__(self, score: Floats, positive: npt.NDArray[np.bool_]) -> None:
        self.order = np.argsort(-score, kind="stable")
        self.score, self.positive = score[self.order], positive[self.order]
        self.last = np.flatnonzero(np.append(self.score[1:] != self.score[:-1], True))  # of equal scores

    def counts(self, weight: Floats | None = None) -> tuple[Floats, Floats]:
        """True and false positives from each distinct score upwards."""
        weights = np.ones(len(self.order)) if weight is None else weight[self.order]
        positive = np.cumsum(weights * self.positive)[self.last]
        return positive, np.cumsum(weights)[self.last] - positive

    def auroc(self, weight: Floats | None = None) -> float:
        """Area under the ROC curve; nan where only one of both occurs."""
        hits, alarms = self.counts(weight)
        if not hits[-1] or not alarms[-1]:
            return np.nan
        heights, widths = np.insert(hits, 0, 0.0), np.diff(alarms, prepend=0.0)
        return float((widths * (heights[1:] + heights[:-1])).sum() / 2 / hits[-1] / alarms[-1])

    def roc(self) -> tuple[Floats, Floats, Floats]:
        """False positive rate, true positive rate, and the threshold of each point after the first, (0, 0)."""
        hits, alarms = self.counts()
        return (
            np.insert(alarms, 0, 0.0) / max(alarms[-1], 1),
            np.insert(hits, 0, 0.0) / max(hits[-1], 1),
            self.score[self.last],
        )

    def precision_recall(self) -> tuple[Floats, Floats]:
        """Recall and precision at each threshold, from the highest."""
        hits, alarms = self.counts()
        return hits / max(hits[-1], 1), hits / (hits + alarms)

    def average_precision(self) -> float:
        """Mean precision over recall; nan where no picture is of the class."""
        recall, precision = self.precision_recall()
        return float((np.diff(recall, prepend=0.0) * precision).sum()) if self.positive.any() else np.nan


def intervals(sample: Sample, repeats: int | None = None, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of the headline figures, by resampling the pictures (percentile bootstrap)."""
    return _middle({name: np.array(values) for name, values in _resampled([sample], repeats, seed)[0].items()})


def differences(
    first: Sample, second: Sample, repeats: int | None = None, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Second minus first on the same pictures: the difference, and its 95 % interval by resampling the pairs."""
    one, two = _resampled([first, second], repeats, seed)
    middle = _middle({name: np.array(two[name]) - np.array(one[name]) for name in one})
    before, after = first.figures(), second.figures()
    return {name: (after[name] - before[name], *middle[name]) for name in before}


def _resampled(samples: list[Sample], repeats: int | None, seed: int) -> list[dict[str, list[float]]]:
    random, count = np.random.default_rng(seed), len(samples[0].true)
    if repeats is None:  # so many that it takes some seconds at most
        repeats = min(REPEATS, max(200, 200_000_000 // samples[0].probabilities.size))
    found: list[dict[str, list[float]]] = [{name: [] for name in sample.figures()} for sample in samples]
    for _ in range(repeats):
        weight = np.bincount(random.integers(count, size=count), minlength=count).astype(np.float64)
        for sample, values in zip(samples, found, strict=True):
            for name, value in sample.figures(weight).items():
                values[name].append(value)
    return found


def _middle(values: dict[str, Floats]) -> dict[str, tuple[float, float]]:
    nothing = (np.nan, np.nan)
    return {
        name: tuple(np.nanpercentile(drawn, (2.5, 97.5)).tolist()) if np.isfinite(drawn).any() else nothing
        for name, drawn in values.items()
    }
