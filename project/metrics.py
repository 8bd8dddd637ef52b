"""The metrics: one definition for validation, test and report. A further one is one line in `metrics`, or an option.

The article's own precision and recall compare a (B, 1) with a (B,) tensor, which broadcasts to (B, B), and its AUC
ranks a raw logit; tests/test_metrics.py shows what that gives. scikit-learn's definitions are the reference.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassStatScores
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from project import parts
from project.errors import UserError, some

UNCHECKED: Any = {"validate_args": False}  # the check would read the values, which waits for the device at every step


class MetricFactory(Protocol):
    """A metric to the command line's parser: a class, without the arguments that `metrics` gives it."""

    def __call__(self, *, num_classes: int, validate_args: bool) -> Metric: ...


def metrics(class_names: Sequence[str], positive: str | None = None, more: Sequence[Any] = ()) -> MetricCollection:
    """Accuracy, precision, recall, F1, AUROC and `more`; update with probabilities (B, K) and label (B,).

    Two classes: binary metrics of the positive class. More: accuracy over all images, the others macro averages
    over the classes that have images. AUROC is exact (all predictions are stored).

    Args:
        class_names: K names.
        positive: The positive class of two; by default the second.
        more: Class paths of further ones, CohenKappa as cohen_kappa; see parts.py.

    Raises:
        UserError: `positive` is not among the names, there are not two of them, or a metric cannot be used.
    """
    index, classes = positive_index(class_names, positive), len(class_names)
    found: dict[str, Metric | MetricCollection] = {
        "accuracy": MulticlassAccuracy(classes, average="micro", **UNCHECKED),
        "precision": Score(classes, index, false_positives=1, false_negatives=0),
        "recall": Score(classes, index, false_positives=0, false_negatives=1),
        "f1": Score(classes, index, false_positives=0.5, false_negatives=0.5),
        "auroc": AUROC(classes, index),
    }
    for entry in more:
        own = parts.part(entry)["class_path"].rpartition(".")[2]
        own = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", own).lower()
        names = (own, *(f"{own}_{number}" for number in range(2, 3 + len(more))))
        found[next(name for name in names if name not in {"loss", *found})] = _own(entry, classes)
    # torchmetrics would let all share their state that happen to be equal after the first batch
    return MetricCollection(found, compute_groups=[["precision", "recall", "f1"]])


def _own(entry: Any, classes: int) -> Metric:
    """A metric by its class path; UserError where it does not make one number of probabilities and labels."""
    option, path = "model.metrics", parts.part(entry)["class_path"]

    def make(**checks: bool) -> Metric:
        made: Metric = parts.make(entry, option, **parts.taken(entry, option, {"num_classes": classes, **checks}))
        return made

    try:
        with warnings.catch_warnings(action="ignore"):
            (trial := make()).update(torch.eye(classes), torch.arange(classes))
            value = trial.compute()
    except UserError:
        raise
    except Exception as error:  # metrics refuse their input in many ways
        raise UserError(
            f"--{option} {path} does not take probabilities (B, {classes}) and labels (B,), as one of the task "
            f"multiclass does: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        made = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"--{option} {path} makes {made} of a split; a metric is one number, as an average is.")
    return make(**UNCHECKED)


def positive_index(class_names: Sequence[str], positive: str | None) -> int | None:
    """Index of the positive class of two, as in `metrics`; None if there are more classes."""
    if positive is not None and (len(class_names) != 2 or positive not in class_names):
        raise UserError(f"--model.positive {positive} must be one of two classes; the data has {some(class_names)}.")
    return class_names.index(positive or class_names[1]) if len(class_names) == 2 else None


class Mean(Metric):
    """A mean that propagates NaN, which torchmetrics' MeanMetric drops and waits for the device to find."""

    full_state_update = higher_is_better = False  # it is that of a loss
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: float) -> None:
        """Adds the sum of some values and their number; earlier sums stay unchanged, as a checkpoint may hold them."""
        self.total = self.total + total.to(self.total.dtype)
        self.count = self.count + count

    def compute(self) -> Tensor:
        return self.total / self.count


class Score(MulticlassStatScores):
    """Precision, recall or F1 of the class with the index `positive`; for None, the mean over the classes that occur.

    It is true positives / (true positives + weighted false positives + weighted false negatives), and nan where no
    image has the class; torchmetrics gives 0.
    """

    higher_is_better = True

    def __init__(self, classes: int, positive: int | None, false_positives: float, false_negatives: float) -> None:
        super().__init__(classes, average="none", **UNCHECKED)
        self.positive, self.false_positives, self.false_negatives = positive, false_positives, false_negatives

    def compute(self) -> Tensor:
        right, alarms, _, misses, images = super().compute().T
        each = (right / (right + self.false_positives * alarms + self.false_negatives * misses)).nan_to_num()
        return _chosen(torch.where(images > 0, each, torch.nan), self.positive)


class AUROC(MulticlassAUROC):
    """AUROC of the class with the index `positive`, or, for None, the mean over the classes that occur.

    It is nan where it is undefined; torchmetrics gives 0, also in its macro average (0.377 where 0.498 is right).
    """

    def __init__(self, classes: int, positive: int | None) -> None:
        super().__init__(classes, **UNCHECKED)
        self.positive = positive

    def compute(self) -> Tensor:  # type: ignore[override]
        probabilities, label = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        return _chosen(torch.stack([_auroc(p, label == c) for c, p in enumerate(probabilities.T)]), self.positive)


def _chosen(each: Tensor, positive: int | None) -> Tensor:
    return each.nanmean() if positive is None else each[positive]


def _auroc(score: Tensor, positive: Tensor) -> Tensor:
    if positive.all() or not positive.any():
        return torch.full((), torch.nan, device=score.device)
    return binary_auroc(score, positive.long())
