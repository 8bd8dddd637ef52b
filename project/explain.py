"""Shows where in a picture a network sees a class: python -m project.cli explain runs/digits/version_0 photos/."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from project import attribution, files
from project.attribution import Method
from project.errors import UserError, did_you_mean
from project.predict import expand

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from project.checkpoint import Network

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
    attribution.captum()
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
    print(f"{count:,} picture{'s' * (count != 1)} explained by {method}, {len(unreadable):,} unreadable: {out}")
    return 0


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
    for batch in loader(dataset, BatchSampler(len(paths), attribution.AT_A_TIME, shuffle=False), 0):
        unreadable |= {paths[row]: reason for row, reason in batch.failed}
        if not len(batch.row):
            continue
        pictures = batch.image.permute(0, 2, 3, 1).numpy()
        probabilities = predictor.probabilities(pictures)
        predicted = probabilities.argmax(axis=1).tolist()
        targets = predicted if target is None else [target] * len(predicted)
        heats = attribution.heat_maps(predictor, batch.image, targets, method)
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

    layers = (
        m
        for m in attribution.split(network)[1].modules()
        if not any(m.children()) and any(True for _ in m.parameters())
    )
    first = next(layers)
    if isinstance(first, nn.Conv2d):
        weights = first.weight.detach().float().cpu().numpy()
        figures.filter_grid(weights).savefig(folder / "filters.png", dpi=120)
