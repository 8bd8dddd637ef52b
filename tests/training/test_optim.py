"""Optimisers and schedules by name and by class path, layer-wise learning rates, and that they resume exactly."""

import signal
from pathlib import Path

import pytest
import timm.optim
import torch
import yaml
from torch.optim.lr_scheduler import OneCycleLR

from project import cli, optim, parts
from project.classifier import Classifier
from project.errors import UserError
from project.optim import configure, lr_factor
from project.training.callbacks import StepSeed
from tests.conftest import SMALL, read_csv
from tests.same_run import assert_the_same, checkpoint

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.limit_train_batches", "4", "--trainer.log_every_n_steps", "1"]
RUN = Path("runs/photos/version_0")
NEEDS_MUON = pytest.mark.skipif(not hasattr(timm.optim, "Muon"), reason="timm has Muon from 1.0.21 on")


def configured(name="alexnet", size=64, total_steps=90, **options):
    model = Classifier(["a", "b"], size, name=name, **options)
    return model, configure(model.network, model.head, model.hparams, total_steps=total_steps, fused=True)


def rates(model, made):
    """The peak rate of each parameter by its name in the network."""
    names = {id(parameter): name.removeprefix("1.") for name, parameter in model.network.named_parameters()}
    return {names[id(p)]: group["initial_lr"] for group in made["optimizer"].param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "lowest_first"),
    [
        ("alexnet", [f"features.{n}.weight" for n in (0, 3, 6, 8, 10)] + ["classifier.1.weight", "classifier.4.bias"]),
        ("resnet18", ["conv1.weight", "layer1.0.bn1.weight", "layer2.0.conv1.weight", "layer3.1.conv2.weight"]),
        ("timm/test_vit", ["cls_token", "blocks.0.norm1.weight", "blocks.1.mlp.fc2.bias"]),
        ("timm/test_convnext", ["stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.1.downsample.1.bias"]),
    ],
)
def test_layer_decay_lowers_the_rate_from_layer_to_layer_and_below_the_head(name, lowest_first):
    model, made = configured(name, 160 if "vit" in name else 64, lr=0.1, backbone_lr=0.5, layer_decay=0.7)
    found = rates(model, made)
    assert len(found) == len([*model.network.parameters()])
    depths = len({rate for rate in found.values() if rate < 0.1})
    for number, parameter in enumerate(lowest_first):
        assert found[parameter] == pytest.approx(0.1 * 0.5 * 0.7 ** (depths - number))
    head = model.head_name.removeprefix("1.")
    assert {parameter for parameter, rate in found.items() if rate == 0.1} == {f"{head}.weight", f"{head}.bias"}
    if name == "resnet18":
        assert found["bn1.weight"] == found["conv1.weight"]  # a norm belongs to the layer before
    if "vit" in name:
        assert found["pos_embed"] == found["patch_embed.proj.bias"] == found["cls_token"]


@pytest.mark.parametrize("fine_tunes", [False, True])
def test_a_further_short_name_is_one_line_also_where_the_network_is_fine_tuned(fine_tunes, monkeypatch):
    monkeypatch.setitem(optim.RULES, "rmsprop", ("torch.optim.RMSprop", {"alpha": 0.9}, 1e-4))
    options = {"optimizer": "rmsprop", "scheduler": "cosine", "lr": None}
    assert optim.defaults(options, "DEFAULT", fine_tunes)["lr"] == 1e-4
    made = configured("squeezenet1_1", optimizer="rmsprop")[1]["optimizer"]
    assert isinstance(made, torch.optim.RMSprop)
    assert {group["alpha"] for group in made.param_groups} == {0.9}
    with pytest.raises(KeyError):
        lr_factor(80, 90, 0.0, shape="linear")  # rather than a constant rate


def test_schedules_by_short_name_are_functions_of_the_step_which_may_go_beyond_the_end():
    of = {s: [lr_factor(n, 90, 0.0, shape=s) for n in range(150)] for s in ("step", "constant")}
    assert of["step"] == pytest.approx([1.0] * 30 + [0.1] * 30 + [0.01] * 90)
    assert of["constant"] == [1.0] * 150
    assert lr_factor(4, 90, 0.1, shape="constant") == lr_factor(4, 90, 0.1) == 0.5
    _, made = configured(scheduler="one-cycle", lr=1.0)
    factor = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    torchs = OneCycleLR(torch.optim.SGD([torch.zeros(1)], momentum=0.9), 1.0, total_steps=90)
    for step in range(89):
        assert factor(step) == pytest.approx(torchs.get_last_lr()[0], abs=0.06)  # whose peak is one step earlier
        torchs.optimizer.step()
        torchs.step()
    assert factor(0) == pytest.approx(1 / 25)
    assert factor(27) == 1.0
    assert factor(200) < 1e-5
    assert lr_factor(10**6, float("inf"), 0.3, shape="step") == lr_factor(10**6, float("inf"), 0.3, shape="one-cycle")


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        ("torch.optim.NAdam", 2e-3),
        pytest.param("timm.optim.Muon", 0.02, marks=NEEDS_MUON),
        ({"class_path": "timm.optim.Lamb"}, 1e-3),
    ],
)
def test_class_path_gets_groups_with_rates_and_weight_decay_and_its_signatures_rate(rule, rate):
    model, made = configured(optimizer=rule, weight_decay=0.1, backbone_lr=0.5)
    assert model.hparams["optimizer"] == parts.part(rule)
    assert {group["lr"] for group in made["optimizer"].param_groups} == {
        made["lr_scheduler"]["scheduler"].lr_lambdas[0](0) * share * rate for share in (0.5, 1.0)
    }
    assert {group["weight_decay"] for group in made["optimizer"].param_groups} == {0.1, 0.0}


@pytest.mark.slow
def test_one_kernel_where_the_class_has_it_and_nothing_else_is_asked_for():
    for arguments, expected in (({}, True), ({"fused": False}, False), ({"foreach": True}, False)):
        _, made = configured(optimizer={"class_path": "torch.optim.Adam", "init_args": arguments})
        assert made["optimizer"].defaults["fused"] is expected
    assert "fused" not in configured(optimizer="torch.optim.NAdam")[1]["optimizer"].defaults


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"nesterov": True}}},
            "--model.optimizer torch.optim.SGD refuses its arguments: Nesterov momentum requires",
        ),
        ({"optimizer": "torch.optim.LBFGS", "weight_decay": 0.1}, "torch.optim.LBFGS takes no weight decay"),
        ({"optimizer": "timm.optim.Adafactor"}, "has no learning rate of its own; give --model.lr"),
        ({"scheduler": "plateau", "warmup": 0.1}, "--model.warmup and --model.freeze gradual go with"),
        ({"scheduler": "plateau", "freeze": "gradual"}, "--model.warmup and --model.freeze gradual go with"),
        ({"layer_decay": 0.5, "freeze": "backbone"}, "--model.layer_decay goes with --model.freeze none, not backbone"),
        (
            {"scheduler": "torch.optim.lr_scheduler.OneCycleLR", "total_steps": float("inf")},
            "refuses its arguments: You",
        ),
    ],
)
def test_what_does_not_go_together_is_a_sentence(options, said):
    with pytest.raises(UserError, match=said):
        configured(**options)


@pytest.fixture
def stop(monkeypatch):
    """Presses Ctrl-C once at each of these places: a step, from 0, or an epoch's validation."""
    places = set()

    def press_in(callback, name, place_of):
        hook = getattr(callback, name)

        def press(self, trainer, *rest):
            if (place := place_of(trainer)) in places:
                places.remove(place)
                signal.raise_signal(signal.SIGINT)
            hook(self, trainer, *rest)

        monkeypatch.setattr(callback, name, press)

    press_in(StepSeed, "on_train_batch_start", lambda trainer: trainer.fit_loop.total_batch_idx)
    press_in(StepSeed, "on_validation_batch_start", lambda trainer: f"validation {trainer.current_epoch}")
    return places.update


def part(path, **arguments):
    """The words of a class path with arguments, for the option before."""
    return yaml.safe_dump({"class_path": path, "init_args": arguments}, default_flow_style=True, width=10**6).strip()


EVERY_EPOCH = {"threshold": -1.0, "threshold_mode": "abs", "patience": 1, "factor": 0.5}
KINDS = [
    ["--model.scheduler", part("torch.optim.lr_scheduler.ReduceLROnPlateau", **EVERY_EPOCH), "--patience", "9"],
    ["--model.optimizer", "schedulefree.AdamWScheduleFree", "--model.scheduler", "constant"],
    ["--model.optimizer", part("NAdam", betas=[0.9, 0.99]), "--model.scheduler", "OneCycleLR"],
    ["--model.optimizer", "timm.optim.Muon", "--model.scheduler", part("StepLR", step_size=1, gamma=0.5)],
    ["--model.optimizer", "timm.optim.Lamb", "--model.scheduler", "step", "--model.layer_decay", "0.8"],
    ["--model.scheduler", part("MultiStepLR", milestones=[1, 3]), "--model.optimizer", "torch.optim.Adafactor"],
]


@pytest.mark.parametrize(
    "options",
    [*KINDS[:1], *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS[1:])],
    ids=lambda options: " ".join(options[:2])[:60],
)
@pytest.mark.slow
def test_fit_resumes_to_the_same_bits_after_a_stop_in_a_step_and_in_a_validation(photos, stop, options):
    options = [*options, "--trainer.max_epochs", "4"]
    assert cli.main([*FIT, *options, "--name", "whole"]) == 0
    stop([2, "validation 1", 13])
    assert cli.main([*FIT, *options, "--name", "photos"]) == 130
    while (code := cli.main(["fit", "--resume", "--trust", options[1]])) == 130:
        pass
    assert code == 0
    whole = Path("runs/whole/version_0")
    for file in (whole / "config.yaml", *whole.glob("checkpoints/*.ckpt")):
        if file.suffix == ".yaml":
            file.write_text(file.read_text().replace("name: whole", "name: photos"))
    assert_the_same(RUN, whole)
    assert cli.main(["test", str(RUN)]) == 0


def test_the_state_of_another_optimizer_or_schedule_is_not_continued(at_trained, refused):
    source = ["fit", "--ckpt_path", str(at_trained / "checkpoints" / "last.ckpt"), "--trainer.max_epochs", "5"]
    for words, said in (
        (["--model.optimizer", "sgd"], "training state of another --model.optimizer; leave it out"),
        (["--model.scheduler", "plateau", "--model.warmup", "0"], "of another --model.scheduler; leave it out"),
        (["--model.weight_decay", "0.1"], "of another --model.weight_decay; leave it out"),
    ):
        assert said in refused(*source, *words)


@pytest.mark.slow
def test_what_cannot_be_made_is_refused_before_there_is_a_run_and_a_schedule_that_ends_too_early(photos, refused):
    own, plateau = "schedulefree.AdamWScheduleFree", ["--model.scheduler", "plateau"]
    assert "Nesterov momentum requires" in refused(*FIT, "--model.optimizer", part("SGD", nesterov=True))
    assert "needs validations" in refused(*FIT, *plateau, "--trainer.limit_val_batches", "0")
    assert not Path("runs").exists()
    once = ["--model.scheduler", "OneCycleLR", "--trainer.max_epochs", "1"]
    assert cli.main([*FIT, *once, "--model.optimizer", own, "--model.scheduler.cycle_momentum", "false"]) == 0
    longer = ["fit", "--resume", str(RUN), "--trainer.max_epochs", "2"]
    assert f"names {own}" in refused(*longer)
    assert "OneCycleLR ends at step 4" in refused(*longer, "--trust", own)
    assert checkpoint(RUN)["global_step"] == 4
    (state,) = checkpoint(RUN)["optimizer_states"]
    assert not any(group["train_mode"] for group in state["param_groups"])  # the network holds the average
    # a verb that trains nothing does not make the optimizer, so nobody has to trust it
    assert cli.main(["validate", str(RUN)]) == 0
    said = refused("fit", "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"), "--trainer.max_epochs", "2")
    assert f"names {own}" in said


def test_tune_takes_any_optimizer_and_schedule(photos, capsys):
    own = ["--model.optimizer", "schedulefree.AdamWScheduleFree", "--model.scheduler", "plateau"]
    assert cli.main(["tune", "--data.root", "photos", *SMALL, "--steps", "24", *own]) == 0
    assert "learning rate finder: 24 steps" in capsys.readouterr().out


def test_plateau_waits_for_three_validations_and_has_the_rate_that_the_best_needs(photos, scripted):
    scripted([0.5] * 7, [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    words = ["--model.scheduler", "plateau", "--model.lr", "0.01", "--trainer.max_epochs", "7"]
    assert cli.main([*FIT, *words]) == 0
    rates = [float(row["lr-Adam"]) for row in read_csv(RUN / "metrics.csv") if row["lr-Adam"]]
    assert rates == pytest.approx([0.01] * 24 + [0.001] * 4)  # after four worse ones than the second
