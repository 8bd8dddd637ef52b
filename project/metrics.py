"""Which figures are measured: one definition for validation, test and report.

The article's own precision and recall compare a (B, 1) with a (B,) tensor, which broadcasts to (B, B), and its AUC
ranks a raw logit; tests/test_metrics.py shows what that gives. scikit-learn's definitions are the reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Accuracy, F1Score, MeanMetric, Metric, MetricCollection, Precision, Recall
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from project.errors import UserError


def metrics(class_names: Sequence[str], positive: str | None = None) -> MetricCollection:
    """Accuracy, precision, recall, F1 and AUROC; update with probabilities (B, K) and label (B,).

    Two classes: binary figures of the positive class. More: accuracy over all pictures, the others macro averages
    over the classes that occur. AUROC is exact (every prediction is kept).

    Args:
        class_names: K names.
        positive: The class that is looked for, of two; by default the second.

    Raises:
        UserError: `positive` is not among the names, or there are not two of them.
    """
    place = positive_index(class_names, positive)
    # validate_args would look at the values, which waits for the device at every step
    task: dict[str, Any] = {"validate_args": False}
    if place is not None:
        task |= {"task": "binary"}
        auroc: Metric = PositiveAUROC(validate_args=False)
    else:
        task |= {"task": "multiclass", "num_classes": len(class_names), "average": "macro"}
        auroc = PresentAUROC(len(class_names), validate_args=False)
    return Probabilities(
        {
            "accuracy": Accuracy(**task | {"average": "micro"}),
            "precision": Precision(**task),
            "recall": Recall(**task),
            "f1": F1Score(**task),
            "auroc": auroc,
        },
        place,
    )


def positive_index(class_names: Sequence[str], positive: str | None) -> int | None:
    """Place of the positive class of two; None where there are more than two classes.

    Raises:
        UserError: `positive` is not among the names, or there are not two of them.
    """
    if positive is not None and (len(class_names) != 2 or positive not in class_names):
        raise UserError(
            f"--model.positive {positive} must be one of two classes; the data has {', '.join(class_names)}."
        )
    if len(class_names) != 2:
        return None
    return class_names.index(positive) if positive is not None else 1


class Probabilities(MetricCollection):
    """A collection that is given all classes' probabilities, also where its members want the positive one's."""

    def __init__(self, members: dict[str, Metric | MetricCollection], positive: int | None) -> None:
        super().__init__(members)
        self.positive = positive

    def update(self, probabilities: Tensor, label: Tensor) -> None:  # type: ignore[override]
        """Adds probabilities (B, K) and label (B,)."""
        if self.positive is not None:
            probabilities, label = probabilities[:, self.positive], (label == self.positive).long()
        super().update(probabilities, label)


class Mean(MeanMetric):
    """A weighted mean in which a value that is no number shows.

    torchmetrics' own leaves such values out, and looks for them at every update, which waits for the device; told not
    to, it forgets the weights (nan_strategy="disable" in 1.9).
    """

    def update(self, value: Tensor, weight: float = 1.0) -> None:  # type: ignore[override]
        """Adds values of any shape, each of this weight."""
        self.mean_value = self.mean_value + value.to(self.mean_value.dtype).sum() * weight
        self.weight = self.weight + weight * value.numel()

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Sum of weighted values, and of weights; tensors that later updates leave as they are."""
        return self.mean_value, self.weight

    @sums.setter
    def sums(self, sums: tuple[float, float]) -> None:
        self.mean_value, self.weight = (torch.tensor(number, device=self.device) for number in sums)
        self._update_count = 1


class PresentAUROC(MulticlassAUROC):
    """One-against-rest AUROC, averaged over the classes that occur; nan where it is undefined.

    torchmetrics' macro average counts a class without samples as 0 (0.377 where 0.498 is right).
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """The average, a scalar."""
        probabilities, label = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        return torch.stack([_auroc(p, label == c) for c, p in enumerate(probabilities.T)]).nanmean()


class PositiveAUROC(BinaryAUROC):
    """AUROC of the positive class; nan where only one of the two classes occurs (torchmetrics gives 0)."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """The area, a scalar."""
        return _auroc(dim_zero_cat(self.preds), dim_zero_cat(self.target) == 1)


def _auroc(score: Tensor, positive: Tensor) -> Tensor:
    if positive.all() or not positive.any():
        return torch.full((), torch.nan, device=score.device)
    return binary_auroc(score, positive.long())
