"""The last layer by logistic regression: solved to convergence, its penalty chosen on the validation images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from project.data.dataset import Features

PENALTIES = [10 ** (exponent / 2) for exponent in range(2, -11, -1)]  # from 10 down to 1e-5, on the mean loss
PATIENCE = 2  # penalties without a lower validation loss, after which weaker ones are not tried


class Head(NamedTuple):
    """Weights (K, F) and biases (K,) for features as they are, and what they were chosen by."""

    weight: Tensor
    bias: Tensor
    penalty: float
    loss: float


def solve(
    train: Features, val: Features, classes: int, class_weights: Tensor | None = None, smoothing: float = 0.0
) -> Head:
    """Minimises mean cross-entropy + penalty / 2 x |weight|^2 over standardised features, for the best of `PENALTIES`.

    The best has the lowest cross-entropy on the validation images, a natural logarithm. Each solution starts from that
    of the next stronger penalty. The training loss has `class_weights` (K,) and label `smoothing`. Features of both
    splits are standardised by mean and deviation of the training images.
    """
    readable, val_readable = (each.__getitems__([(0, row) for row in range(len(each))]) for each in (train, val))
    values, labels, val_values, val_labels = readable.image, readable.label, val_readable.image, val_readable.label
    mean, scale = values.mean(dim=0), values.std(dim=0, correction=0)
    varies = scale > 1e-6 * mean.abs()
    scale.clamp_min_(scale[varies].median())  # a feature that hardly varies here can be 500 deviations off elsewhere
    scale[~varies] = torch.inf  # the weight 0
    for each in (values, val_values):
        each.sub_(mean).div_(scale)
    weight = torch.zeros(classes, values.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    best, tried = Head(weight, bias, 0.0, float("inf")), 0
    for penalty in PENALTIES:
        solver: Any = torch.optim.LBFGS(
            [weight, bias], max_iter=1000, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
        )

        def objective(penalty: float = penalty) -> Tensor:
            weight.grad = bias.grad = None
            logits = functional.linear(values, weight, bias)
            loss = functional.cross_entropy(logits, labels, class_weights, label_smoothing=smoothing)
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(objective)
        with torch.no_grad():
            loss = functional.cross_entropy(functional.linear(val_values, weight, bias), val_labels).item()
            tried += 1
            if loss < best.loss:
                scaled = weight / scale
                best, tried = Head(scaled, bias - scaled @ mean, penalty, loss), 0
        if tried == PATIENCE:
            break
    return best
