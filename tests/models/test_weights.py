"""Where a network's weights come from: published files, checkpoints, state dicts; and what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from project import cli, models
from project.errors import UserError
from project.models import weights
from tests.conftest import SMALL, put_in_cache

FIT = ["fit", "--data.root", "photos"]
RUN = Path("runs/photos/version_0")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def normalised(image):
    return torchvision.transforms.functional.normalize(image / 255, *IMAGENET)


def test_published_weights_compute_what_torchvisions_network_does_up_to_a_new_head(hub):
    theirs = put_in_cache(hub, "alexnet").eval()
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    same, note = weights.start("alexnet", [str(n) for n in range(1000)], "IMAGENET1K_V1")
    assert note == "weights: alexnet IMAGENET1K_V1, head included"
    ours, note = weights.start("alexnet", ["cat", "dog", "owl"], "DEFAULT")
    assert "alexnet IMAGENET1K_V1" in note
    assert "1000 classes, the data cat, dog, owl" in note
    with torch.inference_mode():
        assert torch.allclose(same.eval()(image), theirs(normalised(image)), atol=1e-5)
        ours.eval()[1].classifier[6] = theirs.classifier[6] = nn.Identity()
        assert torch.allclose(ours(image), theirs(normalised(image)), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "mnasnet0_5", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
)
@pytest.mark.filterwarnings("ignore:.*initialization of.*:FutureWarning")
def test_one_general_function_swaps_the_head_of_every_family(hub, name):
    """Weights under the old names of DenseNet, with GoogLeNet's side outputs, with a convolution as head."""
    network = torchvision.models.get_model(name)
    state = network.state_dict()
    if name == "densenet121":
        for part in ("norm", "conv"):
            for number in "12":
                state = {k.replace(f".{part}{number}.", f".{part}.{number}."): t for k, t in state.items()}
        state = {k if "denselayer" in k else k.replace("norm.1", "norm1"): t for k, t in state.items()}
    entry = torchvision.models.get_model_weights(name).DEFAULT
    torch.save(state, hub / entry.url.split("/")[-1])
    ours, note = weights.start(name, ["a", "b"], "DEFAULT")
    head = models.head(ours)[0]
    mine = {k.removeprefix("1."): t for k, t in ours.state_dict().items() if not k.startswith(head)}
    theirs = network.state_dict()
    assert mine
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert "the head is new" in note


def test_head_of_every_torchvision_network_is_its_last_layer():
    for name in models.torchvision_names():
        if "regnet" in name:  # cannot be made without memory, and has the same `fc` as ResNets
            continue
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("meta"):
            network = torchvision.models.get_model(name, num_classes=7, **options)
        head = models.head(network)[1]
        assert 7 in (getattr(head, "out_features", 0), getattr(head, "out_channels", 0)), name


def test_own_checkpoint_gives_everything_but_a_head_of_other_classes(at_trained):
    same, note = weights.start("squeezenet1_1", ["blue", "green", "red"], str(at_trained))
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, content[f"network.{k}"]) for k, t in same.state_dict().items())
    assert "head included" in note
    _, note = weights.start("squeezenet1_1", ["one", "two", "three"], str(at_trained))
    assert "the weights have blue, green, red, the data one, two, three" in note


@pytest.mark.parametrize("wrapper", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_state_dicts_of_others_are_unwrapped(tmp_path, wrapper, prefix):
    network = torchvision.models.get_model("squeezenet1_1", num_classes=2)
    torch.save(wrapper({prefix + k: t for k, t in network.state_dict().items()}), tmp_path / "it.pth")
    ours, note = weights.start("squeezenet1_1", ["a", "b"], str(tmp_path / "it.pth"))
    assert all(torch.equal(t, network.state_dict()[k.removeprefix("1.")]) for k, t in ours.state_dict().items())
    assert "head included" in note


def test_safetensors_and_files_of_torchs_old_format_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    network = torchvision.models.get_model("squeezenet1_1", num_classes=2)
    save_file(network.state_dict(), tmp_path / "it.safetensors")
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("it.safetensors", "old.pth"):
        ours, _ = weights.start("squeezenet1_1", ["a", "b"], str(tmp_path / name))
        assert torch.equal(ours[1].features[0].weight, network.features[0].weight)
    (tmp_path / "it.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="damaged"):
        weights.start("squeezenet1_1", ["a", "b"], str(tmp_path / "it.safetensors"))


def test_bundles_weights_bring_their_classes_and_pixel_scale(packed, tmp_path):
    made = shutil.copytree(packed, tmp_path / "bundle")
    config = json.loads((made / "config.json").read_text()) | {"mean": [0.1, 0.2, 0.3]}
    (made / "config.json").write_text(json.dumps(config))
    for given in (made, made / "model.safetensors"):
        ours, note = weights.start("squeezenet1_1", ["blue", "green", "red"], str(given))
        assert "head included" in note
        assert ours[0].mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
        _, note = weights.start("squeezenet1_1", ["cat", "cow", "dog"], str(given))
        assert "the head is new: the weights have blue, green, red, the data cat, cow, dog" in note
    (made / "config.json").write_text('{"architectures": ["others"]}')
    _, note = weights.start("squeezenet1_1", ["cat", "cow", "dog"], str(made / "model.safetensors"))
    assert "head included" in note


def test_failed_download_names_the_file_and_its_folder(hub, photos, refused):
    error = refused(*FIT, "--model.weights", "DEFAULT")
    assert f"no connection); without a connection, put alexnet-owt-7be5be79.pth into {hub}" in error
    (hub / "alexnet-owt-7be5be79.pth").write_bytes(b"half of it")
    assert "7be5be79.pth is damaged; remove it" in refused(*FIT, "--model.weights", "DEFAULT")


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_weights_that_hold_code_are_refused_and_not_run(photos, refused):
    Path("evil.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"state_dict": Trap()}, "evil.pt")
    assert "evil.pth is damaged or no checkpoint" in refused(*FIT, "--model.weights", "evil.pth")
    assert "evil.pt is no checkpoint, or holds code" in refused(*FIT, "--model.weights", "evil.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.weights", "IMAGENET"], "of alexnet; --model.weights takes none, DEFAULT, IMAGENET1K_V1 or"),
        (["--model.weights", "none.pth"], "There are no weights none.pth"),
        (["--model.weights", "text.pth"], "text.pth"),
        (["--model.weights", "list.pth"], "holds no weights by name"),
        (["--model.weights", "other.pth"], "does not fit alexnet: it lacks"),
        (["--model.weights", "shape.pth"], "features.0.weight (64, 3, 7, 7) for (64, 3, 11, 11)"),
        (["--model.optimizer", "lamb"], "--model.optimizer is lamb; it takes adam or adamw or sgd"),
        (["--model.freeze", "all"], "it takes none or backbone or gradual"),
        (["--model.name", "timm/resnet81"], "timm"),
        (["--model.weight_decay", "-1"], "--model.weight_decay is -1; it must be at least 0"),
        (["--model.label_smoothing", "1"], "at least 0 and below 1"),
        (["--average", "1"], "--average is 1"),
        (["--patience", "3", "--trainer.limit_val_batches", "0"], "--patience needs validations"),
        (["--patience", "0"], "--patience is 0"),
    ],
)
def test_unusable_option_is_refused_in_one_sentence(photos, refused, options, expected):
    Path("text.pth").write_text("no weights")
    torch.save([1, 2], "list.pth")
    torch.save(torchvision.models.get_model("squeezenet1_1").state_dict(), "other.pth")
    state = models.build("alexnet", 3)[1].state_dict()
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 7, 7)}, "shape.pth")
    assert expected in refused("fit", "--data.root", "photos", *options)


def test_weights_of_another_network_name_both(at_trained, refused):
    error = refused(*FIT, "--model.name", "resnet18", "--model.weights", str(at_trained))
    assert "holds the weights of squeezenet1_1, not of resnet18; give --model.name squeezenet1_1" in error


def test_fit_from_weights_starts_with_them_and_prints_that(lively, photos, capsys):
    fit = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "1", "--model.lr", "1e-12"]
    assert cli.main([*fit, "--model.weights", str(lively)]) == 0
    assert f"weights: {lively}/checkpoints/best.ckpt, head included" in capsys.readouterr().out
    start, end = (torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (lively, RUN))
    assert all(torch.allclose(t, start["state_dict"][key], atol=1e-9) for key, t in end["state_dict"].items())
    assert end["metadata"]["metrics"]["val/accuracy"] == 1  # as these weights know the classes


def test_networks_with_two_heads_get_both_new(tmp_path):
    pytest.importorskip("timm")
    published = models.build("timm/deit_tiny_distilled_patch16_224", 1000)[1]
    torch.save(published.state_dict(), tmp_path / "it.pth")
    ours, note = weights.start("timm/deit_tiny_distilled_patch16_224", ["a", "b"], str(tmp_path / "it.pth"))
    assert "the head is new" in note
    assert torch.equal(ours[1].patch_embed.proj.weight, published.patch_embed.proj.weight)


def test_timm_networks_are_built_and_without_a_connection_the_way_out_is_named(monkeypatch):
    pytest.importorskip("timm")
    network = models.build("timm/resnet10t", 3).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 3)
    with pytest.raises(UserError, match="timm has no network resnet10x"):
        models.build("timm/resnet10x", 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Cannot get the weights of resnet10t.*model.safetensors"):
        weights.start("timm/resnet10t", ["a", "b"], "DEFAULT")
