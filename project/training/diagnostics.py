"""Diagnostics: warns in a sentence of what goes wrong in a fit, and names what to try."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from project.data.workers import usable_cores
from project.errors import FailedRun, command, some
from project.training.callbacks import data_of, duration, tensorboard
from project.training.throughput import Throughput


class Diagnostics(Callback):
    """Warns once of each problem, on the terminal and in TensorBoard; no rule waits for an accelerator in a step."""

    MIN_EPOCHS = 3  # before a fit is judged, unless it ends earlier
    MIN_STEPS = 30  # a shorter fit is not judged

    def __init__(self, throughput: Throughput, monitor: str) -> None:
        self._throughput, self._monitor = throughput, monitor  # throughput precedes this callback
        self._warned: set[str] = set()
        self._history: list[tuple[int, float, float]] = []  # epoch, training and validation loss
        self._predicted: Any = None  # how often each class, (K,), in the newest validation

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = [(int(epoch), float(train), float(val)) for epoch, train, val in state_dict["history"]]
        self._warned = set(state_dict["warned"])

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._watched = next(parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        self._not_finite = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._interval = 1 if pl_module.device.type == "cpu" else max(1, trainer.log_every_n_steps)

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Looks for gradients that are not finite, before they reach the weights.

        NaN or infinity anywhere, the loss included, reaches the first layer's gradient in the backward pass, and after
        DDP's sum that of every rank; so one gradient is enough (where a dead ReLU stops it, the epoch's mean loss shows
        it). The value is read at every step on the CPU, every log_every_n_steps on accelerators.
        """
        gradient = self._watched.grad
        if gradient is None or trainer.precision == "16-mixed":  # whose scaler skips such steps
            return
        self._not_finite |= ~gradient.isfinite().all()
        if (trainer.global_step + 1) % self._interval == 0:
            self._require_finite(trainer, pl_module)

    def _require_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._not_finite:
            before = f" or in the {self._interval - 1} before" if self._interval > 1 else ""
            raise FailedRun(
                f"The loss or a gradient is not finite at step {trainer.global_step + 1}{before}, epoch "
                f"{trainer.current_epoch + 1}: {first_bad_layer(pl_module, self._batch)}. "
                f"Try a new run with --model.lr {_rate(trainer) / 10:g}."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predicted = torch.zeros(len(data_of(trainer).class_names), device=pl_module.device)

    def on_validation_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        self._predicted += functional.one_hot(outputs.argmax(dim=1), outputs.shape[1]).sum(dim=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._require_finite(trainer, pl_module)
        epoch, metrics = trainer.current_epoch + 1, {k: float(v) for k, v in trainer.callback_metrics.items()}
        losses = metrics.get("train/loss", math.nan), metrics.get("val/loss", math.nan)
        if not math.isfinite(losses[0]):  # under 16-mixed, where single gradients may be
            raise FailedRun(f"The training loss of epoch {epoch} is {losses[0]}: lower --model.lr.")
        self._history.append((epoch, *losses))
        predicted = None if self._predicted is None else trainer.strategy.reduce(self._predicted, reduce_op="sum")
        for rule, sentence in self._problems(trainer, predicted, metrics.get("val/accuracy", math.nan)).items():
            if rule not in self._warned and trainer.is_global_zero:
                self._warned.add(rule)
                print(f"warning: {sentence}", flush=True)
                if writer := tensorboard(trainer):
                    writer.add_text(f"diagnostics/{rule}", sentence, trainer.global_step)

    def _problems(self, trainer: Trainer, predicted: Any, accuracy: float) -> dict[str, str]:
        """A sentence for each rule that the fit breaks so far, by the rule's name."""
        data, rate, problems = data_of(trainer), _rate(trainer), dict[str, str]()
        epochs, train, val = (list(column) for column in zip(*self._history, strict=True))
        is_last, share, waited = epochs[-1] == trainer.max_epochs, self._throughput.wait_share, self._throughput.waited
        # an accelerator keeps working while this process waits, so that the share means nothing
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if on_cpu and share >= 0.3 and waited >= 1 and (is_last or len(epochs) >= 2):
            workers, cache = usable_cores(), data.image_cache(data.augment)[0]
            more = f"--data.workers {workers} (now {data.reading[0]}), " if data.workers < workers else ""
            more += "" if cache else "--data.cache on, "
            problems["waiting"] = (
                f"{share:.0%} of the epoch was spent waiting for images ({duration(waited)}): try {more}smaller images "
                "or a cheaper --data.augment."
            )
        if trainer.global_step < self.MIN_STEPS or not (is_last or len(epochs) >= self.MIN_EPOCHS):
            return problems
        frequency = np.bincount(data.dataset("train").labels, minlength=len(data.class_names)) + 1e-9
        frequency /= frequency.sum()
        # the loss of guessing: without and with knowledge of the class frequencies
        uniform, informed = guesses = math.log(len(frequency)), float(-(frequency * np.log(frequency)).sum())
        if trainer.lightning_module.hparams["loss"] != "cross_entropy":
            uniform, informed = guesses = math.inf, math.inf  # unknown
        if train[-1] >= max(1.2 * uniform, 1.5 * min(train)):
            problems["diverging"] = (
                f"the training loss has risen from {min(train):.3g} in epoch {epochs[train.index(min(train))]} to "
                f"{train[-1]:.3g}: try --model.lr {rate / 10:g}."
            )
        if any(all(abs(loss / guess - 1) <= 0.03 for loss in train[-self.MIN_EPOCHS :]) for guess in guesses):
            problems["stuck"] = (
                f"after {epochs[-1]} epochs the training loss is {train[-1]:.3f}; guessing gives {informed:.3f} "
                f"(ln {len(frequency)} = {uniform:.3f} for equally frequent classes): "
                f"try --model.lr {rate / 10 if rate >= 1e-4 else rate * 10:g} or a network with batch norm "
                f"(--model.name resnet18), and run {command('check', data.root)}."
            )
        rising = len(val) > 3 and val[-4] < val[-3] < val[-2] < val[-1] and train[-1] < train[-4]
        if rising and val[-1] >= 1.1 * min(val):
            best = epochs[val.index(min(val))]
            kept = f"best.ckpt holds epoch {best}; " if self._monitor == "val/loss" else ""
            problems["overfitting"] = (
                f"overfitting: since epoch {best} the validation loss has risen from {min(val):.3f} to {val[-1]:.3f} "
                f"and the training loss fallen to {train[-1]:.3f}; {kept}--data.augment crop may help."
            )
        counts = np.bincount(data.dataset("val").labels, minlength=len(frequency))
        majority = counts.max() / counts.sum()
        if accuracy < majority - math.sqrt(majority * (1 - majority) / counts.sum()):  # one standard error
            problems["baseline"] = (
                f"validation accuracy is {accuracy:.3f}, but always predicting "
                f"{data.class_names[int(counts.argmax())]} gives {majority:.3f}: the labels or the learning rate may "
                f"be wrong; run {command('check', data.root)} and {command('tune', data.root)}."
            )
        if predicted is not None and (never := ((counts >= 5) & (predicted.cpu().numpy() == 0)).nonzero()[0]).size:
            listed = some([data.class_names[index] for index in never], 5)
            hint = "try --data.balance sample or more epochs"
            problems["never_predicted"] = f"never predicted on the validation set: {listed}; {hint}."
        return problems


def _rate(trainer: Trainer) -> float:
    group = trainer.optimizers[0].param_groups[0]
    return float(group.get("max_lr", group["initial_lr"]))  # where a schedule has a lower start


def first_bad_layer(pl_module: Any, batch: Any) -> str:
    """The first layer whose output is not finite, if it is not a gradient alone."""
    names = {layer: name for name, layer in pl_module.network.named_modules()}
    bad: list[str] = []

    def look(layer: torch.nn.Module, _: Any, output: Any) -> None:
        if layer in names and isinstance(output, torch.Tensor) and not output.isfinite().all():
            bad.append(f"the first output that is not finite is that of {names[layer]} ({type(layer).__name__})")

    with register_module_forward_hook(look), torch.no_grad():
        (pl_module.network if batch.image.ndim == 4 else pl_module.head)(batch.image)
    return bad[0] if bad else "a second forward pass gives finite outputs"
