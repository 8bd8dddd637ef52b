"""The watcher: says in a sentence what goes wrong in a fit, and what to try."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks import data_of, duration, tensorboard
from project.errors import FailedRun
from project.pace import Pace


class Watcher(Callback):
    """Says in a sentence what goes wrong, once, on the terminal and in TensorBoard's TEXT tab.

    No rule waits for an accelerator within a step; those on losses and accuracies look once an epoch.

    Args:
        pace: Knows how long the fit waits for pictures; comes before this one.
    """

    ENOUGH = 3  # epochs before a fit is judged, or its last one
    FEW_STEPS = 30  # a fit of less is not judged

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._said: set[str] = set()
        self._history: list[tuple[int, float, float]] = []  # epoch, training and validation loss

    def state_dict(self) -> dict[str, Any]:
        """What a fit that goes on has to know."""
        return {"history": self._history, "said": sorted(self._said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self._history = [(int(epoch), float(train), float(val)) for epoch, train, val in state_dict["history"]]
        self._said = set(state_dict["said"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up what guessing would give."""
        data = data_of(trainer)
        counts = np.bincount(data.dataset("train").labels, minlength=len(data.class_names)) + 1e-9
        share = counts / counts.sum()
        self._chance = (math.log(len(share)), float(-(share * np.log(share)).sum()))
        self._watched = next(parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        self._bad = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._good_until = trainer.global_step
        self._interval: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, to look for what is wrong with it."""
        self._batch = batch

    # numbers that are none

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Looks for gradients that are not finite, before they reach the weights.

        What is not finite anywhere, the loss included, reaches the first layer's gradient on the way back, and after
        DDP's sum that of every rank; so this one is enough (where a dead ReLU stops it, the epoch's mean loss shows
        it). The CPU looks at once, others every log_every_n_steps.
        """
        gradient = self._watched.grad
        if gradient is None or trainer.precision == "16-mixed":  # whose scaler meets such gradients and leaves them out
            return
        self._bad |= ~gradient.isfinite().all()
        if pl_module.device.type == "cpu" or (trainer.global_step + 1) % self._interval == 0:
            self._require_finite(trainer, pl_module)

    def _require_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first, last = self._good_until + 1, trainer.global_step + 1
        self._good_until = trainer.global_step + 1
        if not self._bad:
            return
        steps = f"at step {last}" if pl_module.device.type == "cpu" else f"between steps {first} and {last}"
        rate = trainer.optimizers[0].param_groups[0]["initial_lr"]
        sentence = (
            f"The loss or a gradient is not finite {steps}, epoch {trainer.current_epoch + 1}: "
            f"{first_bad_layer(pl_module, self._batch)}. Try a new run with --model.lr {rate / 10:g}."
        )
        self._say(trainer, "not finite", sentence, aloud=False)
        raise FailedRun(sentence)

    # figures of an epoch

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting answers."""
        self._answers = torch.zeros(len(data_of(trainer).class_names), device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts how often each class is the answer."""
        answers = outputs.argmax(dim=1)
        self._answers.scatter_add_(0, answers, torch.ones_like(answers, dtype=torch.float32))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the fit so far."""
        self._require_finite(trainer, pl_module)
        figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
        losses = figures.get("train/loss", math.nan), figures.get("val/loss", math.nan)
        if not math.isfinite(losses[0]):  # under 16-mixed, where single gradients may be
            sentence = f"The training loss of epoch {trainer.current_epoch + 1} is {losses[0]}: lower --model.lr."
            self._say(trainer, "not finite", sentence, aloud=False)
            raise FailedRun(sentence)
        self._history.append((trainer.current_epoch + 1, *losses))
        validated = hasattr(self, "_answers")
        answers = trainer.strategy.reduce(self._answers, reduce_op="sum").tolist() if validated else []
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if (last or len(self._history) >= 2) and (sentence := self._waiting(trainer)):
            self._say(trainer, "waiting", sentence)
        if trainer.global_step < self.FEW_STEPS or (len(self._history) < self.ENOUGH and not last):
            return
        rate = trainer.optimizers[0].param_groups[0]["initial_lr"]
        found = {"diverging": self._diverging(rate), "stuck": self._stuck(trainer, rate), "gap": self._gap()}
        if validated and "val/accuracy" in figures:
            found["baseline"] = below_baseline(trainer, figures["val/accuracy"])
            found["never"] = never_predicted(trainer, answers)
        for rule, sentence in found.items():
            if sentence:
                self._say(trainer, rule, sentence)

    def _waiting(self, trainer: Trainer) -> str:
        share, waited = self._pace.share, self._pace.waited
        if share < 0.3 or waited < 1:  # below a second an epoch it is no matter
            return ""
        if trainer.strategy.root_device.type != "cpu":  # it works on while this process waits: nothing can be told
            return ""
        from project.data.workers import usable_cores

        data, cores = data_of(trainer), usable_cores()
        if data.workers < cores:
            advice = f"give --data.workers {cores} (now {data.workers})"
        elif data.cache == "off":
            advice = "leave --data.cache on"
        else:
            advice = "every core reads already: make the pictures smaller, or --data.augment cheaper"
        return f"{share:.0%} of the epoch was spent waiting for pictures ({duration(waited)}): {advice}."

    def _diverging(self, rate: float) -> str:
        losses = [train for _, train, _ in self._history]
        now, lowest = losses[-1], min(losses)
        if now < 1.2 * self._chance[0] or now < 1.5 * lowest:
            return ""
        epoch = self._history[losses.index(lowest)][0]
        rise = f"the training loss has risen from {lowest:.3g} in epoch {epoch} to {now:.3g}"
        return f"{rise}: try --model.lr {rate / 10:g}."

    def _stuck(self, trainer: Trainer, rate: float) -> str:
        recent = [train for _, train, _ in self._history[-self.ENOUGH :]]
        if not any(all(abs(loss / chance - 1) <= 0.03 for loss in recent) for chance in self._chance):
            return ""
        now = recent[-1]
        classes = len(data_of(trainer).class_names)
        other = rate / 10 if rate >= 1e-4 else rate * 10
        return (
            f"after {self._history[-1][0]} epochs the training loss is {now:.3f}; guessing gives {self._chance[1]:.3f} "
            f"(ln {classes} = {self._chance[0]:.3f} where classes are equally frequent): try --model.lr {other:g} or a "
            f"network with batch norm (--model.name resnet18), and python -m project.cli check {data_of(trainer).root}."
        )

    def _gap(self) -> str:
        if len(self._history) <= 3:
            return ""
        epochs, train, val = (list(column) for column in zip(*self._history, strict=True))
        rising = val[-4] < val[-3] < val[-2] < val[-1] and train[-1] < train[-4]
        if not rising or val[-1] < 1.1 * min(val):
            return ""
        best = epochs[val.index(min(val))]
        return (
            f"since epoch {best} the validation loss has risen from {min(val):.3f} to {val[-1]:.3f} while the training "
            f"loss fell to {train[-1]:.3f}: best.ckpt holds epoch {best}; --data.augment crop may help."
        )

    def _say(self, trainer: Trainer, rule: str, sentence: str, aloud: bool = True) -> None:
        if rule in self._said or not trainer.is_global_zero:
            return
        self._said.add(rule)
        if aloud:
            print(f"watcher: {sentence}", flush=True)
        if writer := tensorboard(trainer):
            writer.add_text(f"watcher/{rule}", sentence, trainer.global_step)


def below_baseline(trainer: Trainer, accuracy: float) -> str:
    """What to say where always giving the most frequent class would be better, by more than chance."""
    data = data_of(trainer)
    counts = np.bincount(data.dataset("val").labels, minlength=len(data.class_names))
    majority, rows = counts.max() / counts.sum(), counts.sum()
    if accuracy >= majority - math.sqrt(majority * (1 - majority) / rows):
        return ""
    name = data.class_names[int(counts.argmax())]
    return (
        f"validation accuracy is {accuracy:.3f}, and always answering {name} gives {majority:.3f}: the labels, or the "
        f"learning rate, may be wrong; python -m project.cli check {data.root} and python -m project.cli tune look."
    )


def never_predicted(trainer: Trainer, answers: list[float]) -> str:
    """What to say where a class of at least five validation pictures was never the answer."""
    data = data_of(trainer)
    counts = np.bincount(data.dataset("val").labels, minlength=len(data.class_names))
    names = [name for name, n, given in zip(data.class_names, counts, answers, strict=True) if n >= 5 and not given]
    if not names:
        return ""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"never the answer to a validation picture: {listed}; try --data.balance sample, or more epochs."


def first_bad_layer(pl_module: Any, batch: Any) -> str:
    """Where values stop being finite: the first layer's output that has such, or the gradient nearest to the loss."""
    found: list[str] = []

    def look(name: str, layer: torch.nn.Module, output: Any) -> None:
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(f"the first output that is not finite is that of {name} ({type(layer).__name__})")

    leaves = [(name, layer) for name, layer in pl_module.network.named_modules() if not list(layer.children())]
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in leaves
    ]
    with torch.no_grad():
        (pl_module.network if batch.image.ndim == 4 else pl_module.head)(batch.image)
    for handle in handles:
        handle.remove()
    for name, parameter in reversed(list(pl_module.network.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name} is not finite")
            break
    return found[0] if found else "every output is finite again"
