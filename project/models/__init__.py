"""Names become networks: Normalize ► network, (B, 3, H, W) uint8 in, logits (B, K) float out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from project import parts
from project.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

TIMM = "timm/"  # prefix of the names of timm's networks
# Arguments of networks that get weights: a network that a checkpoint names gets them from there.
WEIGHTS = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}


def build(
    name: str,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    of: str = "",
    part: Mapping[str, Any] | None = None,
) -> "nn.Sequential":
    """Creates a network with random weights; those of the head are small, so that all classes are equally likely.

    `name` is `alexnet`, any of torchvision's classification networks, or `timm/` and one of timm's, else a UserError;
    `part`, of a network that has no short name, its class path and arguments: see parts.py. `mean` and `std` are those
    of the pixels that it was trained on, a channel each, on the scale of 0 to 1; by default 0.5. `of` is the checkpoint
    or bundle that names the network, for the error.
    """
    from torch import nn

    from project.models.normalize import BATCH_NORMS, SCRATCH, Normalize

    if part is None:
        network = _network(name, num_classes, of)
    else:  # the weights of a network that a checkpoint names are not looked for elsewhere
        network = parts.make(_without_weights(part) if of else part, "model.network", num_classes=num_classes)
    for layer in network.modules():
        # At least PyTorch's default: the 0.01 of MobileNetV3, MaxViT and the largest EfficientNets and the 0.0003 of
        # MNASNet are made for 100,000s of steps; after a few hundred, the running statistics are far from the images'.
        if isinstance(layer, BATCH_NORMS) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, 0.1)
    return nn.Sequential(Normalize(mean or SCRATCH, std or SCRATCH), network)


def _without_weights(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {key: _without_weights(value) for key, value in entry.items() if key not in WEIGHTS}
    return [_without_weights(value) for value in entry] if isinstance(entry, list | tuple) else entry


def _network(name: str, num_classes: int, of: str) -> "nn.Module":
    """A network by its short name: one file in this folder and one line here."""
    from project.models.alexnet import AlexNet

    if name == "alexnet":
        return AlexNet(num_classes)
    if name.startswith(TIMM):
        made = timm_network(name, num_classes=num_classes)
        return _with_small(made.get_classifier(), made, num_classes)

    import torchvision

    if name not in (names := torchvision_names()):
        if of:
            raise UserError(f"The network {name} of {of} is no longer in the code; put it into project/models/.")
        hint = "give a class path by --model.network" if "." in name else "python -m project.cli models lists all"
        raise UserError(f"There is no network {name}.{did_you_mean(name, names)} For --model.name, {hint}.")
    # otherwise these two return a tuple of logits in training, and rescale the pixels once more
    plain = {"aux_logits": False, "init_weights": True, "transform_input": False}
    options = plain if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return _with_small(head(network)[1], network, num_classes)


def _with_small(heads: Any, network: "nn.Module", num_classes: int) -> "nn.Module":
    """Draws the weights of a network's head anew, so that at first all classes are about equally likely.

    Libraries draw up to +-0.7 for two classes, and the first epochs would be spent on unlearning that.
    """
    from torch import nn

    for layer in nn.ModuleList(heads if isinstance(heads, tuple) else [heads]).modules():  # distilled ones have two
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == num_classes:
            nn.init.normal_(layer.weight, std=0.1 / layer.weight[0].numel() ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def torchvision_names() -> list[str]:
    """All of torchvision's classification networks."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def timm_network(name: str, **options: Any) -> Any:
    """Creates one of timm's networks; raises a UserError where it has none of that name, or is not installed."""
    timm = import_timm()
    own = name.removeprefix(TIMM)
    if not timm.is_model(own):
        near = did_you_mean(own, timm.list_models())
        raise UserError(f"timm has no network {own}.{near} python -m project.cli models 'timm/*' lists them.")
    try:
        return timm.create_model(own, **options)
    except (RuntimeError, ValueError) as error:  # an unknown tag after the name's dot
        raise UserError(f"timm cannot make {own}: {error}") from error


def import_timm() -> Any:
    """Imports timm; raises a UserError where that extra of this project is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError("Networks called timm/... need the library timm; install it: pip install -e .[timm]") from error
    return timm


def head(network: "nn.Module") -> tuple[str, "nn.Module"]:
    """Name and module of the layer that computes the logits: the last linear or convolutional one, else all."""
    from torch import nn

    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else ("", network)


def require_size(network: "nn.Module", name: str, image_size: int, num_classes: int) -> None:
    """Checks, with one black image, that a network maps images of a size to logits (1, K); its UserError says why not.

    Where the size is wrong, it has the next one that the network takes, or the network's own words.
    """
    import torch

    def output(size: int) -> Any:
        try:
            with torch.inference_mode():
                return network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except Exception as error:  # networks refuse sizes in many ways
            return error

    network.eval()
    if isinstance(result := output(image_size), Exception):
        takes = (size for size in range(image_size + 1, 513) if not isinstance(output(size), Exception))
        reason = " ".join(str(result).split()) or type(result).__name__
        size = next(takes, None)
        then = f"the next size that it takes is {size}" if size else f"nor a larger one: {reason}"
        raise UserError(f"--data.image_size is {image_size}, which {name} does not take; {then}.")
    if tuple(getattr(result, "shape", ())) != (1, num_classes):
        made = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise UserError(f"{name} returns {made} for one image; logits are a tensor (1, {num_classes}).")
    network.train()
