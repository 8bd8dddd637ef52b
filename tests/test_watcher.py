"""The watcher: each rule is provoked on real training, and all are silent on a healthy one."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli, runs
from tests.conftest import SMALL, make_pictures

FIT = ["fit", "--data.root", "photos", *SMALL]


def said(capsys, *options, code=0):
    """The watcher's sentences in a fit with these options."""
    capsys.readouterr()
    assert cli.main([*FIT, *options]) == code
    captured = capsys.readouterr()
    return [line.removeprefix("watcher: ") for line in captured.out.splitlines() if line.startswith("watcher: ")]


def shuffle_labels(root: Path) -> None:
    """Pictures that say nothing about their class."""
    random = np.random.default_rng(0)
    for file in root.rglob("*.png"):
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file)


def test_silent_on_a_healthy_fit(photos, capsys):
    assert said(capsys, "--trainer.max_epochs", "4", "--model.lr", "0.001") == []


def test_loss_stuck_at_guessing_is_said_once_with_what_to_try(photos, capsys):
    (sentence,) = [s for s in said(capsys, "--trainer.max_epochs", "5", "--model.lr", "1e-9") if "guessing" in s]
    assert "ln 3 = 1.099" in sentence
    assert "--model.lr 1e-08" in sentence
    assert "check photos" in sentence
    (run,) = Path("runs/photos").iterdir()
    events = EventAccumulator(str(run)).Reload()
    text = events.Tensors("watcher/stuck/text_summary")
    assert [tensor.tensor_proto.string_val[0].decode() for tensor in text] == [sentence]


def test_loss_that_is_not_a_number_ends_the_fit_and_names_step_and_layer(photos, capsys):
    assert cli.main([*FIT, "--trainer.max_epochs", "3", "--model.lr", "1e30", "--model.warmup", "0"]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("failed: The loss or a gradient is not finite at step 2, epoch 1: the first output")
    assert "1.features.0 (Conv2d)" in error or "1.features" in error
    assert "--model.lr 1e+29" in error
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
    assert cli.main([*FIT, "--trainer.max_epochs", "3"]) == 1
    steps = (84 // 8) + 4
    error = capsys.readouterr().err
    assert f"at step {steps}, epoch 2" in error
    content = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == steps - 1
    assert all(t.isfinite().all() for t in content["state_dict"].values())
    with Path("runs/photos/version_0/metrics.csv").open() as stream:
        assert [row["val/loss"] for row in csv.DictReader(stream) if row["val/loss"]]


def test_labels_that_mean_nothing_end_below_the_baseline_or_with_a_gap(workplace, capsys):
    make_pictures(workplace / "photos", {"blue": 40, "green": 120})
    shuffle_labels(workplace / "photos")
    options = ["--model.name", "resnet18", "--data.augment", "none", "--trainer.max_epochs", "10"]
    found = said(capsys, *options, "--model.lr", "0.001")
    assert any("validation loss has risen" in s and "best.ckpt holds epoch" in s for s in found), found


def test_accuracy_below_the_most_frequent_class_is_said(workplace, capsys):
    for split in ("train", "val"):
        make_pictures(workplace / "photos" / split, {"blue": 30, "green": 40})
    train = workplace / "photos" / "train"
    for old, new in (("blue", "x"), ("green", "blue"), ("x", "green")):  # learned the wrong way round
        (train / old).rename(train / new)
    found = said(capsys, "--trainer.max_epochs", "4", "--model.lr", "0.001")
    (sentence,) = [s for s in found if "always answering" in s]
    assert "always answering green gives 0.571" in sentence


def test_class_that_is_never_the_answer_is_named(workplace, capsys):
    make_pictures(workplace / "photos", {"blue": 200, "green": 50})
    shuffle_labels(workplace / "photos")
    (sentence,) = [s for s in said(capsys, "--trainer.max_epochs", "3") if "never the answer" in s]
    assert "picture: green; try --data.balance sample" in sentence


def test_divergence_is_said(photos, capsys):
    options = ["--model.name", "resnet18", "--model.optimizer", "sgd", "--model.lr", "3", "--model.warmup", "0.9"]
    found = said(capsys, *options, "--trainer.max_epochs", "4")
    assert any("the training loss has risen from" in s for s in found), found


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
