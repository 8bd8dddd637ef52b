"""tune: it suggests where it can tell, says so where it cannot, and leaves nothing but its plot."""

import copy
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from project import cli
from project.classifier import Classifier
from project.commands import tune
from tests.conftest import COLOURS, SMALL, make_images

TUNE = ["tune", "--data.root", "photos", *SMALL]


@pytest.mark.slow
def test_suggested_command_runs_and_nothing_else_is_left(photos, capsys):
    make_images(photos, dict.fromkeys(COLOURS, 250))
    assert cli.main([*TUNE, "--steps", "60", "--model.lr=0.5", "--plot", "finder.png"]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in Path().iterdir()} == {"photos", "data", "finder.png"}
    assert Path("finder.png").read_bytes().startswith(b"\x89PNG")
    command = shlex.split(re.search(r"next: python -m project\.cli (.*)", out)[1])
    words = " ".join(command).replace("=", " ").split()
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--data.root"] == "photos"
    assert not {"--steps", "--plot"} & options.keys()
    assert len(options) == len(words) // 2  # none twice
    rate = float(options["--model.lr"])
    assert rate == 0.5 if "cannot tell" in out else 1e-6 < rate < 0.1
    assert options["--data.batch_size"] in ("16", "32")
    assert re.search(r"images a second in training: 16: [\d,]+, 32: [\d,]+$", out, re.MULTILINE)
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "3"]
    assert cli.main([*command, *short, "--model.lr", "0.0001"]) == 0  # 0.5 may be too much


def test_small_set_gets_no_batch_size_and_the_networks_weights_are_as_before(photos, monkeypatch, capsys):
    def keep(tuning):
        seen.append(copy.deepcopy(tuning.model.network.state_dict()))

    def suggest(rates, losses, chance):
        smoothed.append((losses, chance))
        return None, "kept"

    step = Classifier.training_step
    seen, smoothed, raw = [], [], []
    monkeypatch.setattr(tune, "suggest", suggest)
    monkeypatch.setattr(Classifier, "training_step", lambda *given: raw.append(step(*given)) or raw[-1])
    for hook in ("before_fit", "after_fit"):
        monkeypatch.setattr(tune.Tuning, hook, keep, raising=False)
    make_images(Path("runs"), {"photos": 1})
    mine = Path("runs/photos/000.png").rename("runs/photos/lr-finder.png").read_bytes()
    assert cli.main([*TUNE, "--data.batch_size", "42"]) == 0
    out = capsys.readouterr().out
    assert "training images are too few to compare any" in out
    assert "learning rate finder: 24 steps\n" in out
    assert "see runs/photos/lr-finder-2.png\n" in out
    assert Path("runs/photos/lr-finder.png").read_bytes() == mine
    assert Path("runs/photos/lr-finder-2.png").read_bytes().startswith(b"\x89PNG")
    losses, chance = smoothed[0]
    assert chance == pytest.approx(math.log(3))
    weights = 0.98 ** np.arange(24)[::-1]
    assert losses[0] == pytest.approx(raw[0].item(), rel=1e-5)
    assert losses[-1] == pytest.approx(np.average([loss.item() for loss in raw[:24]], weights=weights), rel=1e-5)
    before, after = seen
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert cli.main([*TUNE, "--data.batch_size", "6"]) == 0
    assert "learning rate finder: 42 steps, three epochs\n" in capsys.readouterr().out


def curve(*points, noise=0.01):
    """100 losses over rates from 1e-7 to 1, straight between points (log10 of the rate, loss), and some noise."""
    logs = np.linspace(-7, 0, 100)
    losses = np.interp(logs, *zip(*points, strict=True))
    return 10**logs, losses + np.random.default_rng(0).normal(0, noise, 100)


def test_a_tenth_of_the_rate_with_the_lowest_loss_is_suggested():
    rate, reason = tune.suggest(*curve((-7, 2.3), (-4, 2.2), (-2, 1.0), (-1, 5.0)), 2.3)
    assert 5e-4 < rate < 2e-3
    lowest = (
        r"\de-0\d, a tenth of [\d.e-]+, where the loss is lowest \(1\.\d+, 2\.[23]\d+ before\), rounded to one digit"
    )
    assert re.match(lowest, reason)


def test_noise_a_loss_that_only_rises_and_too_few_finite_losses_give_no_suggestion():
    rate, reason = tune.suggest(*curve((-7, 2.3), (-1, 2.3), (0, 9.0), noise=0.05), 2.3)
    assert rate is None
    assert reason.startswith("cannot tell: the loss falls by no more than chance")
    assert tune.suggest(*curve((-7, 2.3), (-3, 2.3), (0, 9.0)), 2.3)[0] is None
    dying = curve((-7, 3.7), (-3, 3.0), (-1, 2.3))  # AlexNet on the digits: to chance level
    assert tune.suggest(*dying, 2.3)[0] is None
    rates, losses = curve((-7, 2.3), (-2, 1.0))
    losses[15:] = np.nan
    assert tune.suggest(rates, losses, 2.3) == (None, "cannot tell: 15 losses are too few; give more --steps")
