"""The optimiser, its parameter groups and its learning-rate schedule."""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from project import parts
from project.errors import UserError

Rule = Literal["adam", "adamw", "sgd"]
Shape = Literal["cosine", "step", "one-cycle", "plateau", "constant"]
WATCHED = ("val/loss", "min")  # the metric that a plateau is looked for in, and which of its ends is the better one
# The default warm-up of the schedules that are a function of the step; the others have none.
WARMUPS = {"cosine": 0.1, "step": 0.1, "one-cycle": 0.3, "constant": 0.0}
# Options that earlier runs do not have, with what they did.
BEFORE = {"scheduler": "cosine", "layer_decay": 1.0, "loss": "cross_entropy"}
# Class path, arguments, and the default peak learning rate. Adam's usual 1e-3 is known to be too high for AlexNet,
# which has no batch norm; 0.01 is that of torchvision's reference recipe for it.
RULES: dict[str, tuple[str, dict[str, Any], float]] = {
    "adam": ("torch.optim.Adam", {}, 3e-4),
    "adamw": ("torch.optim.AdamW", {}, 3e-4),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9}, 0.01),
}
# Under a new head above given weights, which is solved for the data first if it can be; chosen in docs/recipe.md.
FINE_TUNING: dict[str, float] = {"backbone_lr": 0.3, "label_smoothing": 0.1}
FINE_TUNING_RATES = {"adam": 1e-3, "adamw": 1e-3}
FINE_TUNING_EPOCHS = 12
STAGES = 4  # into which gradual unfreezing divides the backbone, with equally many parameter tensors each


def defaults(options: Mapping[str, Any], weights: str, fine_tunes: bool) -> dict[str, float]:
    """The options of `Classifier` whose defaults depend on others and on where the weights come from."""
    rule, schedule = options["optimizer"], options["scheduler"]
    warmup = WARMUPS.get(schedule, 0.0) if isinstance(schedule, str) else 0.0
    below = FINE_TUNING if fine_tunes else {"backbone_lr": 1.0 if weights == "none" else 0.1, "label_smoothing": 0.0}
    lr = options["lr"]
    if isinstance(rule, str):
        lr = FINE_TUNING_RATES.get(rule, RULES[rule][2]) if fine_tunes else RULES[rule][2]
    elif lr is None:
        lr = getattr(parts.takes(rule, "model.optimizer").get("lr"), "default", None)
    if not isinstance(lr, float | int):
        raise UserError(f"--model.optimizer {rule['class_path']} has no learning rate of its own; give --model.lr.")
    return {"lr": lr, "warmup": warmup, **below}


def configure(
    network: nn.Module, head: nn.Module, options: Mapping[str, Any], total_steps: float, fused: bool
) -> OptimizerLRSchedulerConfig:
    """Creates the optimiser and its schedule; see `_schedule`.

    Args:
        network: The whole network.
        head: Its last layer.
        options: Those of `Classifier`, and `watched` where it is not `WATCHED`.
        total_steps: Optimiser steps of the whole fit; may be infinite.
        fused: One kernel for all parameters: a step takes 43 ms instead of 504 at 57 M parameters on two cores.
    """
    groups: list[dict[str, Any]] = []
    starts: list[float] = []
    weight_decay = options["weight_decay"]
    for stage, parameters in _stages(network, head, options):
        share = options["backbone_lr"] * options["layer_decay"] ** stage if stage else 1.0
        name, rate = f"below {stage}" if stage else "head", options["lr"] * share
        for suffix, decay, decays in (("", weight_decay, True), (", no decay", 0.0, False)):
            if members := [p for p in parameters if (p.ndim > 1 or not weight_decay) == decays]:
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": name + suffix})
                starts.append(stage / STAGES / 2 if options["freeze"] == "gradual" else 0.0)
    if len(groups) == 1:
        del groups[0]["name"]
    optimizer = make_optimizer(options["optimizer"], groups, fused)
    schedule = _schedule(options, optimizer, total_steps, starts)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # which ReduceLROnPlateau does not note
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def _schedule(options: Mapping[str, Any], optimizer: Optimizer, total: float, starts: Sequence[float]) -> Any:
    """The schedule, as Lightning takes it.

    Short names but plateau are functions of the step alone. A class path goes on after each epoch, or after each step
    if it takes `total_steps` or `step_size_up`; one that watches a metric goes on after each validation.
    """
    given, option = options["scheduler"], "model.scheduler"
    if isinstance(given, str) and given in WARMUPS:
        factor = partial(lr_factor, total=total, warmup=options["warmup"], shape=given)
        return {"scheduler": LambdaLR(optimizer, [partial(factor, start=s) for s in starts]), "interval": "step"}
    watched, mode = options.get("watched", WATCHED)
    if options["freeze"] == "gradual" or options["warmup"]:
        raise UserError(f"--model.warmup and --model.freeze gradual go with --{option} {', '.join(WARMUPS)} only.")
    own = parts.part("torch.optim.lr_scheduler.ReduceLROnPlateau" if given == "plateau" else given)
    if given == "plateau":
        own["init_args"] = {"patience": 3, "mode": mode}
    takes, arguments = parts.takes(own, option), own["init_args"]
    if "total_steps" in takes and arguments.get("total_steps") is None and math.isfinite(total):
        arguments = arguments | {"total_steps": int(total)}
    peaks = [group["lr"] for group in optimizer.param_groups]
    made = parts.make(own | {"init_args": arguments}, option, optimizer=optimizer, max_lr=peaks)
    if isinstance(made, ReduceLROnPlateau):  # which step_plateau steps, and Lightning never
        return {"scheduler": made, "interval": "epoch", "frequency": sys.maxsize, "monitor": watched}
    return {"scheduler": made, "interval": "step" if {"total_steps", "step_size_up"} & takes.keys() else "epoch"}


def _stages(
    network: nn.Module, head: nn.Module, options: Mapping[str, Any]
) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """The trained parameters: those of the head as stage 0, then of the backbone, whose uppermost stage is 1."""
    decays, is_free = options["layer_decay"] != 1, options["freeze"] == "none"
    if decays and not is_free:
        raise UserError(f"--model.layer_decay goes with --model.freeze none, not {options['freeze']}.")
    if is_free and options["backbone_lr"] == 1 and not decays:
        yield 0, list(network.parameters())
        return
    of_head = list(head.parameters())
    below = [(n, p) for n, p in network.named_parameters() if p.requires_grad and not any(p is own for own in of_head)]
    yield 0, of_head
    every, count = [p for _, p in below], STAGES if options["freeze"] == "gradual" else 1
    parted = [every[len(every) * part // count : len(every) * (part + 1) // count] for part in range(count)]
    stages = _layers(below) if decays else parted
    for number, members in enumerate(stages):
        yield len(stages) - number, members


def _layers(named: Sequence[tuple[str, nn.Parameter]]) -> list[list[nn.Parameter]]:
    """The parameters by layer, from the lowest: a layer's name ends where it first has a number, as in blocks.7.

    What has no number, and a layer of norms or biases alone, belongs to the one before.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    merged: list[list[nn.Parameter]] = []
    name = ""
    for full, parameter in named:
        found = re.match(r"1\.(.*?\d[^.]*)\.", full)  # network 1 comes after 0, Normalize
        name = found[1] if found else name
        layers.setdefault(name, []).append(parameter)
    for members in layers.values():
        is_layer = not merged or any(parameter.ndim > 1 for parameter in members)
        merged = [*merged, members] if is_layer else [*merged[:-1], merged[-1] + members]
    return merged


def make_optimizer(rule: Any, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
    """Creates the optimiser, of `Classifier`'s option, for groups with their own learning rate and weight decay."""
    if isinstance(rule, str):
        path, arguments, _ = RULES[rule]
        rule = {"class_path": path, "init_args": arguments}
    takes, arguments, option = parts.takes(rule, "model.optimizer"), rule["init_args"], "model.optimizer"
    if "fused" in takes:
        is_free = arguments.get("fused") is not False and not arguments.get("foreach")
        arguments = arguments | {"fused": fused and is_free}
    given = {name: groups[0].get(name, 0.0) for name in ("lr", "weight_decay")}
    if given["weight_decay"] and "weight_decay" not in takes:
        raise UserError(f"--{option} {rule['class_path']} takes no weight decay; leave --model.weight_decay out.")
    made: Optimizer = parts.make(rule | {"init_args": arguments}, option, params=groups, **given)
    return made


def set_mode(optimizers: Sequence[Optimizer], mode: Literal["train", "eval"]) -> None:
    """Has schedule-free optimisers put the weights that they train, or their average, into the network."""
    for optimizer in optimizers:
        if hasattr(optimizer, mode):
            getattr(optimizer, mode)()


def step_plateau(configs: Sequence[Any], metrics: Mapping[str, Any]) -> None:
    """Steps the schedules that watch a metric; Lightning would leave a step out after resuming within an epoch."""
    for config in configs:
        if config.reduce_on_plateau:
            config.scheduler.step(metrics[config.monitor])


def lr_factor(step: int, total: float, warmup: float, start: float = 0.0, shape: str = "cosine") -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine down to a hundredth.

    With the shape step it is divided by ten after each third; with constant it stays; with one-cycle
    (arXiv:1708.07120) the rise, from a 25th, and the fall, to almost nothing, are half a cosine each.

    Args:
        step: Optimiser steps made so far.
        total: Optimiser steps of the whole fit; beyond it, and if it is infinite, the factor stays.
        warmup: Share of `total` (of 1,000 steps if it is infinite) that the rise takes.
        start: Share of the same before which the factor is 0.
        shape: cosine, step, one-cycle or constant.
    """
    length = total if math.isfinite(total) else 1000
    if step < start * length:
        return 0.0
    rise = max(1.0, warmup * length) if warmup or shape == "cosine" else 0.0
    if step < rise:
        return _cosine(step / rise, 0.04, 1.0) if shape == "one-cycle" else (step + 1) / (rise + 1)
    if shape == "step":
        return 0.1 ** min(2, int(3 * step / total))
    done = min(1.0, (step - rise) / max(1.0, total - rise))  # 0 if `total` is infinite
    return {"cosine": _cosine(done, 1.0, 0.01), "one-cycle": _cosine(done, 1.0, 4e-6), "constant": 1.0}[shape]


def _cosine(done: float, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def reset_rates(scheduler: Any, peaks: Sequence[float]) -> None:
    """Sets the rates of a fit that starts from a checkpoint to those of its own options: it may have had others."""
    if isinstance(scheduler, LambdaLR) and peaks:  # that of tune is another
        scheduler.base_lrs = list(peaks)
        groups = zip(scheduler.optimizer.param_groups, peaks, scheduler.lr_lambdas, strict=True)
        for group, peak, factor in groups:
            group["initial_lr"], group["lr"] = peak, peak * factor(scheduler.last_epoch)
