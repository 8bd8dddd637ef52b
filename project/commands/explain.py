"""Explains predictions with heat maps: python -m project.cli explain runs/digits/version_0 photos/."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from project import files
from project.data.inputs import gather
from project.errors import UserError, did_you_mean
from project.evaluation import attribution
from project.evaluation.attribution import Method
from project.inference.load import locate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from project.data.images import Pixels
    from project.inference.checkpoint import TorchPredictor

SHEET, COLUMNS = 24, 3  # images on a contact sheet, and in a row of it


def explain(
    checkpoint: str,
    images: list[str],
    /,
    method: Method = "gradcam",
    target: str | None = None,
    out: str = "explanations",
) -> int:
    """Draws heat maps over images where the network finds evidence for a class, as a folder of PNG files.

    One file per image, with the image as the network sees it, the heat map over it, and the class with its probability;
    contact-sheet.png with all of them (after 24, contact-sheet-2.png follows); and filters.png, the first layer, if it
    is a convolution. Only evidence for the class is coloured, each map on its own scale. Unreadable images are listed
    and left out.

    Args:
        checkpoint: A best.ckpt or last.ckpt, a run's folder, or a bundle.
        images: Files, folders (all images in them and below), patterns like "photos/*.jpg", CSV files with a column
            path, and - for a list on standard input; in any mix.
        method: gradcam weights the network's last feature maps: about three forward passes an image, but only as fine
            as these maps, and not for vision transformers. ig, integrated gradients, rates each pixel: about a hundred
            forward passes. occlusion covers one square after another and measures how far the class's logit falls: up
            to 170 forward passes. The last two work with every network.
        target: The class to explain; by default the predicted one.
        out: The folder to write; must not exist.
    """
    folder = Path(out)
    files.require_new(folder, "out")
    source, paths = locate(checkpoint), [path for path, _ in gather(images)]
    attribution.captum()
    from rich.console import Console
    from rich.progress import track

    predictor = source.load_network()
    names = predictor.class_names
    if target is not None and target not in names:
        known = ", ".join(names[:10]) + ", …" * (len(names) > 10)
        raise UserError(f"--target {target} is not one of the classes {known}.{did_you_mean(target, names)}")
    unreadable: dict[str, str] = {}
    explanations = _explain(predictor, paths, method, None if target is None else names.index(target), unreadable)
    try:
        with files.new_folder(folder) as unfinished:
            progress = track(explanations, "explain", len(paths), console=Console(stderr=True), transient=True)
            count = _draw(progress, unfinished, len(paths))
            for path, reason in unreadable.items():
                print(f"left out, unreadable: {path}: {reason}")
            if not count:
                raise UserError(f"None of the {len(paths):,} images can be read; there is nothing to explain.")
            _draw_filters(predictor.network, unfinished)
    except OSError as error:
        raise UserError(f"Cannot write --out {out}: {error.strerror or error}; give another folder.") from error
    print(f"{count:,} image{'s' * (count != 1)} explained by {method}, {len(unreadable):,} unreadable: {out}")
    return 0


class _Explanation(NamedTuple):
    path: str
    image: "Pixels"  # (H, W, 3)
    heat: "npt.NDArray[np.float32]"  # (H, W)
    caption: str


def _explain(
    predictor: "TorchPredictor", paths: Sequence[str], method: Method, target: int | None, unreadable: dict[str, str]
) -> Iterator[_Explanation]:
    """Yields explanations in the given order; adds the reasons of images that cannot be read to `unreadable`."""
    import torch

    for batch in predictor.batches(paths, attribution.AT_A_TIME):
        unreadable |= {batch.names[index]: reason for index, reason in batch.failed.items()}
        if not len(batch.pixels):
            continue
        probabilities = predictor.probabilities(batch.pixels)
        predicted = probabilities.argmax(axis=1).tolist()
        targets = predicted if target is None else [target] * len(predicted)
        heats = attribution.heat_maps(predictor, torch.from_numpy(batch.pixels).permute(0, 3, 1, 2), targets, method)
        for index, path in enumerate(name for name in batch.names if name not in unreadable):
            caption = f"{predictor.class_names[targets[index]]}\n{probabilities[index, targets[index]]:.1%}"
            if targets[index] != predicted[index]:
                caption += f", predicted: {predictor.class_names[predicted[index]]}"
            if not heats[index].any():
                caption += ", no evidence for it"
            yield _Explanation(path, batch.pixels[index], heats[index], caption)


def _draw(explanations: Iterable[_Explanation], folder: Path, total: int) -> int:
    """Writes the images and the contact sheets; returns how many images there were."""
    from project.evaluation import figures

    def write(name: str, shown: list[_Explanation], titles: list[str], columns: int, side: float) -> None:
        _, images, heats, captions = zip(*shown, strict=True)
        figures.explanations(images, heats, titles, captions, columns, side).savefig(folder / name, dpi=120)

    count, explanations = 0, iter(explanations)
    while sheet := list(islice(explanations, SHEET)):
        for entry in sheet:
            count += 1
            stem = re.sub(r"[^\w.-]+", "_", Path(entry.path).stem)[:50]  # at most 200 bytes of a file name's 255
            write(f"{count:0{len(str(total))}}-{stem}.png", [entry], [entry.path], 1, 3.0)
        name = "contact-sheet.png" if count <= SHEET else f"contact-sheet-{-(-count // SHEET)}.png"
        write(name, sheet, [Path(entry.path).name for entry in sheet], COLUMNS, 1.5)
    return count


def _draw_filters(network: "nn.Module", folder: Path) -> None:
    from torch import nn

    from project.evaluation import figures

    layers = attribution.split(network)[1].modules()
    first = next(layer for layer in layers if not any(layer.children()) and any(True for _ in layer.parameters()))
    if isinstance(first, nn.Conv2d):
        figures.filter_grid(first.weight.detach().float().cpu()).savefig(folder / "filters.png", dpi=120)
