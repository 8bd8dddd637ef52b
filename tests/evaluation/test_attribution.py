"""Maps of evidence: where they lie, what they sum to, and which networks they suit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, max_pool2d
from torchvision.models import VisionTransformer

from project import models
from project.errors import UserError
from project.evaluation import attribution
from project.inference.checkpoint import TorchPredictor
from project.inference.metadata import Metadata
from project.models.normalize import Normalize

METHODS = ("gradcam", "ig", "occlusion")
SIDE, PATCH = 48, 12
all_methods = pytest.mark.parametrize("method", METHODS)


def heat_maps(network, images, targets, method="gradcam"):
    metadata = Metadata("x", ["a", "b", "c"], images.shape[-1], "stretch", [0.5] * 3, [0.5] * 3, {})
    pixels = images.permute(0, 2, 3, 1).numpy()
    return attribution.heat_maps(TorchPredictor(network.eval(), metadata), pixels, targets, method)[0]


def noise(count, size=SIDE):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


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
    return torch.from_numpy(images), labels.tolist(), torch.from_numpy(masks)


@pytest.fixture
def sees_patches():
    """A network whose logits are the redness of the reddest square and the blueness of the bluest."""
    squares = nn.Conv2d(3, 2, PATCH - 1, stride=2, padding=PATCH // 2 - 1, bias=False)
    with torch.no_grad():
        squares.weight[:] = torch.tensor([[1.0, 0, -1], [-1, 0, 1]])[:, :, None, None] / (PATCH - 1) ** 2
    layers = nn.Sequential(squares, nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return nn.Sequential(Normalize(), layers).eval()


@all_methods
def test_most_of_the_evidence_lies_on_the_only_thing_that_tells_the_classes_apart(sees_patches, method):
    images, labels, masks = patches(16, 2000)
    heats = heat_maps(sees_patches, images, labels, method)
    assert (heats.dtype, heats.shape, heats.min()) == (np.float32, masks.shape, 0)
    assert (heats.max(axis=(1, 2)) == 1).all()
    # what covers or blurs a pixel reaches a little further than it: a margin of a ninth of the side
    near = max_pool2d(masks[:, None].float(), 11, 1, 5)[:, 0].numpy() > 0
    share = (heats * near).sum(axis=(1, 2)) / heats.sum(axis=(1, 2))
    assert np.median(share) > 0.6
    assert np.median(share / near.mean(axis=(1, 2))) > 3  # times what a map without any idea has there
    assert (near & (heats == 1)).any(axis=(1, 2)).mean() > 0.9  # the peaks


def test_gradcam_is_what_the_article_defines():
    torch.manual_seed(1)
    maps = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 7 * 7, 8), nn.ReLU(), nn.Linear(8, 3))
    network, images, targets = nn.Sequential(Normalize(), nn.Sequential(maps, *head)), noise(2, 16), [2, 0]
    activation = maps(network[0](images)).detach().requires_grad_()  # (2, 4, 7, 7)
    logits = head(activation)
    (gradient,) = torch.autograd.grad(logits[0, 2] + logits[1, 0], activation)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1)
    expected = interpolate(cam[:, None], 16, mode="bilinear")[:, 0].detach()
    evidence, cells = attribution.attributions(network, images, targets, "gradcam")
    assert torch.allclose(evidence, expected, atol=1e-7)
    assert cells == 7
    positive = expected.clamp(min=0)
    scaled = positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    assert np.allclose(heat_maps(network, images, targets), scaled, atol=1e-5)


def test_integrated_gradients_sum_to_the_difference_of_the_logits():
    torch.manual_seed(3)
    network = nn.Sequential(Normalize(), nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.Tanh(), nn.Linear(32, 2)))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)  # far from linear
    images, labels = noise(10, 16), [0, 1] * 5
    total = attribution.attributions(network, images, labels, "ig")[0].sum(dim=(1, 2))
    with torch.no_grad():
        pixels = network[0](images)
        rise = (network[1](pixels) - network[1](torch.zeros_like(pixels)))[torch.arange(10), labels]
    assert torch.allclose(total, rise, atol=1e-4)


def test_occlusion_is_the_mean_fall_of_the_logit_over_the_squares_that_cover_a_pixel():
    torch.manual_seed(2)
    network = nn.Sequential(Normalize(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2))).requires_grad_(False)
    images = noise(1, 28)
    pixels = network[0](images)
    falls, counts = torch.zeros(28, 28), torch.zeros(28, 28)
    for top in range(0, 25, 2):
        for left in range(0, 25, 2):
            covered = pixels.clone()
            covered[:, :, top : top + 4, left : left + 4] = 0
            falls[top : top + 4, left : left + 4] += float((network[1](pixels) - network[1](covered))[0, 1])
            counts[top : top + 4, left : left + 4] += 1
    (evidence,), _ = attribution.attributions(network, images, [1], "occlusion")
    assert torch.allclose(evidence, falls / counts, atol=1e-5)


LAST_MAPS = {"alexnet": "features.11", "squeezenet1_1": "classifier.2", "swin_t": "permute", "resnet18": "layer4"}
LAST_MAPS |= dict.fromkeys(("mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121"), "features")
LAST_MAPS |= {"timm/resnet10t": "layer4", "timm/convnext_atto": "norm_pre"}


@pytest.mark.parametrize(("name", "layer"), LAST_MAPS.items())
def test_gradcam_takes_the_last_maps_before_the_final_pooling(name, layer):
    torch.manual_seed(0)
    network, images = models.build(name, 3).eval(), noise(2, 64)
    assert attribution.last_maps(network[1], network[0](images)) is network[1].get_submodule(layer)
    evidence, _ = attribution.attributions(network, images, [0, 2], "gradcam")
    assert evidence.isfinite().all()
    assert (evidence[0] != evidence[1]).any()


def test_gradcam_takes_no_layer_that_runs_more_than_once():
    relu, last = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, last, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert attribution.last_maps(network, torch.zeros(1, 3, 16, 16)) is last


def test_transformers_are_explained_without_gradcam():
    vit, swin = (models.build(f"timm/{name}", 2) for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"))
    small = nn.Sequential(Normalize(), VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2))
    nn.init.normal_(small[1].heads.head.weight)  # it starts at 0
    for network, size in ((vit, 224), (swin, 224), (small, 32)):
        with pytest.raises(UserError, match="give --method ig or occlusion"):
            heat_maps(network, noise(1, size), [1])
    for method in ("ig", "occlusion"):
        assert heat_maps(small, noise(1, 32), [1], method).any()


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_the_network_is_the_same_after_it_was_explained(name):
    torch.manual_seed(0)
    network, images = models.build(name, 2).eval(), noise(1, 64)
    before, logits = copy.deepcopy(network.state_dict()), network(images).detach()
    in_place = [module for module in network.modules() if getattr(module, "inplace", False)]
    for method in METHODS:
        heat_maps(network, images, [1], method)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(network(images), logits)
    assert len(in_place) > 5
    assert all(module.inplace for module in in_place)
    for module in network.modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
        assert not any((*hooks, module.training))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@all_methods
def test_a_network_sees_few_images_at_once_however_many_there_are(sees_patches, method):
    sizes, layers = [], (sees_patches[1], sees_patches[1][0])
    handles = [layer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))) for layer in layers]
    images, labels, _ = patches(40, 6000)
    with torch.inference_mode():  # as whoever predicts may have it
        many = heat_maps(sees_patches, images, labels, method)
    for handle in handles:
        handle.remove()
    assert max(sizes) == attribution.AT_A_TIME
    assert np.allclose(many[35:], heat_maps(sees_patches, images[35:], labels[35:], method), atol=1e-4)


@all_methods
def test_where_nothing_speaks_for_a_class_the_map_is_zero(method):
    network = nn.Sequential(Normalize(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert not heat_maps(network, noise(2, 16), [0, 1], method).any()
