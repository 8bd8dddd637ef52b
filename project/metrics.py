"""Which figures are measured: one definition for validation, test and report.

The article's own precision and recall compare a (B, 1) with a (B,) tensor, which broadcasts to (B, B), and its AUC
ranks a raw logit; tests/test_metrics.py shows what that gives. scikit-learn's definitions are the reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import AUROC, Accuracy, F1Score, MetricCollection, Precision, Recall
from torchmetrics.classification import MulticlassAUROC
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
    if place is not None:
        task: dict[str, object] = {"task": "binary", "validate_args": False}
        accuracy, auroc = Accuracy(**task), AUROC(**task)
    else:
        task = {"task": "multiclass", "num_classes": len(class_names), "average": "macro", "validate_args": False}
        accuracy, auroc = Accuracy(**task | {"average": "micro"}), PresentAUROC(len(class_names), validate_args=False)
    return _Probabilities(
        {
            "accuracy": accuracy,
            "precision": Precision(**task),
            "recall": Recall(**task),
            "f1": F1Score(**task),
            "auroc": auroc,
        },
        positive=place,
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


class _Probabilities(MetricCollection):
    """A collection that is given all classes' probabilities, also where its metrics want the positive one's."""

    def __init__(self, members: dict[str, object], positive: int | None) -> None:
        super().__init__(members)
        self.positive = positive

    def update(self, probabilities: Tensor, label: Tensor) -> None:
        if self.positive is not None:
            probabilities, label = probabilities[:, self.positive], (label == self.positive).long()
        super().update(probabilities, label)


class PresentAUROC(MulticlassAUROC):
    """One-against-rest AUROC, averaged over the classes for which it is defined; nan where there is none.

    torchmetrics' macro average counts a class without samples as 0 (0.377 where 0.498 is right).
    """

    def compute(self) -> Tensor:
        probabilities, label = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        present = [c for c in label.unique().tolist() if bool((label != c).any())]
        if not present:
            return torch.tensor(torch.nan, device=label.device)
        return torch.stack([binary_auroc(probabilities[:, c], (label == c).long()) for c in present]).mean()
