"""The losses: logits (B, K) and labels to the sum over the images of a batch.

In training with the weights of --data.balance loss and --model.label_smoothing; val/loss and test/loss without.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from project import parts
from project.errors import UserError

Name = Literal["cross_entropy", "focal", "bce"]


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Sum over the images of the loss for logits (B, K), target (B,), mixed (B, K), and the weights of classes (K,)."""
    return functional.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=smoothing)


def focal(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy in which a class with the probability p counts (1 - p) ** 2 (arXiv:1708.02002)."""
    logs = logits.float().log_softmax(dim=1)
    each = _shares(logits, target, smoothing) * (1 - logs.exp()) ** 2 * -logs
    return (each if weight is None else each * weight).sum()


def bce(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Mean over the classes of the binary cross-entropy of each against the rest; an image has its class's weight."""
    shares = _shares(logits, target, smoothing)
    each = functional.binary_cross_entropy_with_logits(logits.float(), shares, reduction="none").mean(dim=1)
    return (each if weight is None else each * (shares * weight).sum(dim=1)).sum()


def _shares(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The target (B, K), smoothed as torch's cross-entropy does."""
    classes = logits.shape[1]
    if target.ndim == 1:
        target = target[:, None] == torch.arange(classes, device=target.device)
    return target * (1 - smoothing) + smoothing / classes


class Loss:
    """The loss of a class path, called as those above; the sum of what it makes of each image.

    It gets the weights of the classes and the smoothing as torch's losses do, by its arguments; UserError where it has
    none for what is given, or does not take the targets.
    """

    def __init__(self, entry: Any, classes: int, weight: Tensor | None, smoothing: float, mix: str) -> None:
        option, path = "model.loss", entry["class_path"]
        given = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
        takes = parts.taken(entry, option, given)
        words = {"weight": "--data.balance loss"} if weight is not None else {}
        words |= {"label_smoothing": f"--model.label_smoothing {smoothing:g}"} if smoothing else {}
        for name in words.keys() - takes.keys():
            raise UserError(f"{words[name]} does nothing in --{option} {path}, which takes no {name}; leave it out.")
        self._training = parts.make(entry, option, **takes)
        plain = {"weight": None, "label_smoothing": 0.0, "reduction": "none"}
        self._plain = parts.make(entry, option, **parts.taken(entry, option, plain))
        if any(True for _ in self._training.parameters()):
            raise UserError(f"--{option} {path} has weights of its own, which no optimizer trains.")
        logits, targets = torch.eye(2, classes, requires_grad=True), {"labels (B,)": torch.arange(2)}
        if mix != "none":
            targets[f"the labels (B, {classes}) of --model.mix {mix}"] = torch.eye(2, classes)
        for kind, target in targets.items():
            try:
                loss = self._training(logits, target)
            except Exception as error:  # losses refuse their input in many ways
                reason = " ".join(str(error).split())
                raise UserError(f"--{option} {path} does not take {kind}: {reason}") from error
            if not isinstance(loss, torch.Tensor) or loss.shape[:1] not in ((), (2,)) or not loss.requires_grad:
                raise UserError(f"--{option} {path} makes no loss: neither a mean nor (B,), with a gradient.")

    def __call__(self, logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
        module = self._plain if weight is None and not smoothing else self._training
        loss: Tensor = module.to(logits.device)(logits.float(), target)
        return loss.mean() * len(target)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]]
LOSSES = {"cross_entropy": cross_entropy, "focal": focal, "bce": bce}
