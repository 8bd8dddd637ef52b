"""Maps of evidence: where they lie, what they sum to, which networks they suit, and the folder that is written."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from project import cli, load, models
from project.errors import UserError
from project.evaluation import attribution, figures
from project.inference.checkpoint import TorchPredictor
from project.inference.metadata import Metadata
from project.models.normalize import Normalize
from tests.conftest import COLOURS, full_disk

METHODS = ("gradcam", "ig", "occlusion")
SIDE, PATCH = 48, 12
IMAGE = "photos/red/000.png"


def predictor_of(network, classes=2, size=SIDE):
    half = [0.5, 0.5, 0.5]
    metadata = Metadata("made", [str(n) for n in range(classes)], size, "stretch", half, half, {})
    return TorchPredictor(network.eval(), metadata)


def noise(count, size=SIDE, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def patches(count, seed):
    """Noise with a red (class 0) or blue (class 1) square anywhere in it: images, labels, (N, H, W) bool masks."""
    random = np.random.default_rng(seed)
    images = random.integers(60, 196, (count, 3, SIDE, SIDE)).astype(np.uint8)
    labels = np.arange(count) % 2
    masks = np.zeros((count, SIDE, SIDE), dtype=bool)
    for number, label in enumerate(labels):
        top, left = random.integers(0, SIDE - PATCH, 2)
        square = np.s_[top : top + PATCH, left : left + PATCH]
        masks[number][square] = True
        images[number][(slice(None), *square)] = np.array([(220, 30, 30), (30, 30, 220)][label])[:, None, None]
    return torch.from_numpy(images), torch.from_numpy(labels), masks


def small_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.Conv2d(12, 16, 3, padding=1)]
    layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(Normalize(), nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 2)))


@pytest.fixture(scope="module")
def sees_patches():
    """A small network that tells red squares from blue ones, wherever they are."""
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(60):
        images, labels, _ = patches(32, step)
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    images, labels, _ = patches(64, 1000)
    assert (network(images).argmax(1) == labels).float().mean() > 0.95
    network.zero_grad()
    return network


@pytest.mark.parametrize("method", METHODS)
def test_most_of_the_evidence_lies_on_the_only_thing_that_tells_the_classes_apart(sees_patches, method):
    images, labels, masks = patches(16, 2000)
    heats = attribution.heat_maps(predictor_of(sees_patches), images, labels.tolist(), method)
    assert heats.dtype == np.float32
    assert heats.shape == masks.shape
    assert heats.min() == 0
    assert (heats.max(axis=(1, 2)) == 1).all()
    # what covers or blurs a pixel reaches a little further than it: a margin of a ninth of the side
    near = interpolate(torch.from_numpy(masks)[:, None].float(), SIDE)
    near = torch.nn.functional.max_pool2d(near, 11, 1, 5)[:, 0].numpy() > 0
    share = (heats * near).sum(axis=(1, 2)) / heats.sum(axis=(1, 2))
    assert np.median(share) > 0.6
    assert np.median(share / near.mean(axis=(1, 2))) > 3  # times what a map without any idea has there
    peaks = heats.reshape(len(heats), -1).argmax(axis=1)
    assert np.mean([near.ravel()[peak] for near, peak in zip(near, peaks, strict=True)]) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_map(sees_patches, method):
    """The sanity check of Adebayo et al. 2018 (arXiv:1810.03292): a map that ignores the weights explains nothing."""
    images, labels, _ = patches(16, 3000)
    torch.manual_seed(5)
    random = copy.deepcopy(sees_patches)
    for module in random.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    trained = attribution.attributions(sees_patches, images, labels.tolist(), method)
    other = attribution.attributions(random, images, labels.tolist(), method)
    assert abs(rank_correlation(trained, other)) < 0.4
    assert rank_correlation(trained, trained) == pytest.approx(1)


def rank_correlation(one, other):
    """Spearman's, of each pair of maps; their mean."""
    ranks = [maps.flatten(1).argsort(1).argsort(1).double() for maps in (one, other)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def test_gradcam_is_what_the_article_defines():
    torch.manual_seed(1)
    maps, head = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True)), nn.Linear(4 * 7 * 7, 3)
    network = nn.Sequential(Normalize(), nn.Sequential(maps, nn.Flatten(), nn.Linear(4 * 7 * 7, 8), nn.ReLU(), head))
    network[1][4] = nn.Linear(8, 3)
    images, targets = noise(2, 16), [2, 0]
    activation = maps(network[0](images)).detach().requires_grad_()  # (2, 4, 7, 7)
    logits = network[1][1:](activation)
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], activation)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1)
    expected = interpolate(cam[:, None], 16, mode="bilinear")[:, 0]
    assert torch.allclose(attribution.attributions(network, images, targets, "gradcam"), expected, atol=1e-7)
    positive = expected.clamp(min=0)
    scaled = positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    assert np.allclose(attribution.heat_maps(predictor_of(network, 3, 16), images, targets), scaled.detach(), atol=1e-5)


def test_integrated_gradients_sum_to_the_difference_of_the_logits(sees_patches):
    """Completeness, within 2 % of the difference: the integral is a sum of 32 terms."""
    images, labels, _ = patches(10, 4000)
    total = attribution.attributions(sees_patches, images, labels.tolist(), "ig").sum(dim=(1, 2))
    with torch.no_grad():
        pixels = sees_patches[0](images)
        rise = (sees_patches[1](pixels) - sees_patches[1](torch.zeros_like(pixels)))[torch.arange(10), labels]
    assert (rise.abs() > 0.5).all()
    assert torch.allclose(total, rise, rtol=0.02)


def test_occlusion_is_the_mean_fall_of_the_logit_over_the_squares_that_cover_a_pixel():
    torch.manual_seed(2)
    network = nn.Sequential(Normalize(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)))
    images = noise(1, 28)
    pixels = network[0](images)
    network.requires_grad_(False)
    falls, counts = torch.zeros(28, 28), torch.zeros(28, 28)
    for top in range(0, 25, 2):
        for left in range(0, 25, 2):
            covered = pixels.clone()
            covered[:, :, top : top + 4, left : left + 4] = 0
            falls[top : top + 4, left : left + 4] += float((network[1](pixels) - network[1](covered))[0, 1])
            counts[top : top + 4, left : left + 4] += 1
    assert torch.allclose(attribution.attributions(network, images, [1], "occlusion")[0], falls / counts, atol=1e-5)


NETWORKS = ["alexnet", "resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121", "swin_t"]
NETWORKS += ["timm/resnet10t", "timm/convnext_atto"]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradcam_suits_networks_with_maps_to_the_end(name):
    torch.manual_seed(0)
    network = models.build(name, 3).eval()
    images = noise(2, 64)
    layer = attribution.last_maps(network[1], network[0](images[:1]))
    shapes = []
    handle = layer.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    network(images)
    handle.remove()
    assert [shape[2:] for shape in shapes] == [(3, 3) if name == "alexnet" else (2, 2)]
    evidence = attribution.attributions(network, images, [0, 2], "gradcam")
    assert evidence.isfinite().all()
    assert (evidence[0] != evidence[1]).any()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("alexnet", "features.11"), ("vgg11", "features.19"), ("resnet18", "layer4"), ("squeezenet1_1", "classifier.2")],
)
def test_gradcam_takes_the_last_maps_before_the_final_pooling(name, layer):
    network = models.build(name, 2).eval()[1]
    assert attribution.last_maps(network, torch.zeros(1, 3, 112, 112)) is network.get_submodule(layer)


def test_gradcam_passes_over_a_layer_that_runs_more_than_once():
    relu, last = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, last, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert attribution.last_maps(network, torch.zeros(1, 3, 16, 16)) is last


@pytest.mark.parametrize("name", ["vit_b_16", "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"])
def test_transformers_are_explained_without_gradcam(name):
    torch.manual_seed(0)
    network = models.build(name, 2).eval()
    size = 224 if name != "vit_b_16" else 32
    if name == "vit_b_16":
        from torchvision.models import VisionTransformer

        network[1] = VisionTransformer(size, 8, 2, 2, 16, 32, num_classes=2).eval()
        nn.init.normal_(network[1].heads.head.weight)  # it starts at 0
    with pytest.raises(UserError, match="give --method ig or occlusion"):
        attribution.heat_maps(predictor_of(network, size=size), noise(1, size), [1], "gradcam")
    if size == 32:
        for method in ("ig", "occlusion"):
            assert attribution.heat_maps(predictor_of(network, size=size), noise(2, size), [1, 0], method).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small"])
def test_the_network_is_the_same_after_it_was_explained(name, method):
    torch.manual_seed(0)
    network = models.build(name, 2).eval()
    images = noise(1, 64)
    before, logits = copy.deepcopy(network.state_dict()), network(images).detach()
    in_place = [module for module in network.modules() if getattr(module, "inplace", False)]
    attribution.heat_maps(predictor_of(network), images, [1], method)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(network(images), logits)
    assert len(in_place) > 5
    assert all(module.inplace for module in in_place)
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_network_sees_few_images_at_once_however_many_there_are(sees_patches, method):
    sizes, layers = [], (sees_patches[1], sees_patches[1][0])
    handles = [layer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))) for layer in layers]
    images, labels, _ = patches(70, 6000)
    with torch.inference_mode():  # as whoever predicts may have it
        many = attribution.heat_maps(predictor_of(sees_patches), images, labels.tolist(), method)
    for handle in handles:
        handle.remove()
    assert max(sizes) == attribution.AT_A_TIME
    few = attribution.heat_maps(predictor_of(sees_patches), images[65:], labels[65:].tolist(), method)
    assert np.allclose(many[65:], few, atol=1e-4)


def test_where_nothing_speaks_for_a_class_the_map_is_zero():
    network = nn.Sequential(Normalize(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    nn.init.zeros_(network[1][0].weight)
    nn.init.zeros_(network[1][0].bias)
    for method in METHODS:
        assert not attribution.heat_maps(predictor_of(network, size=16), noise(2, 16), [0, 1], method).any()
    assert attribution.heat_maps(predictor_of(network, size=16), noise(0, 16), []).shape == (0, 16, 16)


@pytest.fixture
def explained(at_trained, tmp_path):
    """Runs the verb with the trained run, or with another source; returns the names of the files that it writes."""

    def run(*words, source=at_trained):
        assert cli.main(["explain", str(source), *map(str, words), "--out", str(tmp_path / "why")]) == 0
        return sorted(os.listdir(tmp_path / "why"))

    return run


def test_folder_holds_one_image_each_a_contact_sheet_and_the_filters(explained, tmp_path, capsys):
    names = explained(IMAGE, "photos/blue/000.png", "--method", "ig")
    assert names == ["1-000.png", "2-000.png", "contact-sheet.png", "filters.png"]
    assert f"2 images explained by ig, 0 unreadable: {tmp_path / 'why'}" in capsys.readouterr().out
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "why" / name).convert("RGB"))
        assert pixels.shape[1] > 500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_after_24_images_a_second_contact_sheet_follows(explained):
    names = explained("photos/red/0[012]*.png")
    assert {"01-000.png", "30-029.png", "contact-sheet.png", "contact-sheet-2.png", "filters.png"} <= set(names)
    assert len(names) == 33


def test_unreadable_images_are_listed_and_left_out(explained, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    shutil.copy(IMAGE, tmp_path / "a $red$ one\n大.png")
    assert explained(tmp_path) == ["1-a_red_one_大.png", "contact-sheet.png", "filters.png"]
    assert f"left out, unreadable: {tmp_path}/bad.jpg: not an image" in capsys.readouterr().out


def test_target_is_explained_instead_of_the_predicted_class(explained, at_trained, monkeypatch):
    captions, draw = [], figures.explanations
    monkeypatch.setattr(figures, "explanations", lambda *given: captions.extend(given[3]) or draw(*given))
    (prediction,) = load(at_trained).predict([IMAGE])
    other = next(name for name in COLOURS if name != prediction.label)
    explained(IMAGE, "--target", other)
    share = prediction.probabilities[sorted(COLOURS).index(other)]
    assert captions[0].startswith(f"{other}\n{share:.1%}, predicted: {prediction.label}")


def test_mistakes_are_told_in_a_sentence_and_leave_nothing_behind(at_trained, tmp_path, refused, monkeypatch):
    run, images, out = str(at_trained), str(Path(IMAGE).resolve()), ["--out", "why"]
    monkeypatch.chdir(tmp_path)
    for name in ("bad.jpg", "foreign.ckpt"):
        Path(name).write_bytes(b"<html>")
    for words, message in (
        ([run, images, *out, "--method", "magic"], "--method is magic; it takes gradcam or ig or occlusion"),
        ([run, images, *out, "--target", "gren"], "Did you mean green? The classes are blue, green, red."),
        (["none.ckpt", images, *out], "no checkpoint none.ckpt"),
        (["foreign.ckpt", images, *out], "no checkpoint"),
        ([run, "nowhere", *out], "no file or folder nowhere"),
        ([run, "bad.jpg", *out], "None of the 1 images can be read"),
        ([run, images, "--out", "no/why"], "no folder"),
        ([run, images, "--out", "bad.jpg/why"], "Not a directory"),
        ([run, images, "--out", "bad.jpg"], "bad.jpg exists"),
    ):
        assert message in refused("explain", *words)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert "pip install -e .[explain]" in refused("explain", run, images, *out)
    monkeypatch.undo()
    full_disk(monkeypatch)
    assert "No space left on device" in refused("explain", run, images, "--out", str(tmp_path / "why"))
    assert sorted(os.listdir(tmp_path)) == ["bad.jpg", "foreign.ckpt"]


def test_bundle_is_explained_by_its_weights(explained, packed, tmp_path, refused):
    bundle = shutil.copytree(packed, tmp_path / "bundle")
    assert "1-000.png" in explained(IMAGE, source=bundle)
    (bundle / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused("explain", str(bundle), IMAGE, "--out", str(tmp_path / "more"))


def test_non_latin_and_long_class_names_are_drawn(explained, at_trained, tmp_path):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    names = ["猫", "собака", "a very long name, which goes on and on, and then a bit further"]
    content["metadata"]["class_names"] = names
    torch.save(content, tmp_path / "named.ckpt")
    images = [f"photos/{name}/000.png" for name in COLOURS]
    assert len(explained(*images, "--target", "猫", source=tmp_path / "named.ckpt")) == 5


def test_importing_the_verb_imports_nothing_heavy():
    code = "import sys, project.commands.explain; sys.exit(bool({'torch', 'matplotlib', 'captum'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_overlay_is_grey_where_there_is_no_heat_and_coloured_where_there_is():
    image = noise(1, 16)[0].permute(1, 2, 0).numpy()
    heat = np.zeros((16, 16), dtype=np.float32)
    heat[:, 8:] = 1
    pixels = figures.overlay(image, heat)
    assert pixels.dtype == np.uint8
    assert pixels.shape == image.shape
    assert np.ptp(pixels[:, :8], axis=2).max() == 0
    assert np.ptp(pixels[:, 8:], axis=2).min() > 50
    grey = np.asarray(Image.fromarray(image[:, :8]).convert("L"))
    assert np.corrcoef(pixels[:, :8, 0].ravel(), grey.ravel())[0, 1] > 0.99


def test_filters_are_drawn_in_colour_where_they_have_three_channels_else_in_grey():
    random = np.random.default_rng(0)
    for channels, coloured in ((3, True), (1, False), (5, False)):
        figure = figures.filter_grid(random.normal(size=(300, channels, 5, 4)))
        (axes,) = figure.axes
        canvas = axes.images[0].get_array()
        assert (np.ptp(canvas, axis=2).max() > 0.1) == coloured
        assert canvas.min() == 0 or canvas.max() == 1
        assert axes.get_title() == "first layer: the first 256 of 300 filters, 5x4"
    assert np.all(figures.filter_grid(np.zeros((1, 3, 2, 2))).axes[0].images[0].get_array() == 0.5)


def test_captions_of_several_lines_stay_on_the_image():
    texts = ["name " * 60 + "\n12.3%, predicted: " + "other " * 60]
    for columns, side in ((1, 3.0), (3, 1.5)):
        given = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8)), texts, texts
        figure = figures.explanations(*given, columns, side)
        figure.draw_without_rendering()
        for axes in figure.axes[:2]:
            box = axes.title.get_window_extent()
            assert box.y1 <= figure.bbox.height
            assert box.width < side * figure.dpi * 1.05
