"""Diagnostics: warns in a sentence of what goes wrong in a fit, and names what to try."""

import contextlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from project.data.workers import usable_cores
from project.errors import FailedRun
from project.training.callbacks import data_of, duration, tensorboard
from project.training.throughput import Throughput


class Diagnostics(Callback):
    """Warns once of each problem, on the terminal and in TensorBoard's TEXT tab.

    No rule waits for an accelerator within a step; those on losses and accuracies are checked once an epoch.

    Args:
        throughput: Measures the time spent waiting for images; it precedes this callback.
    """

    MIN_EPOCHS = 3  # before a fit is judged, unless it ends earlier
    MIN_STEPS = 30  # a shorter fit is not judged

    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._warned: set[str] = set()
        self._history: list[tuple[int, float, float]] = []  # epoch, training and validation loss

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = [(int(epoch), float(train), float(val)) for epoch, train, val in state_dict["history"]]
        self._warned = set(state_dict["warned"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        frequency = np.bincount(data.dataset("train").labels, minlength=len(data.class_names)) + 1e-9
        frequency /= frequency.sum()
        # the loss of guessing: without and with knowledge of the class frequencies
        self._chance = math.log(len(frequency)), float(-(frequency * np.log(frequency)).sum())
        self._watched = next(parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        self._not_finite = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._finite_until = trainer.global_step

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Looks for gradients that are not finite, before they reach the weights.

        NaN or infinity anywhere, the loss included, reaches the first layer's gradient in the backward pass, and after
        DDP's sum that of every rank; so one gradient is enough (where a dead ReLU stops it, the epoch's mean loss shows
        it). The CPU checks at every step, accelerators every log_every_n_steps.
        """
        gradient = self._watched.grad
        if gradient is None or trainer.precision == "16-mixed":  # whose scaler skips such steps
            return
        self._not_finite |= ~gradient.isfinite().all()
        interval: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if pl_module.device.type == "cpu" or (trainer.global_step + 1) % interval == 0:
            self._require_finite(trainer, pl_module)

    def _require_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first, last = self._finite_until + 1, trainer.global_step + 1
        self._finite_until = last
        if self._not_finite:
            steps = f"at step {last}" if pl_module.device.type == "cpu" else f"between steps {first} and {last}"
            sentence = f"The loss or a gradient is not finite {steps}, epoch {trainer.current_epoch + 1}: "
            sentence += (
                f"{first_bad_layer(pl_module, self._batch)}. Try a new run with --model.lr {_rate(trainer) / 10:g}."
            )
            self._warn(trainer, "not_finite", sentence, fatal=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predicted = torch.zeros(len(data_of(trainer).class_names), device=pl_module.device)

    def on_validation_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        predicted = outputs.argmax(dim=1)
        self._predicted.scatter_add_(0, predicted, torch.ones_like(predicted, dtype=torch.float32))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._require_finite(trainer, pl_module)
        epoch, metrics = trainer.current_epoch + 1, {k: float(v) for k, v in trainer.callback_metrics.items()}
        losses = metrics.get("train/loss", math.nan), metrics.get("val/loss", math.nan)
        if not math.isfinite(losses[0]):  # under 16-mixed, where single gradients may be
            sentence = f"The training loss of epoch {epoch} is {losses[0]}: lower --model.lr."
            self._warn(trainer, "not_finite", sentence, fatal=True)
        self._history.append((epoch, *losses))
        last = epoch == trainer.max_epochs
        validated = hasattr(self, "_predicted")
        if validated:  # by every rank, before any of them returns
            self._predicted = trainer.strategy.reduce(self._predicted, reduce_op="sum")
        if last or len(self._history) >= 2:
            self._warn(trainer, "waiting", self._waiting(trainer))
        if trainer.global_step < self.MIN_STEPS or (len(self._history) < self.MIN_EPOCHS and not last):
            return
        self._warn(trainer, "diverging", self._diverging(trainer))
        self._warn(trainer, "stuck", self._stuck(trainer))
        self._warn(trainer, "overfitting", self._overfitting())
        if validated and "val/accuracy" in metrics:
            counts = np.bincount(data_of(trainer).dataset("val").labels, minlength=len(self._predicted))
            self._warn(trainer, "baseline", self._baseline(trainer, counts, metrics["val/accuracy"]))
            self._warn(trainer, "never_predicted", self._never_predicted(trainer, counts))

    def _waiting(self, trainer: Trainer) -> str:
        share, waited = self._throughput.wait_share, self._throughput.waited
        # an accelerator keeps working while this process waits, so that the share means nothing
        if share < 0.3 or waited < 1 or trainer.strategy.root_device.type != "cpu":
            return ""
        data, cores = data_of(trainer), usable_cores()
        if data.workers < cores:
            advice = f"try --data.workers {cores} (now {data.workers})"
        elif data.cache == "off":
            advice = "leave --data.cache on"
        else:
            advice = "all cores are reading already; use smaller images or a cheaper --data.augment"
        return f"{share:.0%} of the epoch was spent waiting for images ({duration(waited)}): {advice}."

    def _diverging(self, trainer: Trainer) -> str:
        losses = [train for _, train, _ in self._history]
        now, lowest = losses[-1], min(losses)
        if now < 1.2 * self._chance[0] or now < 1.5 * lowest:
            return ""
        epoch = self._history[losses.index(lowest)][0]
        rise = f"the training loss has risen from {lowest:.3g} in epoch {epoch} to {now:.3g}"
        return f"{rise}: try --model.lr {_rate(trainer) / 10:g}."

    def _stuck(self, trainer: Trainer) -> str:
        recent = [train for _, train, _ in self._history[-self.MIN_EPOCHS :]]
        if not any(all(abs(loss / chance - 1) <= 0.03 for loss in recent) for chance in self._chance):
            return ""
        rate, data = _rate(trainer), data_of(trainer)
        other = rate / 10 if rate >= 1e-4 else rate * 10
        return (
            f"after {self._history[-1][0]} epochs the training loss is {recent[-1]:.3f}; guessing gives "
            f"{self._chance[1]:.3f} (ln {len(data.class_names)} = {self._chance[0]:.3f} for equally frequent classes): "
            f"try --model.lr {other:g} or a network with batch norm (--model.name resnet18), and run "
            f"python -m project.cli check {data.root}."
        )

    def _overfitting(self) -> str:
        if len(self._history) <= 3:
            return ""
        epochs, train, val = (list(column) for column in zip(*self._history, strict=True))
        rising = val[-4] < val[-3] < val[-2] < val[-1] and train[-1] < train[-4]
        if not rising or val[-1] < 1.1 * min(val):
            return ""
        best = epochs[val.index(min(val))]
        return (
            f"overfitting: since epoch {best} the validation loss has risen from {min(val):.3f} to {val[-1]:.3f} and "
            f"the training loss fallen to {train[-1]:.3f}; best.ckpt holds epoch {best}; --data.augment crop may help."
        )

    def _baseline(self, trainer: Trainer, counts: npt.NDArray[np.intp], accuracy: float) -> str:
        data, majority = data_of(trainer), counts.max() / counts.sum()
        if accuracy >= majority - math.sqrt(majority * (1 - majority) / counts.sum()):  # one standard error
            return ""
        return (
            f"validation accuracy is {accuracy:.3f}, but always predicting {data.class_names[int(counts.argmax())]} "
            f"gives {majority:.3f}: the labels or the learning rate may be wrong; run python -m project.cli check "
            f"{data.root} and python -m project.cli tune."
        )

    def _never_predicted(self, trainer: Trainer, counts: npt.NDArray[np.intp]) -> str:
        classes = zip(data_of(trainer).class_names, counts, self._predicted.tolist(), strict=True)
        names = [name for name, count, predictions in classes if count >= 5 and not predictions]
        if not names:
            return ""
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"never predicted on the validation set: {listed}; try --data.balance sample or more epochs."

    def _warn(self, trainer: Trainer, rule: str, sentence: str, fatal: bool = False) -> None:
        if sentence and rule not in self._warned and trainer.is_global_zero:
            self._warned.add(rule)
            if not fatal:
                print(f"warning: {sentence}", flush=True)
            if writer := tensorboard(trainer):
                writer.add_text(f"diagnostics/{rule}", sentence, trainer.global_step)
        if fatal:
            raise FailedRun(sentence)


def _rate(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["initial_lr"])


def first_bad_layer(pl_module: Any, batch: Any) -> str:
    """The first layer whose output is not finite, or else the parameter nearest to the loss whose gradient is not."""
    found: list[str] = []

    def look(layer: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(f"the first output that is not finite is that of {names[layer]} ({type(layer).__name__})")

    names = {layer: name for name, layer in pl_module.network.named_modules() if not list(layer.children())}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in names:
            hooks.enter_context(layer.register_forward_hook(look))
        (pl_module.network if batch.image.ndim == 4 else pl_module.head)(batch.image)
    for name, parameter in reversed(list(pl_module.network.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name} is not finite")
    return found[0] if found else "a second forward pass gives finite outputs"
