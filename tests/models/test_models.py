import math
import sys

import numpy as np
import pytest
import torch
import torchvision

from project import cli, models
from project.data import images
from project.errors import UserError
from project.models.alexnet import AlexNet
from tests.conftest import SMALL


def test_alexnet_computes_what_torchvisions_does():
    torch.manual_seed(0)
    ours, theirs = AlexNet(7), torchvision.models.AlexNet(7)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 64, 64)
    label = torch.tensor([1, 5])
    logits = []
    for network in (ours, theirs):
        torch.manual_seed(1)  # the same dropout
        logits.append(network.train()(image))
        torch.nn.functional.cross_entropy(logits[-1], label).backward()
    assert torch.equal(*logits)
    for (name, mine), (other, its) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine.grad, its.grad), name


def test_alexnet_starts_with_every_class_about_equally_likely():
    torch.manual_seed(0)
    network = models.build("alexnet", 10).eval()
    image = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        hidden = network[1].avgpool(network[1].features(network[0](image)))
        loss = torch.nn.functional.cross_entropy(network(image), torch.arange(8))
    assert 0.1 < hidden.std() < 3  # the signal neither dies out nor explodes
    assert 0.7 < loss / math.log(10) < 1.5


HEADS = ["vgg11", "resnet18", "squeezenet1_1", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "swin_t"]
HEADS += [
    "efficientnet_lite0",
    "mobilenetv4_conv_small",
    "levit_128s",
    "caformer_s18",
    "deit_tiny_distilled_patch16_224",
]


@pytest.mark.parametrize("name", [name if name in HEADS[:7] else f"timm/{name}" for name in HEADS])
@pytest.mark.parametrize("classes", [pytest.param(2, marks=pytest.mark.full), 10])
def test_a_new_head_starts_with_every_class_about_equally_likely(photos, name, classes):
    files = sorted(photos.rglob("*.png"))[::6]
    image = torch.from_numpy(np.stack([images.read(file, 224) for file in files])).permute(0, 3, 1, 2)
    label = torch.arange(len(files)) % classes
    torch.manual_seed(0)
    network = models.build(name, classes).train()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(image), label).item()
    assert loss == pytest.approx(math.log(classes), rel=0.05)


def test_network_takes_uint8_and_normalises_it_itself_in_the_same_memory_format():
    network = models.build("squeezenet1_1", 3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.4, 0.2])
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).to(memory_format=torch.channels_last)
    expected = torchvision.transforms.functional.normalize(image / 255, [0.1, 0.2, 0.3], [0.5, 0.4, 0.2])
    assert torch.allclose(network[0](image), expected, atol=1e-6)
    assert network[0](image).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="Images of float32 are given; give uint8"):
        network[0](image.float())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5", "googlenet", "inception_v3"])
@pytest.mark.filterwarnings("ignore:.*initialization of.*:FutureWarning")
def test_torchvision_network_returns_logits_alone_in_training_and_its_batch_norm_learns_at_pytorchs_default(name):
    network = models.build(name, 5).train()
    assert network(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape == (2, 5)
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert {layer.momentum for layer in layers} == {0.1}


def test_a_size_that_does_not_work_is_refused_with_the_next_that_does():
    network = models.build("timm/vit_tiny_patch16_224", 2)
    models.require_size(network, "vit", 224, 2)
    assert network.training
    with pytest.raises(UserError, match=r"200, which vit does not take; .* that it takes is 224"):
        models.require_size(network, "vit", 200, 2)


def test_models_lists_networks_with_figures_as_published_and_refuses_unknown_names(capsys, refused, monkeypatch):
    assert cli.main(["models", "alexnet"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "parameters", "GFLOPs", "top-1", "top-5", "--model.weights"]
    assert line.split() == ["alexnet", "61,100,840", "0.71", "56.52", "79.07", "IMAGENET1K_V1"]
    assert cli.main(["models", "resnet5?"]) == 0
    assert capsys.readouterr().out.count("\nresnet50") == 2
    assert cli.main(["models"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name for name in listed if "." not in name} == set(models.torchvision_names())  # own ones have class paths
    assert cli.main(["models", "timm/resnet10*"]) == 0
    assert "timm/resnet10t  weights: DEFAULT" in capsys.readouterr().out
    assert "No network is called resnat18. Did you mean resnet18?" in refused("models", "resnat18")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install -e .[timm]" in refused("models", "timm/*")


COMPILED = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "1", "--model.compile", "true"]


@pytest.mark.full
def test_compiled_networks_checkpoint_is_like_any_other(photos, capsys):
    assert cli.main(COMPILED) == 0
    assert "--model.compile does not work" not in capsys.readouterr().out
    content = torch.load("runs/photos/version_0/checkpoints/best.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"network.{key}" for key in models.build("squeezenet1_1", 3).state_dict()}
    assert cli.main(["predict", "runs/photos/version_0", "photos/red"]) == 0


@pytest.mark.full
@pytest.mark.parametrize("code", ["int8_t", "const int8_t"])
def test_fit_continues_without_compiling_where_the_compiler_fails(photos, capsys, monkeypatch, tmp_path, code):
    """The compiler builds simple code and fails at this network's pooling, or at the gradient of that."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\nfor word in "$@"; do case "$word" in *.cpp) grep -q "{code}" "$word" && exit 1;; esac; done\n'
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        assert cli.main(COMPILED) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--model.compile")]
    assert line.startswith("--model.compile does not work here, continuing without: ")
    assert "C++ compile error" in line
