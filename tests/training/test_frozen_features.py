"""Transfer learning: frozen layers, their features computed once, and layers unfrozen one after another."""

import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional

from project import cli, models
from project.classifier import Classifier
from project.data import images
from project.data.dataset import Features
from project.optim import STAGES, configure, lr_factor
from project.training import frozen_features, linear_probe
from project.training.linear_probe import PENALTIES
from tests.conftest import SMALL, make_images, read_csv
from tests.same_run import checkpoint

FROZEN = ["fit", "--data.root", "photos", *SMALL, "--model.name", "resnet18", "--model.freeze", "backbone"]
FROZEN += ["--data.augment", "none"]


@pytest.mark.slow
def test_frozen_layers_run_once_and_the_head_is_the_solution_of_a_logistic_regression(photos, capsys, monkeypatch):
    alike = sorted(make_images(Path("alike"), {"grey": 40}).rglob("*.png"))
    for file, grey in zip(sorted(photos.rglob("*.png"))[2::3], alike, strict=True):
        grey.replace(file)  # of every class, so that too weak a penalty fits their noise
    (photos / "red" / "000.png").write_bytes(b"no image")
    fit = [*FROZEN, "--trainer.max_epochs", "4", "--average", "0.9"]
    sizes, forward = [], torchvision.models.ResNet.forward
    with monkeypatch.context() as patched:
        patched.setattr(torchvision.models.ResNet, "forward", lambda net, x: sizes.append(len(x)) or forward(net, x))
        assert cli.main(fit) == 0
    # 83 + 12 images in their order; one or two test the size, measure the features and draw TensorBoard's graph
    assert [size for size in sizes if size > 2] == [8] * 7 + [7] + [8] * 2 + [4] + [8, 4]
    assert cli.main(["test"]) == cli.main(["predict", "runs/latest", "photos/red"]) == 0
    out = capsys.readouterr().out
    for part in ("solved for the features of 84 images", "the frozen layers are random", "epoch 1/4"):
        assert part in out
    assert out.count("left out, unreadable: photos/red/000.png: not") == 1
    assert "epoch 2" not in out  # nothing is left to train
    run = Path("runs/photos/version_0")
    weights = {key.removeprefix("network."): tensor for key, tensor in checkpoint(run, "best")["state_dict"].items()}
    network = models.build("resnet18", 3)
    network.load_state_dict(weights)
    rows = [row for row in read_csv(run / "split.csv") if row["path"] != "red/000.png"]
    image = np.stack([images.read(photos / row["path"], 32) for row in rows])
    logits = network.eval()(torch.from_numpy(image).permute(0, 3, 1, 2))
    split, label = (np.array([row[column] for row in rows]) for column in ("split", "label"))
    network[1].fc = torch.nn.Identity()
    features = network(torch.from_numpy(image).permute(0, 3, 1, 2)).detach().double().numpy()
    deviation = features[split == "train"].std(axis=0)
    floor = np.median(deviation[deviation > 1e-6])  # of those that are not always 0
    scaled = (features - features[split == "train"].mean(axis=0)) / np.maximum(deviation, floor)
    losses = {}
    for penalty in PENALTIES:
        reference = LogisticRegression(C=1 / (penalty * sum(split == "train")), max_iter=10_000, tol=1e-6)
        reference.fit(scaled[split == "train"], label[split == "train"])
        probability = reference.predict_proba(scaled)
        losses[penalty] = log_loss(label[split == "val"], probability[split == "val"])
        if losses[penalty] == min(losses.values()):
            best = probability
    penalty, loss = min(losses, key=losses.get), min(losses.values())
    assert f"{penalty:.1g} has the lowest loss on 12 validation images, {loss:.4f}" in out
    assert logits.softmax(dim=1).detach().numpy() == pytest.approx(best, abs=2e-3)


def test_solved_head_weighs_classes_and_smooths_labels_and_takes_features_that_never_change():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 5, generator=generator) + torch.arange(3).repeat_interleave(20)[:, None]
    values[:, 2:] = 0.1
    data = Mock(labels=np.arange(3).repeat(20))
    features = Features(data, values, [])
    weights = torch.tensor([5.0, 1.0, 1.0])
    plain, weighted, smoothed = (
        linear_probe.solve(features, features, 3, *options) for options in ((), (weights,), (None, 0.3))
    )
    shares = [functional.linear(values, head.weight, head.bias).softmax(dim=1) for head in (plain, weighted, smoothed)]
    assert not plain.weight[:, 2:].any()
    assert shares[0].mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)  # a regression with biases
    assert shares[1].mean(dim=0)[0] > 0.36
    assert shares[2].max() < shares[0].max()


@pytest.mark.parametrize("options", [[], ["--model.freeze_bn", "false"]])
@pytest.mark.slow
def test_fine_tuning_starts_from_the_solved_head_and_keeps_the_statistics_of_batch_norm(photos, capsys, options):
    torch.save(models.build("resnet18", 7)[1].state_dict(), "weights.pth")
    small = [*SMALL, "--model.name", "resnet18", "--model.weights", "weights.pth"]
    assert cli.main(["fit", "photos", *small, "--model.lr", "1e-9", "--trainer.max_epochs", "1", *options]) == 0
    run, out = Path("runs/photos/version_0"), capsys.readouterr().out
    assert "label smoothing 0.1, 1 epoch\n" in out
    [row] = [row for row in read_csv(run / "metrics.csv") if row["val/loss"]]
    solved = re.search(r"lowest loss on 12 validation images, ([\d.]+)", out)[1]
    after, before = checkpoint(run)["state_dict"], torch.load("weights.pth")
    name = "layer4.1.bn2.running_var"
    assert torch.equal(after[f"network.1.{name}"], before[name]) == (not options)
    assert (float(row["val/loss"]) == pytest.approx(float(solved), abs=1e-4)) == (not options)
    if options:
        assert f"the solved head alone had a lower val/loss, {solved}: see" in out
    assert f"freeze_bn: {str(not options).lower()}" in (run / "config.yaml").read_text()


@pytest.mark.full
def test_fit_on_weights_with_other_classes_has_the_recipe_of_fine_tuning(photos, capsys):
    torch.save(models.build("resnet18", 7)[1].state_dict(), "weights.pth")
    fit = ["fit", "photos", "--data.image_size", "32", "--data.workers", "0", "--model.name", "resnet18"]
    stop = "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"
    fit += [*stop, "--trainer.callbacks.stopping_threshold=1e9"]  # after the first epoch
    for name, weights in {"a": "weights.pth", "b": "none"}.items():
        assert cli.main([*fit, "--model.weights", weights, "--name", name]) == 0
    out = capsys.readouterr().out
    assert out.count("fine-tuning: adam, lr 0.001, below the head 0.3 of it, label smoothing 0.1, 12 epochs\n") == 1
    assert cli.main([*fit, "--model.weights", "runs/a/version_0", "--name", "c"]) == 0  # of the same classes
    same = "fine-tuning: adam, lr 0.0003, below the head 0.1 of it, label smoothing 0, 24 epochs\n"
    assert same in capsys.readouterr().out
    frozen = ["--model.weights", "weights.pth", "--model.freeze", "backbone", "--name", "d"]
    assert cli.main([*fit, *frozen]) == 0  # the head is trained from random weights, under flips
    assert "fine-tuning" not in capsys.readouterr().out
    configs = [yaml.safe_load(Path(f"runs/{name}/version_0/config.yaml").read_text()) for name in "abcd"]
    names = ("lr", "backbone_lr", "label_smoothing", "freeze_bn")
    chosen = [(each["trainer"]["max_epochs"], *(each["model"][name] for name in names)) for each in configs]
    assert chosen[:2] == [(12, 1e-3, 0.3, 0.1, True), (24, 3e-4, 1.0, 0.0, False)]
    assert chosen[2:] == [(24, 3e-4, 0.1, 0.0, False), (24, 3e-4, 0.1, 0.0, True)]


@pytest.mark.slow
def test_resumed_fit_has_the_solved_head(photos):
    fit = [*FROZEN, "--trainer.max_epochs", "3", "--name"]
    assert cli.main([*fit, "a"]) == cli.main([*fit, "b", "--ckpt_path", "runs/a/version_0/checkpoints/last.ckpt"]) == 0
    heads = [checkpoint(Path(f"runs/{name}/version_0"), "last")["state_dict"]["network.1.fc.weight"] for name in "ab"]
    assert torch.equal(*heads)


@pytest.mark.slow
def test_fit_from_the_checkpoint_of_a_solved_head_has_its_own_learning_rates(photos):
    assert cli.main([*FROZEN, "--trainer.max_epochs", "2", "--name", "a"]) == 0
    last = ["--ckpt_path", "runs/a/version_0/checkpoints/last.ckpt"]
    assert cli.main([*FROZEN, *last, "--data.augment", "flip", "--trainer.max_epochs", "3", "--name", "b"]) == 0
    groups = checkpoint(Path("runs/b/version_0"), "last")["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [3e-4] * len(groups)
    heads = [checkpoint(Path(f"runs/{name}/version_0"), "last")["state_dict"]["network.1.fc.weight"] for name in "ab"]
    assert not torch.equal(*heads)


def test_head_is_solved_in_any_precision_and_measured_where_the_first_epoch_has_no_validation(photos, capsys):
    options = ["--trainer.precision", "bf16-true", "--trainer.check_val_every_n_epoch", "2"]
    assert cli.main([*FROZEN, *options, "--trainer.max_epochs", "4"]) == 0
    out = capsys.readouterr().out
    assert "head: solved for the features of 84 images" in out
    assert "best: epoch 2" in out
    assert "epoch 3/4" not in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data.augment", "flip"], "because --data.augment flip changes it"),
        (["--data.transforms", "[torchvision.transforms.v2.RandomErasing]"], "because --data.transforms changes it"),
        (["--model.mix", "mixup"], "because --model.mix changes it"),
        (["--model.name", "squeezenet1_1"], "because squeezenet1_1 has operations after its last layer"),
    ],
)
def test_the_reason_for_not_computing_features_once_is_printed(photos, capsys, options, reason):
    assert cli.main([*FROZEN, *options, "--trainer.fast_dev_run", "true"]) == 0
    assert reason in capsys.readouterr().out


def test_features_that_overflow_are_not_solved(photos, capsys, monkeypatch):
    compute = frozen_features._compute

    def overflow(*arguments):
        features = compute(*arguments)
        features.values[0, 0] = torch.inf
        return features

    monkeypatch.setattr(frozen_features, "_compute", overflow)
    assert cli.main([*FROZEN, "--trainer.fast_dev_run", "true"]) == 0
    assert "head: trained, because features are infinite in 32-true" in capsys.readouterr().out


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
    assert {round(group["initial_lr"], 6) for group in groups} == {0.01, 0.003}
    assert groups[0]["params"][0].shape[0] == 2  # the head comes first
