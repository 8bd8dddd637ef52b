"""The watcher: each rule is provoked in a real fit by figures that are given, and all are silent on healthy ones."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli, runs
from tests.conftest import ALIVE, SMALL, make_pictures

FIT = ["fit", "--data.root", "photos", *SMALL]


def said(capsys, *options, code=0):
    """The watcher's sentences in a fit with these options."""
    capsys.readouterr()
    assert cli.main([*FIT, *options]) == code
    captured = capsys.readouterr()
    return [line.removeprefix("watcher: ") for line in captured.out.splitlines() if line.startswith("watcher: ")]


def test_silent_on_a_healthy_fit(photos, scripted, capsys):
    scripted(train=[0.4, 0.6, 0.8, 0.9], val=[0.4, 0.55, 0.7, 0.8])
    assert said(capsys, "--trainer.max_epochs", "4") == []


def test_loss_stuck_at_guessing_is_said_once_with_what_to_try(photos, scripted, capsys):
    scripted(train=[1 / 3] * 5, val=[0.5] * 5)
    (sentence,) = said(capsys, "--trainer.max_epochs", "5", "--model.lr", "1e-9")
    assert sentence.startswith("after 3 epochs the training loss is 1.099; guessing gives 1.099 (ln 3 = 1.099 where")
    assert "--model.lr 1e-08" in sentence
    assert "check photos" in sentence
    (run,) = Path("runs/photos").iterdir()
    events = EventAccumulator(str(run)).Reload()
    text = events.Tensors("watcher/stuck/text_summary")
    assert [tensor.tensor_proto.string_val[0].decode() for tensor in text] == [sentence]


def test_loss_that_is_not_a_number_ends_the_fit_and_names_step_and_layer(photos, monkeypatch, capsys):
    from project.classifier import Classifier

    step = Classifier.training_step

    def spoilt(self, batch, batch_idx):
        if batch_idx == 1:
            self.network[1].features[3].squeeze.register_forward_hook(lambda _, __, output: output * math.inf)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", spoilt)
    assert cli.main([*FIT, "--trainer.max_epochs", "3"]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("failed: The loss or a gradient is not finite at step 2, epoch 1: the first output")
    assert "is that of 1.features.3.squeeze (Conv2d)" in error
    assert "--model.lr 3e-05" in error
    assert "Traceback" not in captured.err
    (run,) = Path("runs/photos").iterdir()
    assert "not finite at step 2" in runs.status(run)["reason"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_last_good_checkpoint_is_kept_when_the_loss_is_lost(photos, capsys, monkeypatch):
    from project.classifier import Classifier

    step = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * math.nan if self.trainer.current_epoch == 1 and batch_idx == 3 else loss

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "3"]) == 1
    steps = (84 // 8) + 4
    error = capsys.readouterr().err
    assert f"at step {steps}, epoch 2" in error
    content = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == steps - 1
    assert all(t.isfinite().all() for t in content["state_dict"].values())
    with Path("runs/photos/version_0/metrics.csv").open() as stream:
        assert [row["val/loss"] for row in csv.DictReader(stream) if row["val/loss"]]


@pytest.mark.parametrize(("last", "is_said"), [(0.44, True), (0.47, False)], ids=["by 18 %", "by 9 %"])
def test_validation_loss_that_rises_by_a_tenth_while_the_training_loss_falls_is_said(
    photos, scripted, capsys, last, is_said
):
    scripted(train=[0.4, 0.6, 0.7, 0.8, 0.9], val=[0.4, 0.5, 0.49, 0.48, last])
    found = said(capsys, "--trainer.max_epochs", "5")
    rise = "since epoch 2 the validation loss has risen from 0.693 to 0.821 while the training loss fell to 0.105"
    assert found == ([f"{rise}: best.ckpt holds epoch 2; --data.augment crop may help."] if is_said else [])


def test_accuracy_below_the_most_frequent_class_is_said(workplace, scripted, capsys):
    for split in ("train", "val"):
        make_pictures(workplace / "photos" / split, {"blue": 30, "green": 40})
    scripted(train=[0.6, 0.7, 0.8, 0.9], val=[0.4] * 4)
    (sentence,) = said(capsys, "--trainer.max_epochs", "4")
    assert sentence.startswith("validation accuracy is 0.000, and always answering green gives 0.571")


def test_class_that_is_never_the_answer_is_named(workplace, scripted, capsys):
    make_pictures(workplace / "photos", {"blue": 200, "green": 50})
    scripted(train=[0.6, 0.7, 0.8], val=[0.6, 0.7, 0.8], always=0)
    (sentence,) = said(capsys, "--trainer.max_epochs", "3")
    assert sentence.startswith("never the answer to a validation picture: green; try --data.balance sample")


def test_divergence_is_said(photos, scripted, capsys):
    scripted(train=[0.5, 0.6, 0.2, 0.1], val=[0.4, 0.5, 0.6, 0.7])
    (sentence,) = said(capsys, "--trainer.max_epochs", "4", "--model.lr", "3")
    assert sentence == "the training loss has risen from 0.511 in epoch 2 to 1.61: try --model.lr 0.3."


def test_waiting_for_pictures_is_said_with_the_option_that_helps(workplace, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    for name in ("blue", "green"):
        (workplace / "photos" / name).mkdir(parents=True)
        large = workplace / "photos" / name / "0.png"  # PNGs cannot be decoded at a reduced size
        Image.fromarray(pixels).save(large)
        for number in range(1, 25):
            shutil.copy(large, large.with_stem(str(number)))
    limits = ["--trainer.max_epochs", "2", "--data.cache", "off"]
    (sentence,) = [s for s in said(capsys, *limits) if "waiting for pictures" in s]
    assert "give --data.workers" in sentence
    assert "(now 0)" in sentence
