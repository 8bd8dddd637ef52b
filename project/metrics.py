"""The metrics: one definition for validation, test and report. A further one is one line in `metrics`.

The article's own precision and recall compare a (B, 1) with a (B,) tensor, which broadcasts to (B, B), and its AUC
ranks a raw logit; tests/test_metrics.py shows what that gives. scikit-learn's definitions are the reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Accuracy, F1Score, Metric, MetricCollection, Precision, Recall
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC, MulticlassStatScores
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from project.errors import UserError


def metrics(class_names: Sequence[str], positive: str | None = None) -> MetricCollection:
    """Accuracy, precision, recall, F1 and AUROC; update with probabilities (B, K) and label (B,).

    Two classes: binary metrics of the positive class. More: accuracy over all images, the others macro averages
    over the classes that have images. AUROC is exact (all predictions are stored).

    Args:
        class_names: K names.
        positive: The positive class of two; by default the second.

    Raises:
        UserError: `positive` is not among the names, or there are not two of them.
    """
    index, classes = positive_index(class_names, positive), len(class_names)
    # validate_args would read the values, which waits for the device at every step
    unchecked: dict[str, Any] = {"validate_args": False}
    task = unchecked | {"task": "binary"}
    if index is None:
        task |= {"task": "multiclass", "num_classes": classes}
    return Probabilities(
        {
            "accuracy": Accuracy(**task | {"average": "micro"}),
            "precision": PresentScore(classes, 1, 0) if index is None else Precision(**task),
            "recall": PresentScore(classes, 0, 1) if index is None else Recall(**task),
            "f1": PresentScore(classes, 0.5, 0.5) if index is None else F1Score(**task),
            "auroc": PresentAUROC(classes, **unchecked) if index is None else PositiveAUROC(**unchecked),
        },
        index,
    )


def positive_index(class_names: Sequence[str], positive: str | None) -> int | None:
    """Index of the positive class of two, as in `metrics`; None if there are more classes."""
    if positive is not None and (len(class_names) != 2 or positive not in class_names):
        raise UserError(
            f"--model.positive {positive} must be one of two classes; the data has {', '.join(class_names)}."
        )
    return class_names.index(positive or class_names[1]) if len(class_names) == 2 else None


class Probabilities(MetricCollection):
    """A collection that takes the probabilities of all classes, also if its members take those of the positive one."""

    def __init__(self, members: dict[str, Metric | MetricCollection], positive: int | None) -> None:
        super().__init__(members)
        self.positive = positive

    def update(self, probabilities: Tensor, label: Tensor) -> None:  # type: ignore[override]
        """Adds probabilities (B, K) and label (B,)."""
        if self.positive is not None:
            probabilities, label = probabilities[:, self.positive], (label == self.positive).long()
        super().update(probabilities, label)


class Mean(Metric):
    """A mean that propagates NaN, which torchmetrics' MeanMetric drops and waits for the device to find."""

    full_state_update = False
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


class PresentScore(MulticlassStatScores):
    """Precision, recall or F1 by the weights of false positives and negatives; the mean of the classes with images."""

    def __init__(self, classes: int, *weights: float) -> None:
        super().__init__(classes, average="none", validate_args=False)
        self.weights = weights

    def compute(self) -> Tensor:
        right, alarms, _, misses, images = super().compute().T
        each = right / (right + self.weights[0] * alarms + self.weights[1] * misses)
        return torch.as_tensor(each.nan_to_num()[images > 0].mean())


class PresentAUROC(MulticlassAUROC):
    """One-against-rest AUROC, averaged over the classes that occur; nan where it is undefined.

    torchmetrics' macro average counts a class without samples as 0 (0.377 where 0.498 is right).
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        probabilities, label = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        return torch.stack([_auroc(p, label == c) for c, p in enumerate(probabilities.T)]).nanmean()


class PositiveAUROC(BinaryAUROC):
    """AUROC of the positive class; nan where only one of the two classes occurs (torchmetrics gives 0)."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return _auroc(dim_zero_cat(self.preds), dim_zero_cat(self.target) == 1)


def _auroc(score: Tensor, positive: Tensor) -> Tensor:
    if positive.all() or not positive.any():
        return torch.full((), torch.nan, device=score.device)
    return binary_auroc(score, positive.long())
