"""Names become networks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from project.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def build(
    name: str, num_classes: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> "nn.Sequential":
    """Makes a plain nn.Module, Normalize ► network: (B, 3, H, W) uint8 in, logits (B, K) float out.

    An own network is one file in this folder and one line here.

    Args:
        name: `alexnet`, or any of torchvision's classification networks.
        num_classes: K.
        mean: Of the pixels the network was made for, a channel each, on the scale of 0 to 1; by default 0.5.
        std: Likewise, their standard deviation.

    Raises:
        UserError: There is no network of that name.
    """
    from torch import nn

    from project.models.alexnet import AlexNet
    from project.models.normalize import SCRATCH, Normalize

    normalize = Normalize(mean or SCRATCH, std or SCRATCH)
    if name == "alexnet":
        return nn.Sequential(normalize, AlexNet(num_classes))

    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(
            f"There is no network {name}.{did_you_mean(name, names)} --model.name takes alexnet, resnet18 or another "
            "of torchvision's classification networks."
        )
    # these two would answer with a tuple of logits while they train
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return nn.Sequential(
        normalize, torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    )


def require_size(network: "nn.Module", name: str, image_size: int) -> None:
    """Checks that a network can take a size, by showing it one black picture.

    Raises:
        UserError: It cannot; the sentence gives the next size that it takes.
    """
    import torch

    def takes(size: int) -> bool:
        try:
            with torch.inference_mode():
                network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (AssertionError, RuntimeError, ValueError):
            return False
        return True

    was_training = network.training
    network.eval()
    if not takes(image_size):
        larger = next((size for size in range(image_size + 1, 513) if takes(size)), None)
        way_out = f"the next size that it takes is {larger}" if larger else "give another"
        raise UserError(f"--data.image_size is {image_size}, which {name} does not take; {way_out}.")
    network.train(was_training)
