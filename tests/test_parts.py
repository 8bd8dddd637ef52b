"""Parts by class path, and which of them a file may name without being trusted."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml

from project import cli, load, models, parts
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import UserError
from project.inference import bundle

NETS = """
from torch import nn, tensor


class Tiny(nn.Module):
    def __init__(self, num_classes: int, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(width, num_classes)

    def forward(self, image):
        return self.last(self.layers(image))


def tiny(num_classes: int, width: int = 4, slope: float = 0.0) -> nn.Module:
    network = Tiny(num_classes, width)
    network.layers[1] = nn.LeakyReLU(slope)
    return network


class Seven(Tiny):
    def __init__(self, num_classes: int):
        super().__init__(7)


class Named(Tiny):
    def forward(self, image):
        return {"logits": super().forward(image)}


class Flat(Tiny):
    def forward(self, image):
        return super().forward(image.flatten(1))


class Bare(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(tensor([[0.1] * num_classes] * 3))

    def forward(self, image):
        return image.mean((2, 3)) @ self.weight


def unannotated(num_classes):
    return Tiny(num_classes)
"""
FIT = ["--data.image_size", "32", "--data.workers", "0", "--data.batch_size", "8", "--trainer.max_epochs", "1"]
EVIL = "open('executed', 'w')\nfrom torch import nn\n\n\nclass Net(nn.Linear):\n    pass\n"


@pytest.fixture
def nets(photos, monkeypatch):
    """The current folder has photos/ and the modules nets and evil, as on the path of `python -m`."""
    Path("nets.py").write_text(NETS)
    Path("evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(Path.cwd())
    yield
    sys.modules.pop("nets", None)
    sys.modules.pop("evil", None)


def fit(*words: str) -> Path:
    assert cli.main(["fit", "--data.root", "photos", *FIT, *words]) == 0
    os.environ.pop("PROJECT_RUN", None)
    return Path("runs/latest").resolve()


@pytest.mark.slow
def test_own_network_from_a_file_and_a_config_in_every_verb(nets, capsys, refused):
    Path("net.yaml").write_text("model:\n  network: {class_path: nets.Tiny, init_args: {width: 8}}\n")
    run = fit("--config", "net.yaml")
    assert "test runs/photos/version_0 --trust nets.Tiny" in capsys.readouterr().out
    recorded = yaml.safe_load((run / "config.yaml").read_text())["model"]["network"]
    assert recorded == {"class_path": "nets.Tiny", "init_args": {"width": 8}}
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert state["metadata"]["model"] == "nets.Tiny"
    assert state["state_dict"]["network.1.last.weight"].shape == (3, 8)
    trust = ["--trust", "nets.Tiny"]
    for words in (
        ("test", "runs/latest"),
        ("validate", "runs/latest"),
        ("predict", "runs/latest", "photos/red/000.png"),
        ("explain", "runs/latest", "photos/red/000.png"),
        ("report", "runs/latest"),
        ("fit", "--resume", "runs/latest", "--trainer.max_epochs", "2"),
        ("fit", "--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_epochs", "3"),
        ("export", str(run)),
    ):
        sentence = refused(*words)
        assert "names nets.Tiny" in sentence
        assert "add --trust nets.Tiny" in sentence
        assert cli.main([*words, *trust]) == 0, capsys.readouterr().err
        os.environ.pop("PROJECT_RUN", None)
    with pytest.raises(UserError, match=r"--trust nets\.Tiny"):
        load(run)
    image = ["photos/red/000.png"]
    probabilities = load(run, trust=["nets.Tiny"]).predict(image)[0].probabilities
    assert load(run / "bundle").predict(image)[0].probabilities == pytest.approx(probabilities, abs=1e-4)
    with pytest.raises(UserError, match=r"--trust nets\.Tiny"):
        Classifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    loaded = Classifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt", trust=["nets.Tiny"])
    network = load(run, trust=["nets.Tiny"]).network.cpu()
    assert torch.equal(loaded.network[1].last.weight, network[1].last.weight)


@pytest.mark.slow
def test_a_command_that_names_the_network_itself_resumes_and_a_file_cannot_trust_itself(nets, refused):
    run = fit("--model.network", "nets.tiny", "--model.network.width", "5")
    more = ["--trainer.max_epochs", "2", "--resume", str(run)]
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"trust": ["nets.tiny"]}))
    assert "names nets.tiny" in refused("fit", *more)
    Path("trust.yaml").write_text("trust: [nets.tiny]\n")
    assert "names nets.tiny" in refused("fit", *more, "--config", "trust.yaml")
    assert cli.main(["fit", *more, "--model.network", "nets.tiny", "--model.network.width", "5"]) == 0
    assert "trust" not in yaml.safe_load((run / "config.yaml").read_text())
    named = ["--model.network", "nets.tiny"]
    assert "does not fit nets.tiny" in refused("test", str(run), *named, "--model.network.width", "7")
    assert "'slope': 0.0}}, not of" in refused("test", str(run), *named, "--model.network.slope", "0.5")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nets.Tinny", "--model.network nets.Tinny cannot be used: nets has no Tinny. Did you mean Tiny?"),
        ("net.Tiny", "there is no module net. Did you mean nets?"),
        ("Resnet", "Resnet cannot be used: there is no such class; give package.module.Class. Did you mean ResNet?"),
        ("nets.Tiny|--model.network.widht|8", "it takes no widht. Did you mean width?"),
        ("nets.Tiny|--model.network.width|x", "--model.network cannot be used: width is x; it takes int."),
        ("nets.unannotated", "it is no Module, nor a function annotated -> Module"),
        ("nets.Tiny|--model.name|resnet18", "--model.name resnet18 and --model.network are two networks"),
        ("nets.Tiny|--model.weights|DEFAULT", "nets.Tiny has no published weights; give a file."),
        ("nets.Seven", "nets.Seven returns (1, 7) for one image; logits are a tensor (1, 3)."),
        ("nets.Named", "nets.Named returns dict for one image"),
        ("nets.Flat", "image_size is 32, which nets.Flat does not take; nor a larger one: Expected 3D"),
        ("nets.Bare|--model.freeze|backbone", "needs a last layer, Linear or Conv2d, which nets.Bare has not"),
        ("{init_args: {width: 8}}", "--model.network cannot be used: "),
    ],
)
def test_network_that_cannot_be_used_is_refused_in_a_sentence(nets, refused, words, sentence):
    assert sentence in refused("fit", "--data.root", "photos", *FIT, "--model.network", *words.split("|"))
    assert not Path("runs").exists()


def test_network_without_a_last_layer_trains(nets):
    assert load(fit("--model.network", "nets.Bare"), trust=["nets.Bare"]).class_names == ["blue", "green", "red"]


KNOWN = [
    {"class_path": "torch.nn.Linear", "init_args": {"bias": True, "mode": "a word"}},
    {"class_path": "torch.optim.NAdam", "init_args": {"betas": [0.9, 0.99]}},
    {"class_path": "torch.optim.lr_scheduler.StepLR"},
    {"class_path": "torchmetrics.CohenKappa", "init_args": {"task": "multiclass"}},
    {
        "class_path": "torchvision.transforms.v2.RandomApply",
        "init_args": {"transforms": [{"class_path": "torch.nn.ReLU"}]},
    },
    {"class_path": "torchvision.models.resnet18"},
    {"class_path": "timm.models.resnet.resnet18", "init_args": {"act_layer": "torch.nn.GELU"}},
    {"class_path": "project.models.alexnet.AlexNet"},
    "adam",
    None,
]
EVIL_PART = {"class_path": "evil.Net", "init_args": {}}
FOREIGN = [
    {"class_path": "evil.Net"},
    "evil.Net",
    {"class_path": "Net"},
    {"class_path": "os.system"},
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x"}},
    {"class_path": "torch.nn.functional.os.system"},
    {"class_path": "torchvision.datasets.MNIST"},
    {"class_path": "torchvision.models.get_model"},
    {"class_path": "timm.create_model"},
    {"class_path": "project.__main__"},
    {"class_path": "project.cli.main"},
    {"class_path": "lightning.pytorch.callbacks.LambdaCallback"},
    {"class_path": "torchvision.transforms.v2.Lambda", "init_args": {"lambd": "os.system"}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": [{"b": "evil.Net"}]}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": "{class_path: evil.Net}"}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": "net.yaml"}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": "word"}},  # a file of that name
    {"class_path": "torch.nn.Linear", "dict_kwargs": {"a": "evil.Net"}},
    {"class_path": ["evil.Net"]},
    {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": ("evil.Net",)}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": {"evil.Net"}}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": b"evil.Net"}},
    {"class_path": "torch.nn.Linear", "init_args": {"a": "evil." * 100}},
    {"class_path": "torch.nn.Linear", "init_args": {"a.class_path": "Net"}},
    {"class_path": "project.classifier.Classifier"},
    "torch.nn.Linear",  # a file of that name, too, which a parser would read
]


def test_files_may_name_networks_optimizers_metrics_and_transforms_of_libraries_and_nothing_else(nets):
    Path("word").write_text("class_path: evil.Net\n")
    for entry in KNOWN:
        parts.require_trusted(entry, (), "a.ckpt")
    Path("torch.nn.Linear").write_text("class_path: evil.Net\n")
    for entry in FOREIGN:
        with pytest.raises(UserError, match=r"a\.ckpt names .*add --trust"):
            parts.require_trusted(entry, (), "a.ckpt")
    parts.require_trusted(FOREIGN[0], ["evil.Net"], "a.ckpt")
    assert not Path("executed").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        {"config": "other.yaml"},
        {"model": "other.yaml"},
        {"trainer": "other.yaml"},
        {"model.network": "evil.Net"},
        {"model": {"network.class_path": "evil.Net"}},
        {"model": {"network": {"class_path": "evil.Net", "init_args": {}}}},
        {"trainer": {"callbacks": [{"class_path": "evil.Net"}]}},
        {"trainer": {"logger": {"class_path": "evil.Net"}}},
        {"trainer": {"strategy": "evil.Net"}},
        {"trainer": {"profiler": "PyTorchProfiler"}},  # a parser finds that class
    ],
)
def test_config_of_a_run_cannot_choose_what_code_a_resumed_fit_runs(nets, trained, refused, change):
    shutil.copytree(trained / "runs", "runs", symlinks=True)
    file = Path("runs/photos/version_0/config.yaml")
    Path("other.yaml").write_text("model: {network: {class_path: evil.Net}}\n")
    config = yaml.safe_load(file.read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(config))
    resume = ["fit", "--resume", "runs/photos/version_0", "--trainer.max_epochs", "4"]
    for words in ([], ["--data.transforms+=RandomGrayscale"]):
        said = refused(*resume, *words)
        assert re.search(r"evil\.Net|PyTorchProfiler|does not have the form of a run's options", said)
    assert not Path("executed").exists()
    assert "evil" not in sys.modules


def test_checkpoint_and_bundle_cannot_choose_what_code_runs(nets, trained, packed, refused, tmp_path):
    content = torch.load(trained / "runs/photos/version_0/checkpoints/best.ckpt", weights_only=True)
    evil = {"class_path": "evil.Net", "init_args": {}}
    content["metadata"]["config"]["model"]["network"] = content["hyper_parameters"]["network"] = evil
    content["metadata"]["model"] = "evil.Net"
    torch.save(content, "evil.ckpt")
    for words in (
        "test",
        "validate",
        "predict evil.ckpt photos",
        "explain evil.ckpt photos",
        "export",
        "report",
        "fit",
    ):
        verb, *rest = words.split()
        rest = rest or (["--ckpt_path", "evil.ckpt"] if verb in ("test", "validate", "fit") else ["evil.ckpt"])
        assert "evil.ckpt names evil.Net" in refused(verb, *rest)
    with pytest.raises(UserError, match=r"names evil\.Net"):
        Classifier.load_from_checkpoint("evil.ckpt")
    shutil.copytree(packed, "bundle")
    config = json.loads(Path("bundle", bundle.CONFIG).read_text())
    config["config"]["model"]["network"] = evil
    Path("bundle", bundle.CONFIG).write_text(json.dumps(config))
    sums = Path("bundle", bundle.SUMS)
    old, new = (
        hashlib.sha256(folder.joinpath(bundle.CONFIG).read_bytes()).hexdigest() for folder in (packed, Path("bundle"))
    )
    sums.write_text(sums.read_text().replace(old, new))
    assert load("bundle").predict(["photos/red/000.png"])[0].label in ("blue", "green", "red")  # without the network
    assert "evil.Net" in refused("explain", "bundle", "photos")
    assert not Path("executed").exists()
    assert "evil" not in sys.modules


def test_all_names_that_need_trust_are_said_at_once():
    options = {"loss": {"class_path": "own.Loss"}, "metrics": [{"class_path": "own.Kappa"}, {"class_path": "own.Loss"}]}
    with pytest.raises(UserError, match=r"names own.Loss, own.Kappa; .* add --trust own.Loss --trust own.Kappa.$"):
        parts.require_trusted_options({"data": {}, "model": options, "trainer": {}}, set(), "config.yaml")
    with pytest.raises(UserError, match=r"add --trust own.Kappa.$"):
        parts.require_trusted_options({"data": {}, "model": options, "trainer": {}}, {"own.Loss"}, "config.yaml")


@pytest.mark.parametrize(
    ("kind", "prefix", "changes"),
    [
        (Classifier, "", {"hparams": {"network": EVIL_PART}}),
        (Classifier, "", {"module_arguments": {"network": EVIL_PART}}),
        (Classifier, "", {"hparams_name": "network"}),
        (Classifier, "", {"hparams_type": "evil.Net"}),
        (ImageData, "datamodule_", {"hparams": {"transforms": [EVIL_PART]}}),
        (ImageData, "datamodule_", {"datamodule_hparams_name": "transforms"}),
        (ImageData, "datamodule_", {"datamodule_hyper_parameters": {"transforms": [EVIL_PART]}}),
    ],
)
def test_lightnings_own_loading_takes_no_other_arguments_from_a_checkpoint(nets, kind, prefix, changes):
    arguments = {f"{prefix}hyper_parameters": {"class_names": ["a", "b"], "image_size": 64} if not prefix else {}}
    versions = {"pytorch-lightning_version": "2.6.0", "state_dict": {}}
    torch.save(versions | arguments | {f"{prefix}hparams_name": "kwargs"} | changes, "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt (does not have the form of|names evil\.Net)"):
        kind.load_from_checkpoint("a.ckpt")
    assert not Path("executed").exists()


def test_word_in_a_file_stands_for_no_class(nets):
    entry = {"class_path": "torch.export.unflatten.InterpreterModule", "init_args": {"graph": "Graph"}}
    with pytest.raises(UserError, match=r"give torch\.fx\.Graph in full"):
        parts.make(entry, "model.network")
    weights = {"class_path": "torch.nn.Sequential", "init_args": {"a": [{"init_args": {"pretrained": True, "b": 1}}]}}
    assert models._without_weights(weights)["init_args"] == {"a": [{"init_args": {"b": 1}}]}


def test_annotation_in_quotes_is_not_plain():
    class Own:
        def __init__(self, more: 'list["torch.nn.Module"] | None' = None, mode: Literal["a", "b"] = "a"):
            pass

    parts.require_trusted_arguments(Own, {"mode": "b.c"}, (), "a.ckpt")
    with pytest.raises(UserError, match=r"names evil\.Net"):
        parts.require_trusted_arguments(Own, {"more": [{"class_path": "evil.Net"}]}, (), "a.ckpt")
