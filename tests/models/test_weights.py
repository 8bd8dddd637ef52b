"""Where a network's weights come from: published files, checkpoints, state dicts; and what is refused."""

import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.transforms import functional

from project import cli, models
from project.data.images import RESIZE, parse_resize
from project.errors import UserError
from project.models import weights
from tests.conftest import SMALL, put_in_cache
from tests.inference.test_checkpoint import Trap


def test_published_weights_compute_what_torchvisions_network_does(hub):
    theirs = put_in_cache(hub, "alexnet").eval()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    normalised = functional.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ours, note, _ = weights.start("alexnet", [str(n) for n in range(1000)], "IMAGENET1K_V1")
    assert note == "weights: alexnet IMAGENET1K_V1, head included"
    with torch.inference_mode():
        assert torch.allclose(ours.eval()(image), theirs(normalised), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "mnasnet0_5", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
)
@pytest.mark.filterwarnings("ignore:.*initialization of.*:FutureWarning")
def test_one_general_function_swaps_the_head_of_every_family(hub, name):
    """Weights under the old names of DenseNet, with GoogLeNet's side outputs, with a convolution as head."""
    theirs = torchvision.models.get_model(name).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): tensor for key, tensor in theirs.items()}
    torch.save(old, hub / torchvision.models.get_model_weights(name).DEFAULT.url.split("/")[-1])
    ours, note, _ = weights.start(name, ["a", "b"], "DEFAULT")
    state, head = ours[1].state_dict(), models.head(ours[1])[0]
    assert len(state) > 2
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in state.items() if not key.startswith(head))
    assert "; the head is new: the weights have 1000 classes, the data a, b" in note


def test_head_of_every_family_of_torchvision_is_its_last_layer():
    families = {torchvision.models.get_model_builder(name).__module__: name for name in models.torchvision_names()}
    del families["torchvision.models.regnet"]  # cannot be made without memory, and has the same `fc` as ResNets
    for name in families.values():
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("meta"):
            network = torchvision.models.get_model(name, num_classes=7, **options)
        head = models.head(network)[1]
        assert 7 in (getattr(head, "out_features", 0), getattr(head, "out_channels", 0)), name


def test_own_checkpoint_gives_everything_but_a_head_of_other_classes(at_trained):
    same, note, _ = weights.start("squeezenet1_1", ["blue", "green", "red"], str(at_trained))
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, content[f"network.{k}"]) for k, t in same.state_dict().items())
    assert "head included" in note
    _, note, _ = weights.start("squeezenet1_1", ["one", "two", "three"], str(at_trained))
    assert "the weights have blue, green, red, the data one, two, three" in note
    with pytest.raises(UserError, match=r"of squeezenet1_1, not of resnet18; give that by --model\.name or"):
        weights.start("resnet18", ["a", "b"], str(at_trained))


def test_state_dicts_of_others_are_read_and_unwrapped(workplace):
    state = torchvision.models.get_model("squeezenet1_1", num_classes=2).state_dict()
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, "wrapped.pth")
    torch.save({"model": {f"model.backbone.{key}": tensor for key, tensor in state.items()}}, "deeper.pth")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, "it.safetensors")
    for name in ("wrapped.pth", "deeper.pth", "old.pth", "it.safetensors"):
        ours, note, _ = weights.start("squeezenet1_1", ["a", "b"], name)
        assert all(torch.equal(tensor, state[key.removeprefix("1.")]) for key, tensor in ours.state_dict().items())
        assert "head included; it does not say how pixels are normalised, so as for the published weights" in note
        assert (ours[0].mean / 255).flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_bundles_weights_bring_their_classes_and_pixel_scale(packed, tmp_path):
    bundle = shutil.copytree(packed, tmp_path / "bundle")
    config, file = bundle / "config.json", str(bundle / "model.safetensors")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mean": [0.1, 0.2, 0.3]}))
    ours, note, _ = weights.start("squeezenet1_1", ["blue", "green", "red"], str(bundle))
    assert "head included" in note
    assert ours[0].mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
    _, note, _ = weights.start("squeezenet1_1", ["cat", "cow", "dog"], file)
    assert "the head is new: the weights have blue, green, red, the data cat, cow, dog" in note
    config.write_text('{"architectures": ["others"]}')
    _, note, _ = weights.start("squeezenet1_1", ["cat", "cow", "dog"], file)
    assert "head included" in note


@pytest.mark.parametrize(
    ("name", "choice", "resize"),
    [
        ("resnet18", "DEFAULT", "crop:bilinear:0.875"),
        ("resnet50", "IMAGENET1K_V1", "crop:bilinear:0.875"),
        ("resnet50", "DEFAULT", "crop:bilinear:0.9655"),
        ("swin_t", "DEFAULT", "crop:bicubic:0.9655"),
        ("efficientnet_v2_s", "DEFAULT", "crop:bilinear"),
        ("googlenet", "DEFAULT", "crop:bilinear:0.875"),
        ("timm/resnet18", "DEFAULT", "crop:bicubic:0.95"),
        ("timm/resnet18", "fb_swsl_ig1b_ft_in1k", "crop:bilinear:0.875"),
        ("timm/resnet18.fb_swsl_ig1b_ft_in1k", "DEFAULT", "crop:bilinear:0.875"),
        ("timm/efficientnet_lite0", "DEFAULT", "crop:bicubic:0.875"),
        ("timm/convnext_base", "fb_in22k_ft_in1k_384", "stretch:bicubic"),
    ],
)
def test_published_weights_say_without_a_connection_how_images_are_made_square(hub, name, choice, resize):
    assert weights.resize(name, choice) == resize
    parse_resize(resize)


def test_resize_of_every_torchvision_network_exists_and_of_all_but_a_few_of_timm():
    for name in models.torchvision_names():
        for entry in torchvision.models.get_model_weights(name):
            *_, share = parse_resize(weights.resize(name, entry.name))
            (crop,), (short,) = entry.transforms().crop_size, entry.transforms().resize_size
            assert round(crop / share) == short
    names = [f"timm/{name}" for name in timm.list_pretrained()]
    refused = [resize for name in names if not RESIZE.fullmatch(resize := weights.resize(name, "DEFAULT"))]
    assert len(refused) < len(names) / 100
    assert all(re.match(r"stretch:\w+:0\.9|crop:\w+:1\.15", resize) for resize in refused)


def test_resize_of_a_file_is_its_own_or_that_of_the_published_weights(at_trained, packed, tmp_path):
    torch.save(torchvision.models.get_model("resnet50").state_dict(), tmp_path / "it.pth")
    assert weights.resize("resnet50", str(tmp_path / "it.pth")) == "crop:bilinear:0.9655"
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"]["resize"] = "pad:nearest"
    torch.save(content, tmp_path / "own.ckpt")
    bundle = shutil.copytree(packed, tmp_path / "bundle")
    (bundle / "config.json").write_text((bundle / "config.json").read_text().replace('"stretch"', '"pad"'))
    for source, resize in ((at_trained, "stretch"), (tmp_path / "own.ckpt", "pad:nearest"), (bundle, "pad")):
        assert weights.resize("squeezenet1_1", str(source)) == resize


def test_unknown_resize_of_weights_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "it.pth")
    for name, choice in (
        ("resnet18", "none"),
        ("resnet18", "IMAGENET"),
        ("resnet81", "DEFAULT"),
        ("timm/resnet81", "DEFAULT"),
        ("timm/resnet18", "none"),
        ("fasterrcnn_resnet50_fpn", "DEFAULT"),
        ("timm/resnet81", str(tmp_path / "it.pth")),
    ):
        with pytest.raises(UserError, match=f"^--model.weights {choice} of {name} has no known resize; give others"):
            weights.resize(name, choice)
    with pytest.raises(UserError, match=r"There are no weights none\.pth"):
        weights.resize("resnet18", "none.pth")


def test_unusable_weights_are_refused_and_no_code_in_them_is_run(workplace, hub):
    for name in ("text.pth", "text.safetensors"):
        Path(name).write_text("no weights")
    torch.save([1, 2], "list.pth")
    torch.save(torchvision.models.get_model("squeezenet1_1").state_dict(), "other.pth")
    state = models.build("alexnet", 3)[1].state_dict()
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 7, 7)}, "shape.pth")
    Path("evil.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"state_dict": Trap()}, "evil.pt")
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"half of it")
    for name, choice, sentence in (
        ("alexnet", "IMAGENET", "of alexnet; --model.weights takes none, DEFAULT, IMAGENET1K_V1 or"),
        ("alexnet", "DEFAULT", f"no connection); without a connection, put alexnet-owt-7be5be79.pth into {hub}"),
        ("squeezenet1_1", "DEFAULT", "squeezenet1_1-b8a52dc0.pth is damaged; remove it"),
        ("alexnet", "none.pth", "There are no weights none.pth"),
        ("alexnet", "text.pth", "text.pth is damaged, is not a checkpoint, or holds code"),
        ("alexnet", "text.safetensors", "text.safetensors is damaged or not in the safetensors format"),
        ("alexnet", "list.pth", "holds no weights by name"),
        ("alexnet", "other.pth", "57 more. Give the network that the weights are of by --model.name"),
        ("alexnet", "shape.pth", "features.0.weight (64, 3, 7, 7) for (64, 3, 11, 11)"),
        ("alexnet", "evil.pth", "evil.pth is damaged, is not a checkpoint, or holds code"),
        ("alexnet", "evil.pt", "evil.pt is damaged, is not a checkpoint, or holds code"),
        ("timm/resnet81", "DEFAULT", "timm has no network resnet81"),
        ("resnet81", "DEFAULT", "no published weights of resnet81"),
        ("resnet81", "none", "There is no network resnet81. Did you mean"),
        ("nets.Tiny", "none", "There is no network nets.Tiny. For --model.name, give a class path by --model.network."),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            weights.start(name, ["a", "b", "c"], choice)
    assert not Path("executed").exists()


def test_fit_from_weights_starts_with_them_and_prints_that(lively, photos, capsys):
    fit = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "1", "--model.lr", "1e-12"]
    assert cli.main([*fit, "--model.weights", str(lively)]) == 0
    assert f"weights: {lively}/checkpoints/best.ckpt, head included" in capsys.readouterr().out
    start, end = (
        torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        for run in (lively, Path("runs/photos/version_0"))
    )
    assert all(torch.allclose(t, start["state_dict"][key], atol=1e-9) for key, t in end["state_dict"].items())
    assert end["metadata"]["metrics"]["val/accuracy"] == 1  # as these weights know the classes


def test_timms_networks_are_built_also_with_two_heads_and_without_a_connection_the_way_out_is_named(
    tmp_path, monkeypatch
):
    published = models.build("timm/deit_tiny_distilled_patch16_224", 1000)[1]
    torch.save(published.state_dict(), tmp_path / "it.pth")
    ours, note, _ = weights.start("timm/deit_tiny_distilled_patch16_224", ["a", "b"], str(tmp_path / "it.pth"))
    assert "the head is new: the weights have 1000 classes" in note
    assert torch.equal(ours[1].patch_embed.proj.weight, published.patch_embed.proj.weight)
    with torch.inference_mode():
        assert ours.eval()(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Cannot get the weights of resnet10t.*model.safetensors"):
        weights.start("timm/resnet10t", ["a", "b"], "DEFAULT")


class Slow(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, a second after each request."""

    requests: ClassVar[list[str]] = []

    def do_GET(self):
        self.requests.append(self.path)
        time.sleep(1)
        super().do_GET()


@pytest.mark.full
def test_of_the_processes_of_a_machine_one_downloads(tmp_path, monkeypatch):
    content = io.BytesIO()
    torch.save(torchvision.models.squeezenet1_1().state_dict(), content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    name = f"squeezenet1_1-{digest[:8]}.pth"
    (tmp_path / name).write_bytes(content.getvalue())
    monkeypatch.setattr(Slow, "requests", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever).start()
        code = f"""
from torchvision.models import SqueezeNet1_1_Weights as Published
Published.DEFAULT.value.url = "http://127.0.0.1:{server.server_port}/{name}"
from project.models import weights
assert weights.published("squeezenet1_1", "DEFAULT").tensors
"""
        environment = os.environ | {"TORCH_HOME": str(tmp_path / "home")}
        ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
        try:
            assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
        finally:
            server.shutdown()
    assert Slow.requests == [f"/{name}"]
