"""The optimiser, its parameter groups and its learning-rate schedule."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Rule = Literal["adam", "adamw", "sgd"]
# The default peak learning rates. Adam's usual 1e-3 is known to be too high for AlexNet, which has no batch norm; 0.01
# is that of torchvision's reference recipe for it.
RATES: dict[Rule, float] = {"adam": 3e-4, "adamw": 3e-4, "sgd": 0.01}
# Under a new head above given weights, which is solved for the data first if it can be; chosen in docs/recipe.md.
FINE_TUNING: dict[str, float] = {"backbone_lr": 0.3, "label_smoothing": 0.1}
FINE_TUNING_RATES: dict[Rule, float] = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.01}
FINE_TUNING_EPOCHS = 12
STAGES = 4  # into which gradual unfreezing divides the backbone, with equally many parameter tensors each


def defaults(rule: Rule, weights: str, fine_tunes: bool) -> dict[str, float]:
    """The options of `Classifier` whose defaults depend on where the weights come from."""
    if fine_tunes:
        return {"lr": FINE_TUNING_RATES[rule], **FINE_TUNING}
    return {"lr": RATES[rule], "backbone_lr": 1.0 if weights == "none" else 0.1, "label_smoothing": 0.0}


def configure(
    network: nn.Module, head: nn.Module, options: Mapping[str, Any], total_steps: float, fused: bool
) -> OptimizerLRSchedulerConfig:
    """Creates the optimiser and its schedule, in which a group's learning rate is a function of the step alone.

    Args:
        network: The whole network.
        head: Its last layer.
        options: `optimizer`, `lr`, `backbone_lr`, `warmup`, `weight_decay` and `freeze` of `Classifier`.
        total_steps: Optimiser steps of the whole fit; may be infinite.
        fused: One kernel for all parameters: a step takes 43 ms instead of 504 at 57 M parameters on two cores.
    """
    groups: list[dict[str, Any]] = []
    factors: list[Callable[[int], float]] = []
    lr, weight_decay = options["lr"], options["weight_decay"]
    for stage, parameters in _stages(network, head, options["freeze"], options["backbone_lr"]):
        start = stage / STAGES / 2 if options["freeze"] == "gradual" else 0.0
        name, rate = (f"below {stage}", lr * options["backbone_lr"]) if stage else ("head", lr)
        for suffix, decay, decays in (("", weight_decay, True), (", no decay", 0.0, False)):
            if members := [p for p in parameters if (p.ndim > 1 or not weight_decay) == decays]:
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": name + suffix})
                factors.append(partial(lr_factor, total=total_steps, warmup=options["warmup"], start=start))
    if len(groups) == 1:
        del groups[0]["name"]
    optimizer = make_optimizer(options["optimizer"], groups, fused)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}


def _stages(
    network: nn.Module, head: nn.Module, freeze: str, backbone_lr: float
) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """The trained parameters: those of the head as stage 0, then of the backbone, whose uppermost stage is 1."""
    if freeze == "none" and backbone_lr == 1:
        yield 0, list(network.parameters())
        return
    of_head = list(head.parameters())
    below = [p for p in network.parameters() if p.requires_grad and not any(p is other for other in of_head)]
    yield 0, of_head
    stages = STAGES if freeze == "gradual" else 1
    for part in range(stages):
        yield stages - part, below[len(below) * part // stages : len(below) * (part + 1) // stages]


def make_optimizer(rule: Rule, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
    """Creates the optimiser for groups with their own learning rate and weight decay."""
    if rule == "sgd":
        return SGD(groups, momentum=0.9, fused=fused)
    return (Adam if rule == "adam" else AdamW)(groups, fused=fused)


def lr_factor(step: int, total: float, warmup: float, start: float = 0.0) -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine down to a hundredth.

    Args:
        step: Optimiser steps made so far.
        total: Optimiser steps of the whole fit; beyond it, and if it is infinite, the factor stays.
        warmup: Share of `total` (of 1,000 steps if it is infinite) that the rise takes.
        start: Share of the same before which the factor is 0.
    """
    length = total if math.isfinite(total) else 1000
    if step < start * length:
        return 0.0
    rise = max(1.0, warmup * length)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, total - rise))  # 0 if `total` is infinite
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def reset_rates(scheduler: Any, peaks: Sequence[float]) -> None:
    """Sets the rates of a fit that starts from a checkpoint to those of its own options: it may have had others."""
    if isinstance(scheduler, LambdaLR) and peaks:  # that of tune is another
        scheduler.base_lrs = list(peaks)
        groups = zip(scheduler.optimizer.param_groups, peaks, scheduler.lr_lambdas, strict=True)
        for group, peak, factor in groups:
            group["initial_lr"], group["lr"] = peak, peak * factor(scheduler.last_epoch)
