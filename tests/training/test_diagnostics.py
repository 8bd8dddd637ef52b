"""Diagnostics: scripted metrics provoke each rule in a real fit, and a healthy fit provokes none."""

import math
import os
import time
import traceback
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from project import cli, runs
from project.classifier import Classifier
from project.evaluation import figures
from project.training.diagnostics import Diagnostics
from tests.conftest import ALIVE, SMALL, make_images, read_csv
from tests.same_run import checkpoint

FIT = ["fit", "--data.root", "photos", *SMALL]
RUN = Path("runs/photos/version_0")


def warnings(capsys, *options):
    """The warnings of a fit with these options."""
    assert cli.main([*FIT, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


OVERFITS = (
    "overfitting: since epoch 2 the validation loss has risen from 0.693 to 0.821 and the training loss fallen to "
    "0.105; best.ckpt holds epoch 2; --data.augment crop may help."
)
STUCK = (
    "after 3 epochs the training loss is 1.099; guessing gives 1.099 (ln 3 = 1.099 for equally frequent classes): "
    "try --model.lr 1e-08 or a network with batch norm (--model.name resnet18), and run python -m project.cli check "
    "photos."
)
DIVERGES = "the training loss has risen from 0.511 in epoch 2 to 1.61: try --model.lr 0.3."


def test_losses_other_than_cross_entropy_are_not_compared_with_that_of_guessing(photos, scripted, capsys):
    scripted([0.5, 0.6, 0.2, 0.1], [0.4, 0.5, 0.6, 0.7])
    assert warnings(capsys, "--trainer.max_epochs", "4", "--model.lr", "3", "--model.loss", "focal") == []


@pytest.mark.parametrize(
    ("rate", "train", "val", "expected"),
    [
        pytest.param("3", [0.4, 0.6, 0.8, 0.9], [0.4, 0.55, 0.7, 0.8], [], id="healthy"),
        pytest.param("3", [0.4, 0.6, 0.7, 0.8, 0.9], [0.4, 0.5, 0.49, 0.48, 0.44], [OVERFITS], id="overfits by 18 %"),
        pytest.param("3", [0.4, 0.6, 0.7, 0.8, 0.9], [0.4, 0.5, 0.49, 0.48, 0.47], [], id="by 9 %"),
        pytest.param("3", [0.5, 0.6, 0.2, 0.1], [0.4, 0.5, 0.6, 0.7], [DIVERGES], id="diverging"),
        pytest.param("1e-9", [1 / 3] * 5, [0.5] * 5, [STUCK], id="stuck at chance"),
    ],
)
def test_courses_of_losses_are_judged_once_on_the_terminal_and_in_tensorboard(
    photos, scripted, capsys, rate, train, val, expected
):
    scripted(train, val)
    assert warnings(capsys, "--trainer.max_epochs", str(len(train)), "--model.lr", rate) == expected
    events = EventAccumulator(str(RUN)).Reload()
    shown = [events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("diagnostics/")]
    assert [[text.tensor_proto.string_val[0].decode() for text in texts] for texts in shown] == [[s] for s in expected]


@pytest.mark.parametrize(
    ("blue", "green", "probability", "always", "start"),
    [
        (30, 40, 0.4, None, "validation accuracy is 0.000, but always predicting green gives 0.571"),
        (60, 10, 0.8, 0, "never predicted on the validation set: green; try --data.balance sample"),
    ],
)
def test_validation_predictions(workplace, scripted, capsys, blue, green, probability, always, start):
    for split in ("train", "val"):
        make_images(workplace / "photos" / split, {"blue": blue, "green": green})
    scripted([0.6, 0.7, 0.8, 0.9], [probability] * 4, always)
    (sentence,) = warnings(capsys, "--trainer.max_epochs", "4")
    assert sentence.startswith(start)


def test_a_loss_that_is_not_finite_ends_the_fit_names_step_and_layer_and_keeps_the_last_good_checkpoint(
    photos, monkeypatch, capsys
):
    step = Classifier.training_step

    def broken(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 3:
            self.network[1].stem[0].weight.data.fill_(math.inf)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", broken)
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "3", "--save_every", "0.0001"]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("failed: The loss or a gradient is not finite at step 14, epoch 2: the first output")
    assert "is that of 1.stem.0 (Conv2d)" in error
    assert "--model.lr 3e-05" in error
    assert "Traceback" not in captured.err
    assert "not finite at step 14" in runs.read_status(RUN)["reason"]
    assert checkpoint(RUN, "best")["epoch"] == 0
    last = checkpoint(RUN)
    assert last["global_step"] < 14
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values())
    assert any(row["val/loss"] for row in read_csv(RUN / "metrics.csv"))


@pytest.mark.full
def test_drawing_the_first_batch_is_no_waiting_for_images(photos, capsys, monkeypatch):
    draw = figures.image_grid
    monkeypatch.setattr(figures, "image_grid", lambda *args, **options: (time.sleep(3), draw(*args, **options))[1])
    assert not [line for line in warnings(capsys, "--trainer.max_epochs", "1") if "waiting" in line]


@pytest.mark.slow
def test_waiting_for_images_is_reported_with_the_option_that_helps(workplace, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    for name in ("blue", "green"):
        large = workplace / "photos" / name / "0.png"  # PNGs cannot be decoded at a reduced size
        large.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(large)
        for number in range(1, 25):
            os.link(large, large.with_stem(str(number)))
    (sentence,) = warnings(capsys, "--trainer.max_epochs", "1", "--data.cache", "off")
    for part in ("waiting for images", "try --data.workers", "(now 0)"):
        assert part in sentence


class HostReads(TorchDispatchMode):
    """Notes the operators that wait for an accelerator, where its tensors are on one; a callback of the fit, too."""

    WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2", "bincount"}
    found: ClassVar[list[str]] = []
    steps = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in self.WAITING:
            self.found.append("".join(traceback.format_stack(limit=12)))
        return operator(*args, **(kwargs or {}))


class WatchSteps(Callback):
    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # the others are logged
            self.watch = HostReads()
            self.watch.__enter__()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % trainer.log_every_n_steps:
            self.watch.__exit__(None, None, None)
            HostReads.steps += 1


def test_no_training_step_waits_for_the_device_but_those_that_are_logged(photos, monkeypatch):
    start = Diagnostics.on_train_start

    def as_on_an_accelerator(self, trainer, pl_module):
        start(self, trainer, pl_module)
        self._interval = trainer.log_every_n_steps

    monkeypatch.setattr(Diagnostics, "on_train_start", as_on_an_accelerator)
    watch = f"--trainer.callbacks={__name__}.WatchSteps"
    assert cli.main([*FIT, "--average", "0.9", "--data.augment", "crop", "--trainer.max_epochs", "2", watch]) == 0
    assert HostReads.steps >= 8
    assert not HostReads.found, HostReads.found[0]
