"""Explains predictions with heat maps: python -m project.cli explain runs/digits/version_0 photos/."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from project import files
from project.data.inputs import expand
from project.errors import UserError, did_you_mean
from project.evaluation import attribution
from project.evaluation.attribution import Method
from project.inference.load import locate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

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
    source, paths = locate(checkpoint), list(expand(images))
    attribution.captum()
    from rich.console import Console
    from rich.progress import track

    predictor = source.load_network()
    names = predictor.class_names
    if target is not None and target not in names:
        raise UserError(
            f"--target is {target}, which is not a class of {checkpoint}.{did_you_mean(target, names)} "
            f"The classes are {', '.join(names[:20])}{f' and {len(names) - 20:,} more' * (len(names) > 20)}."
        )
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
    row: int
    path: str
    image: "npt.NDArray[np.uint8]"  # (H, W, 3)
    heat: "npt.NDArray[np.float32]"  # (H, W)
    caption: str


def _explain(
    predictor: "TorchPredictor", paths: Sequence[str], method: Method, target: int | None, unreadable: dict[str, str]
) -> "Iterator[_Explanation]":
    """Yields explanations in the given order; adds the reasons of images that cannot be read to `unreadable`."""
    from project.data.dataset import ImageDataset
    from project.data.loader import BatchSampler, loader

    dataset = ImageDataset(Path(), paths, None, predictor.image_size, predictor.resize)
    for batch in loader(dataset, BatchSampler(len(paths), attribution.AT_A_TIME, shuffle=False), 0):
        unreadable |= {paths[row]: reason for row, reason in batch.failed}
        if not len(batch.row):
            continue
        pixels = batch.image.permute(0, 2, 3, 1).numpy()
        probabilities = predictor.probabilities(pixels)
        predicted = probabilities.argmax(axis=1).tolist()
        targets = predicted if target is None else [target] * len(predicted)
        heats = attribution.heat_maps(predictor, batch.image, targets, method)
        for index, row in enumerate(batch.row.tolist()):
            caption = f"{predictor.class_names[targets[index]]}\n{probabilities[index, targets[index]]:.1%}"
            if targets[index] != predicted[index]:
                caption += f", predicted: {predictor.class_names[predicted[index]]}"
            if not heats[index].any():
                caption += ", no evidence for it"
            yield _Explanation(row, paths[row], pixels[index], heats[index], caption)


def _draw(explanations: Iterable[_Explanation], folder: Path, total: int) -> int:
    """Writes the images and the contact sheets; returns how many images there were."""
    import numpy as np

    from project.evaluation import figures

    def write(name: str, shown: list[_Explanation], titles: list[str], columns: int, side: float) -> None:
        images, heats = np.stack([entry.image for entry in shown]), np.stack([entry.heat for entry in shown])
        figure = figures.explanations(images, heats, titles, [entry.caption for entry in shown], columns, side)
        figure.savefig(folder / name, dpi=120)

    count, sheet = 0, list[_Explanation]()

    def write_sheet() -> None:
        number = -(-count // SHEET)
        name = "contact-sheet.png" if number == 1 else f"contact-sheet-{number}.png"
        write(name, sheet, [Path(entry.path).name for entry in sheet], COLUMNS, 1.5)
        sheet.clear()

    for entry in explanations:
        count += 1
        stem = re.sub(r"[^\w.-]+", "_", Path(entry.path).stem)[:50]  # at most 200 bytes of a file name's 255
        write(f"{entry.row + 1:0{len(str(total))}}-{stem}.png", [entry], [entry.path], 1, 3.0)
        sheet.append(entry)
        if len(sheet) == SHEET:
            write_sheet()
    if sheet:
        write_sheet()
    return count


def _draw_filters(network: "nn.Module", folder: Path) -> None:
    from torch import nn

    from project.evaluation import figures

    layers = attribution.split(network)[1].modules()
    first = next(layer for layer in layers if not any(layer.children()) and any(True for _ in layer.parameters()))
    if isinstance(first, nn.Conv2d):
        weights = first.weight.detach().float().cpu().numpy()
        figures.filter_grid(weights).savefig(folder / "filters.png", dpi=120)
