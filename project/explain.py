"""Shows where in a picture a network sees a class: python -m project.cli explain runs/digits/version_0 photos/.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365)
and occlusion (Zeiler and Fergus 2014, arXiv:1311.2901), computed by Captum.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

from project import files
from project.errors import UserError, did_you_mean
from project.predict import expand

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from project.checkpoint import Network

Method = Literal["gradcam", "ig", "occlusion"]
AT_A_TIME = 32  # pictures that a network sees at once, whatever the method makes of each
STEPS = 32  # of integrated gradients, between grey and the picture
SHEET, COLUMNS = 24, 3  # pairs on a contact sheet, and in a row of it


def explain(
    checkpoint: str,
    pictures: list[str],
    /,
    method: Method = "gradcam",
    target: str | None = None,
    out: str = "explanations",
) -> int:
    """Draws over each picture where the network sees a class, and writes a folder of PNG files.

    One file a picture, with the picture as the network sees it, the map over it, and the class with its probability;
    contact-sheet.png with all of them (more than 24 go on in contact-sheet-2.png); and filters.png, the first layer,
    where that is a convolution. Only what speaks for the class is coloured, each map on its own scale. Unreadable
    pictures are named and left out.

    Args:
        checkpoint: A best.ckpt or last.ckpt, or a run's folder.
        pictures: Files, folders (all pictures in them and below), patterns like "photos/*.jpg", CSV files with a column
            path, and - for a list on standard input; in any mix.
        method: gradcam weighs the network's last maps: quick, about three forward passes a picture, but as coarse as
            these maps are, and not for vision transformers. ig, integrated gradients, judges each pixel: about a
            hundred forward passes. occlusion covers one square after another and sees how far the class's logit falls:
            up to 170 forward passes. The last two suit every network.
        target: The class to look for; by default the one that is predicted.
        out: The folder to write; must not exist.
    """
    folder = Path(out)
    files.require_new(folder, "out")
    paths = list(expand(pictures))
    _captum()
    from rich.console import Console
    from rich.progress import track

    from project.checkpoint import load  # torch: not before the arguments are known to be right

    predictor = load(checkpoint)
    names = predictor.class_names
    if target is not None and target not in names:
        raise UserError(
            f"--target is {target}, which is no class of {checkpoint}.{did_you_mean(target, names)} "
            f"They are {', '.join(names[:20])}{f' and {len(names) - 20:,} more' * (len(names) > 20)}."
        )
    unreadable: dict[str, str] = {}
    shown = _explained(predictor, paths, method, None if target is None else names.index(target), unreadable)
    try:
        with files.new_folder(folder) as unfinished:
            progress = track(shown, "explain", len(paths), console=Console(stderr=True), transient=True)
            count = _draw(progress, unfinished, len(paths))
            for path, reason in unreadable.items():
                print(f"left out, unreadable: {path}: {reason}")
            if not count:
                raise UserError(f"None of the {len(paths):,} pictures can be read; there is nothing to explain.")
            _draw_filters(predictor.network, unfinished)
    except OSError as error:
        raise UserError(f"Cannot write --out {out}: {error.strerror or error}; give another folder.") from error
    print(f"{count:,} pictures explained by {method}, {len(unreadable):,} unreadable: {out}")
    return 0


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

    attr = _captum()
    normalize, behind = _split(network)
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


def _split(network: "nn.Module") -> "tuple[nn.Module, nn.Module]":
    layers = cast("nn.Sequential", network)
    return layers[0], layers[1:]


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise UserError("explain needs the library captum; install it: pip install -e .[explain]") from error
    return attr


class _Explained(NamedTuple):
    row: int
    path: str
    image: "npt.NDArray[np.uint8]"  # (H, W, 3)
    heat: "npt.NDArray[np.float32]"  # (H, W)
    caption: str


def _explained(
    predictor: "Network", paths: Sequence[str], method: Method, target: int | None, unreadable: dict[str, str]
) -> "Iterator[_Explained]":
    """One by one, in the order given; those that cannot be read are entered into `unreadable`, with the reason."""
    from project.data.dataset import ImageDataset, loader
    from project.data.sampler import BatchSampler

    dataset = ImageDataset(Path(), paths, None, predictor.image_size, predictor.resize)
    for batch in loader(dataset, BatchSampler(len(paths), AT_A_TIME, shuffle=False), 0):
        unreadable |= {paths[row]: reason for row, reason in batch.failed}
        if not len(batch.row):
            continue
        pictures = batch.image.permute(0, 2, 3, 1).numpy()
        probabilities = predictor.probabilities(pictures)
        predicted = probabilities.argmax(axis=1).tolist()
        targets = predicted if target is None else [target] * len(predicted)
        heats = heat_maps(predictor, batch.image, targets, method)
        for place, row in enumerate(batch.row.tolist()):
            caption = f"{predictor.class_names[targets[place]]}\n{probabilities[place, targets[place]]:.1%}"
            if targets[place] != predicted[place]:
                caption += f", predicted: {predictor.class_names[predicted[place]]}"
            if not heats[place].any():
                caption += ", nothing speaks for it"
            yield _Explained(row, paths[row], pictures[place], heats[place], caption)


def _draw(shown: "Iterable[_Explained]", folder: Path, total: int) -> int:
    """Writes the pictures and the contact sheets; returns how many pictures there were."""
    import numpy as np

    from project import figures

    def write(name: str, some: list[_Explained], columns: int, side: float) -> None:
        images, heats = np.stack([one.image for one in some]), np.stack([one.heat for one in some])
        titles = [one.path if columns == 1 else Path(one.path).name for one in some]
        figure = figures.explanations(images, heats, titles, [one.caption for one in some], columns, side)
        figure.savefig(folder / name, dpi=120)

    count, sheets, waiting = 0, 0, list[_Explained]()

    def write_sheet() -> None:
        nonlocal sheets
        sheets += 1
        write("contact-sheet.png" if sheets == 1 else f"contact-sheet-{sheets}.png", waiting, COLUMNS, 1.5)
        waiting.clear()

    for one in shown:
        count += 1
        stem = re.sub(r"[^\w.-]+", "_", Path(one.path).stem)[:50]  # at most 200 bytes of a file name's 255
        write(f"{one.row + 1:0{len(str(total))}}-{stem}.png", [one], 1, 3.0)
        waiting.append(one)
        if len(waiting) == SHEET:
            write_sheet()
    if waiting:
        write_sheet()
    return count


def _draw_filters(network: "nn.Module", folder: Path) -> None:
    from torch import nn

    from project import figures

    layers = (m for m in _split(network)[1].modules() if not any(m.children()) and any(True for _ in m.parameters()))
    first = next(layers)
    if isinstance(first, nn.Conv2d):
        weights = first.weight.detach().float().cpu().numpy()
        figures.filter_grid(weights).savefig(folder / "filters.png", dpi=120)
