"""Heat maps of the evidence for a class in an image, computed by Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365)
and occlusion (Zeiler and Fergus 2014, arXiv:1311.2901).
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, cast

from project.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from project.data.images import Pixels
    from project.inference.checkpoint import TorchPredictor


Method = Literal["gradcam", "ig", "occlusion"]
AT_A_TIME = 32  # images in one forward pass, with every method
EXPLAINED = {"gradcam": 32, "ig": 8, "occlusion": 4}  # images at a time, each of which occurs in several versions
STEPS = 32  # of integrated gradients, from grey to the image
# Cells on a side from which Grad-CAM's maps locate something: those of ResNets at 224 px. Localisation gets worse with
# fewer cells (Zhou et al. 2016, arXiv:1512.04150, section 3.1, who use 13 and 14).
ENOUGH_CELLS = 7


def heat_maps(
    predictor: "TorchPredictor", pixels: "Pixels", targets: Sequence[int], method: Method = "gradcam"
) -> "tuple[npt.NDArray[np.float32], str]":
    """Computes heat maps of the evidence for a class, and leaves the network unchanged.

    Pixels are (B, H, W, 3) uint8, RGB, square images, targets B class indices. The maps are (B, H, W), 0 to 1: the
    positive part of `attributions` (for ig, averaged over squares of a sixteenth of the side), divided by its maximum;
    all 0 where there is no evidence for the class. With them comes a note that they are too coarse, empty where they
    are not. UserError where Captum is missing, or the method does not suit the network.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    maps, images = [], torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for first in range(0, len(images), EXPLAINED[method]):
        part = slice(first, first + EXPLAINED[method])
        evidence, cells = attributions(predictor.network, images[part], targets[part], method)
        if method == "ig":  # neighbouring pixels contradict each other; their mean is evidence
            reach = images.shape[-1] // 32
            evidence = avg_pool2d(evidence[:, None], 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
        evidence = evidence.clamp(min=0)
        largest = evidence.amax(dim=(1, 2), keepdim=True)
        maps.append(torch.where(largest > 0, evidence / largest, 0).float().cpu())
    heats: npt.NDArray[np.float32] = torch.cat(maps).numpy()
    return heats, "" if cells >= ENOUGH_CELLS else f"only {cells} x {cells} cells, too coarse to locate anything"


def attributions(
    network: "nn.Module", images: "Tensor", targets: Sequence[int], method: Method
) -> "tuple[Tensor, int]":
    """Computes the contribution of each pixel to a class's logit: (B, H, W) float, and how many cells a side has.

    gradcam: the maps of `last_maps`, weighted by their mean gradients and enlarged to the image. ig: from grey to the
    image, summed over channels; the sum over an image is about the difference of its logit and that of grey.
    occlusion: the mean drop of the logit over all grey squares, a seventh of the side wide, that cover the pixel.
    The network is Normalize ► network, in evaluation mode; images are (B, 3, H, W) uint8, RGB, square.
    """
    import torch
    from torch.nn.functional import interpolate

    attr = captum()
    normalize, behind = split(network)
    device, side = next(network.parameters()).device, images.shape[-1]
    with torch.inference_mode(False), torch.set_grad_enabled(method != "occlusion"):
        pixels = normalize(images.to(device)).detach()
        classes = torch.as_tensor(targets, dtype=torch.int64, device=device)
        if method == "gradcam":
            cam = attr.LayerGradCam(behind, last_maps(behind, pixels[:1])).attribute(pixels.requires_grad_(), classes)
            return interpolate(cam.detach(), side, mode="bilinear")[:, 0], cam.shape[-1]
        if method == "ig":
            integrated: Tensor = attr.IntegratedGradients(behind).attribute(
                pixels.requires_grad_(), target=classes, n_steps=STEPS, internal_batch_size=AT_A_TIME
            )
            return integrated.detach().sum(dim=1), side
        stride = -(-side // 14)
        square = min(2 * stride, side)
        drops: Tensor = attr.Occlusion(behind).attribute(
            pixels,
            sliding_window_shapes=(3, square, square),
            strides=(3, stride, stride),
            target=classes,
            perturbations_per_eval=AT_A_TIME // EXPLAINED[method],
        )
        return drops.mean(dim=1), side


def last_maps(network: "nn.Module", pixels: "Tensor") -> "nn.Module":
    """Finds the layer for Grad-CAM: the last one with maps (B, C, h, w) before they are pooled at the end.

    The network, which is the layers behind Normalize, is run once, on pixels (1, 3, H, W) float. The last layer with
    parameters whose output is spatial gives the size of the maps; the last module from there on with maps of this size,
    which ran once, is returned: a whole block where there are blocks. UserError where the last layers have no maps, as
    in vision transformers.
    """
    import torch

    outputs: list[tuple[nn.Module, tuple[int, ...]]] = []  # each module that ran, and the shape of its output

    def record(module: torch.nn.Module, _: Any, output: Any) -> None:
        outputs.append((module, tuple(getattr(output, "shape", ()))))

    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(record))
        network(pixels)
    runs = Counter(id(module) for module, _ in outputs)
    spatial = [n for n, (m, shape) in enumerate(outputs) if [*m.parameters(recurse=False)] and _side(shape)]
    if spatial:
        side, after = _side(outputs[spatial[-1]][1]), outputs[spatial[-1] :]
        stop = next((n for n, (_, shape) in enumerate(after) if _side(shape) not in (0, side)), len(after))
        fit = [n for n, (m, shape) in enumerate(after[:stop]) if shape[2:] == (side, side) and runs[id(m)] == 1]
        if fit and not any(len(shape) == 3 and shape[1] > 1 for _, shape in after[fit[-1] :]):
            return after[fit[-1]][0]
    raise UserError("gradcam needs a network with maps (B, C, h, w) in its last layers; give --method ig or occlusion.")


def _side(shape: tuple[int, ...]) -> int:
    """Side of maps (B, C, side, side) or (B, side, side, C); 0 for any other shape, and for a side of 1."""
    is_square = len(shape) == 4 and shape[2] in (shape[1], shape[3]) and shape[2] > 1
    return shape[2] if is_square else 0


def split(network: "nn.Module") -> "tuple[nn.Module, nn.Module]":
    """Returns Normalize, and the layers behind it."""
    layers = cast("nn.Sequential", network)
    return layers[0], layers[1:]


def captum() -> Any:
    """Imports Captum's methods, or refuses if it is not installed."""
    try:
        from captum import attr
    except ImportError as error:
        raise UserError("Heat maps need the library captum; install it: pip install -e .[explain]") from error
    return attr
