"""Transfer learning: frozen layers, their features computed once, and layers unfrozen one after another."""

from pathlib import Path

import pytest
import torch
import torchvision

from project import cli
from project.classifier import Classifier
from project.optim import STAGES, configure, lr_factor
from project.training import frozen_features
from tests.conftest import SMALL, read_csv
from tests.same_run import checkpoint

FROZEN = ["fit", "--data.root", "photos", *SMALL, "--model.name", "resnet18", "--model.freeze", "backbone"]
FROZEN += ["--data.augment", "none"]


def test_frozen_layers_that_run_once_give_the_same_fit_as_running_them_each_time_and_do_not_change(
    photos, capsys, monkeypatch
):
    (photos / "red" / "000.png").write_bytes(b"no image")
    fit = [*FROZEN, "--trainer.max_epochs", "4", "--model.lr", "0.01", "--name"]
    sizes, forward = [], torchvision.models.ResNet.forward
    with monkeypatch.context() as patched:
        patched.setattr(torchvision.models.ResNet, "forward", lambda net, x: sizes.append(len(x)) or forward(net, x))
        assert cli.main([*fit, "once"]) == 0
    # 83 + 12 images in their order; one or two test the size, measure the features and draw TensorBoard's graph
    assert [size for size in sizes if size > 2] == [8] * 7 + [7] + [8] * 2 + [4] + [8, 4]
    assert cli.main(["test"]) == cli.main(["predict", "runs/latest", "photos/red"]) == 0
    out = capsys.readouterr().out
    for part in ("computed once for 96 images", "only 1.fc is run", "the frozen layers are random", "red/000.png: not"):
        assert part in out
    monkeypatch.setattr(frozen_features.FrozenFeatures, "setup", lambda *_, **__: None)
    assert cli.main([*fit, "each"]) == 0
    once, each = Path("runs/once/version_0"), Path("runs/each/version_0")
    curve, other = (
        [float(row["val/loss"]) for row in read_csv(run / "metrics.csv") if row["val/loss"]] for run in (once, each)
    )
    assert curve == pytest.approx(other, abs=1e-5)
    assert curve[-1] != curve[0]  # the head has learned
    weights, others = (checkpoint(run, "best")["state_dict"] for run in (once, each))
    assert all(torch.allclose(tensor, others[key], atol=1e-5) for key, tensor in weights.items())
    changed = {key for key, tensor in weights.items() if not torch.equal(tensor, others[key])}
    assert changed <= {"network.1.fc.weight", "network.1.fc.bias"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data.augment", "flip"], "because --data.augment flip changes it"),
        (["--model.mix", "mixup"], "because --model.mix changes it"),
        (["--model.name", "squeezenet1_1"], "because squeezenet1_1 has operations after its last layer"),
    ],
)
def test_the_reason_for_not_computing_features_once_is_printed(photos, capsys, options, reason):
    assert cli.main([*FROZEN, *options, "--trainer.fast_dev_run", "true"]) == 0
    assert reason in capsys.readouterr().out


def configured(**options):
    """A network, and its optimiser and schedule of 100 steps."""
    model = Classifier(["a", "b"], 32, **({"name": "resnet18"} | options))
    return model.network, configure(model.network, model.head, model.hparams, total_steps=100, fused=True)


def test_frozen_layers_stay_in_evaluation_mode():
    model = Classifier(["a", "b"], 32, name="resnet18", freeze="backbone").train()
    assert not any(layer.training for layer in model.network.modules())


def test_learning_rate_is_a_pure_function_of_the_step():
    factors = [lr_factor(step, total=100, warmup=0.1) for step in range(150)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] + factors[10:101][::-1] == sorted(factors[:11]) + sorted(factors[10:101])
    assert factors[100:] == pytest.approx([0.01] * 50)  # a fit that is continued past its end does not fail
    assert lr_factor(10**6, total=float("inf"), warmup=0.1) == 1.0


def test_gradual_unfreezes_layers_from_the_top_downwards():
    _, made = configured(freeze="gradual", lr=1.0, backbone_lr=0.1, weight_decay=0.1)
    groups, factors = made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"].lr_lambdas
    rates = [[g["initial_lr"] * factor(step) for g, factor in zip(groups, factors, strict=True)] for step in range(100)]
    # two groups a stage: with weight decay and without
    unfrozen = [sum(rate > 0 for rate in of_groups) // 2 - 1 for of_groups in rates]
    assert unfrozen == sorted(unfrozen)
    assert [unfrozen.index(stage) for stage in range(STAGES + 1)] == [0, 13, 25, 38, 50]
    assert max(rates[60][2:]) == pytest.approx(0.1 * lr_factor(60, 100, 0.1))


@pytest.mark.parametrize("options", [{}, {"freeze": "gradual"}, {"optimizer": "sgd"}, {"optimizer": "adamw"}])
def test_every_parameter_is_trained_once_and_biases_have_no_weight_decay(options):
    network, made = configured(weight_decay=0.1, **options)
    groups = made["optimizer"].param_groups
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted(id(parameter) for parameter in network.parameters())
    assert all((p.ndim > 1) == (group["weight_decay"] == 0.1) for group in groups for p in group["params"])


def test_learning_rate_below_the_head_is_a_share_of_the_heads(at_trained):
    _, made = configured(name="squeezenet1_1", weights=str(at_trained), lr=0.01)
    groups = made["optimizer"].param_groups
    assert {round(group["initial_lr"], 6) for group in groups} == {0.01, 0.001}
    assert groups[0]["params"][0].shape[0] == 2  # the head comes first
