"""Heat maps of the evidence for a class in an image, computed by Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365)
and occlusion (Zeiler and Fergus 2014, arXiv:1311.2901).
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from project.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from project.inference.checkpoint import TorchPredictor


Method = Literal["gradcam", "ig", "occlusion"]
AT_A_TIME = 32  # images in one forward pass, with every method
STEPS = 32  # of integrated gradients, from grey to the image


def is_available() -> bool:
    """Whether Captum, an optional dependency, is installed."""
    return importlib.util.find_spec("captum") is not None


def heat_maps(
    predictor: "TorchPredictor", images: "Tensor", targets: Sequence[int], method: Method = "gradcam"
) -> "npt.NDArray[np.float32]":
    """Computes heat maps of the evidence for a class.

    The network is left unchanged; a forward pass has at most `AT_A_TIME` images.

    Args:
        predictor: Its network begins with Normalize; gradients start behind it.
        images: (B, 3, H, W) uint8, RGB, square.
        targets: B class indices.
        method: See `attributions`.

    Returns:
        (B, H, W), 0 to 1: the positive part of `attributions` (for ig, averaged over squares of a sixteenth of the
        side), divided by its maximum; all 0 where there is no evidence for the class.

    Raises:
        UserError: Captum is missing, or the method does not suit the network.
    """
    import numpy as np
    import torch
    from torch.nn.functional import avg_pool2d

    assert len(images) == len(targets), f"{len(images)} images, {len(targets)} targets"
    maps = [np.zeros((0, *images.shape[2:]), dtype=np.float32)]
    for first in range(0, len(images), AT_A_TIME):
        part = slice(first, first + AT_A_TIME)
        evidence = attributions(predictor.network, images[part], targets[part], method)
        if method == "ig":  # neighbouring pixels contradict each other; their mean is evidence
            reach = images.shape[-1] // 32
            evidence = avg_pool2d(evidence[:, None], 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
        evidence = evidence.clamp(min=0)
        largest = evidence.amax(dim=(1, 2), keepdim=True)
        maps.append(torch.where(largest > 0, evidence / largest, 0).float().cpu().numpy())
    return np.concatenate(maps)


def attributions(network: "nn.Module", images: "Tensor", targets: Sequence[int], method: Method) -> "Tensor":
    """Computes the contribution of each pixel to a class's logit.

    gradcam: the maps of `last_maps`, weighted by their mean gradients and enlarged to the image. ig: from grey to the
    image, summed over channels; the sum over an image is about the difference of its logit and that of grey.
    occlusion: the mean drop of the logit over all grey squares, a seventh of the side wide, that cover the pixel.

    Args:
        network: Normalize ► network, in evaluation mode.
        images: (B, 3, H, W) uint8, RGB, square.
        targets: B class indices.
        method: gradcam, ig or occlusion.

    Returns:
        (B, H, W) float, without gradients.

    Raises:
        UserError: Captum is missing, or the method does not suit the network.
    """
    import torch
    from torch.nn.functional import interpolate

    attr = captum()
    normalize, behind = split(network)
    device = next(network.parameters()).device
    side = images.shape[-1]
    with torch.inference_mode(False), torch.enable_grad():
        pixels = normalize(images.to(device)).detach()
        classes = torch.as_tensor(targets, dtype=torch.int64, device=device)
        if method == "gradcam":
            cam = attr.LayerGradCam(behind, last_maps(behind, pixels[:1]))
            return interpolate(cam.attribute(pixels.requires_grad_(), classes).detach(), side, mode="bilinear")[:, 0]
        size = 2 * (stride := -(-side // 14))
        count = 8 if method == "ig" else 4  # images in one forward pass, of which each occurs in several versions
        results = []
        for first in range(0, len(pixels), count):
            part, label = pixels[first : first + count], classes[first : first + count]
            if method == "ig":
                explained = attr.IntegratedGradients(behind).attribute(
                    part.requires_grad_(), target=label, n_steps=STEPS, internal_batch_size=AT_A_TIME
                )
                results.append(explained.detach().sum(dim=1))
            else:
                with torch.no_grad():
                    explained = attr.Occlusion(behind).attribute(
                        part,
                        sliding_window_shapes=(3, min(size, side), min(size, side)),
                        strides=(3, stride, stride),
                        target=label,
                        perturbations_per_eval=AT_A_TIME // count,
                    )
                results.append(explained.mean(dim=1))
        return torch.cat(results)


def last_maps(network: "nn.Module", pixels: "Tensor") -> "nn.Module":
    """Finds the layer for Grad-CAM: the last one with maps (B, C, h, w) before they are pooled at the end.

    The network is run once. The last layer with parameters whose output is spatial gives the size of the maps; the
    last module from there on with maps of this size, which ran once, is returned: a whole block where there are blocks.

    Args:
        network: The layers behind Normalize.
        pixels: (1, 3, H, W) float.

    Raises:
        UserError: The network has no maps in its last layers, like vision transformers.
    """
    import torch

    outputs: list[tuple[nn.Module, tuple[int, ...]]] = []  # each module that ran, and the shape of its output
    hooks = [
        module.register_forward_hook(lambda module, _, out: outputs.append((module, tuple(getattr(out, "shape", ())))))
        for module in network.modules()
        if module is not network
    ]
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    runs = Counter(id(module) for module, _ in outputs)
    spatial = [
        n for n, (m, shape) in enumerate(outputs) if any(True for _ in m.parameters(recurse=False)) and _side(shape)
    ]
    if spatial:
        side, after = _side(outputs[spatial[-1]][1]), outputs[spatial[-1] :]
        stop = next((n for n, (_, shape) in enumerate(after) if _side(shape) not in (0, side)), len(after))
        fit = [n for n, (m, shape) in enumerate(after[:stop]) if shape[2:] == (side, side) and runs[id(m)] == 1]
        if fit and not any(len(shape) == 3 and shape[1] > 1 for _, shape in after[fit[-1] :]):
            return after[fit[-1]][0]
    raise UserError(
        "gradcam needs maps (B, C, h, w) in the last layers, which this network does not have; give --method ig or "
        "occlusion."
    )


def _side(shape: tuple[int, ...]) -> int:
    """Side of maps (B, C, side, side) or (B, side, side, C); 0 for any other shape, and for a side of 1."""
    if len(shape) != 4 or (shape[2] != shape[3] and shape[1] != shape[2]):
        return 0
    return shape[2] if shape[2] > 1 else 0


def split(network: "nn.Module") -> "tuple[nn.Module, nn.Module]":
    """Returns Normalize, and the layers behind it."""
    layers = cast("nn.Sequential", network)
    return layers[0], layers[1:]


def captum() -> Any:
    """Imports Captum's methods, or refuses if it is not installed."""
    try:
        from captum import attr
    except ImportError as error:
        raise UserError("explain needs the library captum; install it: pip install -e .[explain]") from error
    return attr
