"""Transfer learning: frozen layers, their features computed once, and layers unfrozen one after another."""

import csv
from pathlib import Path

import pytest
import torch
import torchvision

from project import cli
from project.classifier import Classifier
from project.optim import STAGES, lr_factor
from project.training import frozen_features
from tests.conftest import SMALL

FIT = ["fit", "--data.root", "photos", *SMALL, "--model.name", "resnet18"]
FROZEN = [*FIT, "--model.freeze", "backbone", "--data.augment", "none"]


def curve(name):
    with Path(f"runs/{name}/version_0/metrics.csv").open() as stream:
        return [float(row["val/loss"]) for row in csv.DictReader(stream) if row["val/loss"]]


def weights_of(name):
    return torch.load(f"runs/{name}/version_0/checkpoints/best.ckpt", weights_only=True)["state_dict"]


def test_features_computed_once_give_the_same_fit_as_running_the_frozen_layers_each_time(photos, capsys, monkeypatch):
    (photos / "red" / "000.png").write_bytes(b"no image")
    epochs = ["--trainer.max_epochs", "4", "--model.lr", "0.01"]
    assert cli.main([*FROZEN, *epochs, "--name", "once"]) == 0
    assert cli.main(["test"]) == cli.main(["predict", "runs/latest", "photos/red"]) == 0
    out = capsys.readouterr().out
    assert "frozen layers: computed once for 96 images" in out
    assert "only 1.fc is run" in out
    assert "left out, unreadable: photos/red/000.png" in out
    monkeypatch.setattr(frozen_features.FrozenFeatures, "setup", lambda *_, **__: None)
    assert cli.main([*FROZEN, *epochs, "--name", "each"]) == 0
    assert curve("once") == pytest.approx(curve("each"), abs=1e-5)
    assert curve("once")[-1] != curve("once")[0]  # the head has learned
    once, each = weights_of("once"), weights_of("each")
    assert all(torch.allclose(tensor, each[key], atol=1e-5) for key, tensor in once.items())


def test_frozen_layers_run_once(photos, monkeypatch):
    sizes, forward = [], torchvision.models.ResNet.forward
    monkeypatch.setattr(torchvision.models.ResNet, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    assert cli.main([*FROZEN, "--trainer.max_epochs", "3", "--trainer.logger", "false"]) == 0
    # one image tests whether the network takes the size, two measure the features, then each of the 96 is run once
    assert sizes == [1, 2] + [8] * 10 + [4] + [8, 4]


def test_frozen_layers_do_not_change_and_the_head_does(photos):
    start = [*FIT, "--trainer.max_epochs", "1", "--name"]
    assert cli.main([*start, "first"]) == 0
    frozen = ["--model.freeze", "backbone", "--model.weights", "runs/first/version_0"]
    assert cli.main([*start, "second", *frozen]) == 0  # with flips, the layers run each time, in evaluation mode
    before, after = weights_of("first"), weights_of("second")
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {"network.1.fc.weight", "network.1.fc.bias"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data.augment", "flip"], "because --data.augment flip changes it"),
        (["--model.mix", "mixup"], "because --model.mix changes it"),
        (["--model.name", "squeezenet1_1"], "because squeezenet1_1 has operations after its last layer"),
    ],
)
def test_the_reason_for_not_computing_features_once_is_printed(photos, capsys, options, reason):
    assert cli.main([*FROZEN, *options, "--trainer.max_epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert reason in out
    assert "without --model.weights: the frozen layers are random" in out


def classifier(**options):
    model = Classifier(["a", "b"], 32, name="resnet18", **options)

    class Trained:
        precision = "32-true"
        estimated_stepping_batches = 100

    model._trainer = Trained()
    return model


def rates(model, step):
    """Learning rate of each group of parameters after a number of steps."""
    configured = model.configure_optimizers()
    factors, groups = configured["lr_scheduler"]["scheduler"].lr_lambdas, configured["optimizer"].param_groups
    return [group["initial_lr"] * factor(step) for group, factor in zip(groups, factors, strict=True)]


def test_learning_rate_is_a_pure_function_of_the_step():
    factors = [lr_factor(step, total=100, warmup=0.1) for step in range(150)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] + factors[10:101][::-1] == sorted(factors[:11]) + sorted(factors[10:101])
    assert factors[100:] == pytest.approx([0.01] * 50)  # a fit that is continued past its end does not fail
    assert lr_factor(10**6, total=float("inf"), warmup=0.1) == 1.0


def test_gradual_unfreezes_layers_from_the_top_downwards():
    model = classifier(freeze="gradual", lr=1.0, backbone_lr=0.1, weight_decay=0.1)
    # two groups a stage: with weight decay and without
    unfrozen = [sum(rate > 0 for rate in rates(model, step)) // 2 - 1 for step in range(100)]
    assert unfrozen == sorted(unfrozen)
    assert [unfrozen.index(stage) for stage in range(STAGES + 1)] == [0, 13, 25, 38, 50]
    assert max(rates(model, 60)[2:]) == pytest.approx(0.1 * lr_factor(60, 100, 0.1))


def test_every_parameter_is_trained_once_and_biases_have_no_weight_decay():
    for options in ({}, {"freeze": "gradual"}, {"weights": "none", "optimizer": "sgd"}, {"optimizer": "adamw"}):
        model = classifier(weight_decay=0.1, **options)
        groups = model.configure_optimizers()["optimizer"].param_groups
        given = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(given) == sorted(id(parameter) for parameter in model.network.parameters())
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.1) for group in groups for p in group["params"])


def test_learning_rate_below_the_head_is_a_share_of_the_heads(at_trained):
    model = Classifier(["a", "b"], 32, name="squeezenet1_1", weights=str(at_trained), lr=0.01)
    model._trainer = classifier()._trainer
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert {round(group["initial_lr"], 6) for group in groups} == {0.01, 0.001}
    assert groups[0]["params"][0].shape[0] == 2  # the head comes first
