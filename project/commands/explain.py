"""Explains predictions with heat maps: python -m project.cli explain runs/digits/version_0 photos/."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from project import files
from project.data.inputs import gather
from project.errors import UserError, did_you_mean, some
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
    out: str | None = None,
    trust: tuple[str, ...] = (),
) -> int:
    """Draws heat maps over images where the network finds evidence for a class, as a folder of PNG files.

    One file per image, with the image as the network sees it, its true class where a CSV file or a folder's name tells
    it, the heat map, and the predicted class with its probability; contact-sheet.png with all of them (after 24,
    contact-sheet-2.png follows); and filters.png, the first layer, if it is a convolution. Only evidence for the class
    is coloured, each map on its own scale. Unreadable images are listed and left out.

    Args:
        checkpoint: A best.ckpt or last.ckpt, a run's folder, or a bundle.
        images: Files, folders (all images in them and below), patterns like "photos/*.jpg", CSV files with a column
            path and, optionally, true or label, the true class, and - for a list on standard input; in any mix.
        method: gradcam weights the network's last feature maps: about three forward passes an image, but only as fine
            as these maps, and not for vision transformers. ig, integrated gradients, rates each pixel: about a hundred
            forward passes. occlusion covers one square after another and measures how far the class's logit falls: up
            to 170 forward passes. The last two work with every network.
        target: The class to explain; by default the predicted one.
        out: The folder to write; must not exist. By default explanations, or explanations-2 if there is one, and so on.
        trust: Class path of the checkpoint's network, if that is neither this package's nor a library's; repeatable.
    """
    folder = files.unused(Path("explanations")) if out is None else Path(out)
    files.require_new(folder, "out")
    source, given = locate(checkpoint, trust), dict(gather(images))  # true classes by path
    attribution.captum()
    from rich.console import Console
    from rich.progress import track

    predictor = source.load_network()
    names = predictor.class_names
    if target is not None and target not in names:
        raise UserError(f"--target {target} is not one of the classes {some(names)}.{did_you_mean(target, names)}")
    unreadable: dict[str, str] = {}
    explanations = _explain(predictor, given, method, None if target is None else names.index(target), unreadable)
    try:
        with files.new_folder(folder) as unfinished:
            progress = track(explanations, "explain", len(given), console=Console(stderr=True), transient=True)
            count, note = _draw(progress, unfinished, len(given))
            for path, reason in unreadable.items():
                print(f"left out, unreadable: {path}: {reason}")
            if not count:
                raise UserError(f"None of the {len(given):,} images can be read; there is nothing to explain.")
            _draw_filters(predictor.network, unfinished)
    except OSError as error:
        raise UserError(f"Cannot write --out {folder}: {error.strerror or error}; give another folder.") from error
    summary = f"{count:,} image{'s' * (count != 1)} explained by {method}, {len(unreadable):,} unreadable: {folder}"
    print(f"{summary} ({predictor.metadata.calibration} probabilities)")
    if note:
        print(f"gradcam: {note}; see --method ig or occlusion")
    return 0


class _Explanation(NamedTuple):
    path: str
    image: "Pixels"  # (H, W, 3)
    heat: "npt.NDArray[np.float32]"  # (H, W)
    true: str  # a line with the true class, or nothing
    caption: str
    note: str  # that the heat map is too coarse, or nothing


def _explain(
    predictor: "TorchPredictor", given: dict[str, str], method: Method, target: int | None, unreadable: dict[str, str]
) -> Iterator[_Explanation]:
    """Yields explanations in the given order; adds the reasons of images that cannot be read to `unreadable`."""
    names = predictor.class_names
    for batch in predictor.batches(list(given), attribution.AT_A_TIME):
        unreadable |= {batch.names[index]: reason for index, reason in batch.failed.items()}
        if not len(batch.pixels):
            continue
        probabilities = predictor.probabilities(batch.pixels)
        predicted = probabilities.argmax(axis=1).tolist()
        targets = predicted if target is None else [target] * len(predicted)
        heats, note = attribution.heat_maps(predictor, batch.pixels, targets, method)
        for index, path in enumerate(name for name in batch.names if name not in unreadable):
            labels = {"predicted": predicted[index]}
            labels |= {} if target in (None, predicted[index]) else {"explained": target}
            caption = [f"{key}: {names[label]}, {probabilities[index, label]:.1%}" for key, label in labels.items()]
            caption += [] if heats[index].any() else ["no evidence for it"]
            folders = {*Path(path).parts[:-1]}.intersection(names)
            true = given[path] or (folders.pop() if len(folders) == 1 else "")
            lines = f"\ntrue: {true}" if true else "", "\n".join(caption), note
            yield _Explanation(path, batch.pixels[index], heats[index], *lines)


def _draw(explanations: Iterable[_Explanation], folder: Path, total: int) -> tuple[int, str]:
    """Writes the images and the contact sheets; returns how many images there were, and the note on their maps."""
    from project.evaluation import figures

    def write(name: str, shown: list[_Explanation], titles: list[str], columns: int, side: float) -> None:
        rows = [(entry.image, entry.heat, title, entry.caption) for entry, title in zip(shown, titles, strict=True)]
        figures.explanations(rows, columns, side, shown[0].note).savefig(folder / name, dpi=120)

    count, note, explanations = 0, "", iter(explanations)
    while sheet := list(islice(explanations, SHEET)):
        for entry in sheet:
            count, note = count + 1, entry.note
            stem = re.sub(r"[^\w.-]+", "_", Path(entry.path).stem)[:50]  # at most 200 bytes of a file name's 255
            write(f"{count:0{len(str(total))}}-{stem}.png", [entry], [entry.path + entry.true], 1, 3.0)
        name = "contact-sheet.png" if count <= SHEET else f"contact-sheet-{-(-count // SHEET)}.png"
        write(name, sheet, [Path(entry.path).name + entry.true for entry in sheet], COLUMNS, 1.9)
    return count, note


def _draw_filters(network: "nn.Module", folder: Path) -> None:
    from torch import nn

    from project.evaluation import figures

    layers = attribution.split(network)[1].modules()
    first = next(layer for layer in layers if not any(layer.children()) and any(True for _ in layer.parameters()))
    if isinstance(first, nn.Conv2d):
        figures.filter_grid(first.weight.detach().float().cpu()).savefig(folder / "filters.png", dpi=120)
