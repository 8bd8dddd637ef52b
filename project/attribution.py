"""Which places of a picture speak for a class: maps over the picture, computed by Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365)
and occlusion (Zeiler and Fergus 2014, arXiv:1311.2901).
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from project.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from project.checkpoint import Network

Method = Literal["gradcam", "ig", "occlusion"]
AT_A_TIME = 32  # pictures that a network sees at once, whatever the method makes of each
STEPS = 32  # of integrated gradients, between grey and the picture


def is_available() -> bool:
    """Whether Captum, an extra of this project, is installed."""
    return importlib.util.find_spec("captum") is not None


def heat_maps(
    predictor: "Network", images: "Tensor", targets: Sequence[int], method: Method = "gradcam"
) -> "npt.NDArray[np.float32]":
    """Where the evidence for a class lies.

    The network is left as it is, and sees at most `AT_A_TIME` pictures at once, however many there are.

    Args:
        predictor: Its network begins with Normalize; gradients start behind that.
        images: (B, 3, H, W) uint8, RGB, square.
        targets: B class indices.
        method: See `explain`.

    Returns:
        (B, H, W), 0 to 1: the positive part of `attributions` (of ig, after a mean over squares of a sixteenth of the
        side), divided by its largest value; all 0 where nothing speaks for the class.

    Raises:
        UserError: Captum is missing, or the method does not suit the network.
    """
    import numpy as np
    import torch
    from torch.nn.functional import avg_pool2d

    assert method in get_args(Method), method
    assert len(images) == len(targets), f"{len(images)} images, {len(targets)} targets"
    maps = [np.zeros((0, *images.shape[2:]), dtype=np.float32)]
    for first in range(0, len(images), AT_A_TIME):
        part = slice(first, first + AT_A_TIME)
        evidence = attributions(predictor.network, images[part], targets[part], method)
        if method == "ig":  # neighbouring pixels contradict each other: what is left on average is evidence
            reach = images.shape[-1] // 32
            evidence = avg_pool2d(evidence[:, None], 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
        evidence = evidence.clamp(min=0)
        largest = evidence.amax(dim=(1, 2), keepdim=True)
        maps.append(torch.where(largest > 0, evidence / largest, 0).float().cpu().numpy())
    return np.concatenate(maps)


def attributions(network: "nn.Module", images: "Tensor", targets: Sequence[int], method: Method) -> "Tensor":
    """What each place adds to a class's logit, or takes from it, in the units of its method.

    gradcam: the maps of `last_maps`, weighed by their mean gradients, enlarged to the picture. ig: from grey to the
    picture, summed over channels; a picture's sum is nearly the difference of its logit and grey's. occlusion: how far
    the logit falls when squares of a seventh of the side turn grey, on average over those that cover the place.

    Args:
        network: Normalize ► network, in evaluation mode.
        images: (B, 3, H, W) uint8, RGB, square.
        targets: B class indices.
        method: See `explain`.

    Returns:
        (B, H, W) float, without gradients.

    Raises:
        UserError: As `heat_maps`.
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
        few = 8 if method == "ig" else 4  # pictures, of which AT_A_TIME versions are looked at together
        found = []
        for first in range(0, len(pixels), few):
            part, label = pixels[first : first + few], classes[first : first + few]
            if method == "ig":
                gradients = attr.IntegratedGradients(behind)
                found.append(
                    gradients.attribute(
                        part.requires_grad_(), target=label, n_steps=STEPS, internal_batch_size=AT_A_TIME
                    )
                    .detach()
                    .sum(dim=1)
                )
            else:
                with torch.no_grad():
                    fall = attr.Occlusion(behind).attribute(
                        part,
                        sliding_window_shapes=(3, min(size, side), min(size, side)),
                        strides=(3, stride, stride),
                        target=label,
                        perturbations_per_eval=AT_A_TIME // few,
                    )
                found.append(fall.mean(dim=1))
        return torch.cat(found)


def last_maps(network: "nn.Module", pixels: "Tensor") -> "nn.Module":
    """The layer whose output Grad-CAM weighs: the last that has maps (B, C, h, w), before they are pooled at the end.

    It is found by running the network. The last layer with parameters whose output is spatial gives the maps' size;
    the last module after it with maps of this size, which ran once, is the one: a whole block where there are blocks.

    Args:
        network: What comes behind Normalize.
        pixels: (1, 3, H, W) float.

    Raises:
        UserError: The maps do not last to the end, as in vision transformers.
    """
    import torch

    seen: list[tuple[nn.Module, tuple[int, ...]]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, _, output: seen.append((module, tuple(getattr(output, "shape", ()))))
        )
        for module in network.modules()
        if module is not network
    ]
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    has_own = [bool(next(module.parameters(recurse=False), None) is not None) for module, _ in seen]
    ends = [place for place, (_, shape) in enumerate(seen) if has_own[place] and _places(shape)]
    if ends:
        side = _places(seen[ends[-1]][1])
        after = seen[ends[-1] :]
        stop = next((n for n, (_, shape) in enumerate(after) if _places(shape) not in (0, side)), len(after))
        runs = Counter(id(module) for module, _ in seen)
        fit = [n for n, (m, shape) in enumerate(after[:stop]) if shape[2:] == (side, side) and runs[id(m)] == 1]
        if fit and not any(len(shape) == 3 and shape[1] > 1 for _, shape in after[fit[-1] :]):
            return after[fit[-1]][0]
    raise UserError(
        "gradcam needs maps (B, C, h, w) in the last layers, which this network has not; give --method ig or occlusion."
    )


def _places(shape: tuple[int, ...]) -> int:
    """Side of maps (B, C, side, side), or of (B, side, side, C); 0 for any other shape, and for a single place."""
    if len(shape) != 4 or (shape[2] != shape[3] and shape[1] != shape[2]):
        return 0
    return shape[2] if shape[2] > 1 else 0


def split(network: "nn.Module") -> "tuple[nn.Module, nn.Module]":
    """Normalize, and what comes behind it."""
    layers = cast("nn.Sequential", network)
    return layers[0], layers[1:]


def captum() -> Any:
    """Captum's methods.

    Raises:
        UserError: It is missing.
    """
    try:
        from captum import attr
    except ImportError as error:
        raise UserError("explain needs the library captum; install it: pip install -e .[explain]") from error
    return attr
