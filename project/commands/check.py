"""Checks a data set before training: python -m project.cli check photos/ --preview preview.png."""

import shlex
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse.typing import PositiveInt

from project import files, parts
from project.data import manifest, shards, splits
from project.data.check import Report, check_dataset
from project.data.folders import Layout
from project.data.images import parse_resize, read
from project.data.transforms import AUGMENTATIONS, Augment, Augmentation, augmentation
from project.errors import UserError, one_line

SHOWN, TABLE = 6, 30  # images of a finding and of a split, rows of the table of classes


def check(
    root: str,
    /,
    json: str | None = None,
    preview: str | None = None,
    quarantine: str | None = None,
    config: str | None = None,
    augment: Augment | None = None,
    image_size: PositiveInt | None = None,
    resize: str | None = None,
    layout: Layout | None = None,
    keep: str = "",
) -> int:
    """Decodes every image of a data set and reports what is wrong with it, worst first. Changes nothing.

    Exits with 0 if there are no problems, with 1 if there are.

    Args:
        root: The images: a folder or a CSV file, as fit takes them.
        json: Write everything into this file too; must not exist.
        preview: Draw into this PNG file what the network will see; must not exist.
        quarantine: Write the images to exclude into this CSV file, which fit --data.exclude takes; must not exist.
        config: A fit's YAML file, whose data.augment, transforms, image_size and resize the preview takes.
        augment: Augmentation of the preview; by default flip.
        image_size: Side of the preview's images, in pixels; by default 224.
        resize: How the preview's images become square, as fit --data.resize takes it, by default stretch; all shows
            three ways.
        layout: Whether the folders in root are splits or classes, as fit --data.layout takes it.
        keep: Pattern of names that are not passed over, as fit --data.keep takes it.
    """
    from rich.console import Console
    from rich.progress import track

    options = {"augment": augment, "image_size": image_size, "resize": resize}
    shown = _view(config, {name: value for name, value in options.items() if value is not None})
    for option, file in (("json", json), ("preview", preview), ("quarantine", quarantine)):
        if file is not None:
            files.require_new(Path(file), option)
    progress = partial(track, description="check", console=Console(stderr=True), transient=True)
    folder = shards.local(root)
    report = check_dataset(folder, progress, layout, keep)
    print("\n".join(_lines(root, report)))
    if json is not None:
        content = {"root": root, "images": len(report.rows), "classes": splits.counts(report.rows)} | vars(report)
        del content["rows"]
        files.write_json(Path(json), content)
        print(f"written: {json}")
    if quarantine is not None:
        files.write_csv(Path(quarantine), [("path", "reason"), *sorted(report.leave_out.items())])
        print(f"written: {quarantine}, {len(report.leave_out):,} images; fit --data.exclude {shlex.quote(quarantine)}")
    if preview is not None:
        _draw(Path(preview), folder, report, *shown)
    return int(any(finding.problem for finding in report.findings))


class View(NamedTuple):
    """How fit shows an image to the network."""

    augment: Augment = "flip"
    image_size: PositiveInt = 224
    resize: str = "stretch"
    transforms: list[str | dict[str, Any]] | None = None


def _view(config: str | None, given: dict[str, Any]) -> tuple[Augmentation, int, str]:
    """What a fit's configuration does to training images, with what is given above it: also their side and resize."""
    data: dict[str, Any] = {}
    try:
        if config is not None:
            data = dict(yaml.safe_load(Path(files.shipped(config)).read_text(encoding="utf-8")).get("data") or {})
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"--config {config}: this is no YAML file of a fit's options in UTF-8.") from error
    options = {name: data[name] for name in View._fields if data.get(name) is not None}
    made = parts.make({"class_path": f"{__name__}.View", "init_args": options | given}, "data")
    parse_resize("crop" if made.resize == "all" else made.resize)  # its error
    size = int(made.image_size)
    return augmentation(made.augment, made.transforms, size), size, made.resize


def _lines(root: str, report: Report) -> Iterator[str]:
    counts = {one_line(name): numbers for name, numbers in splits.counts(report.rows).items()}
    yield f"{root}: {len(report.rows):,} images, {len(counts)} classes\n"
    if any(row.split for row in report.rows):
        width = max(map(len, [*counts, "class"]))
        yield f"{'class':{width}}  {'train':>9}  {'val':>9}  {'test':>9}"
        for name in sorted(counts, key=lambda name: sum(counts[name].values()))[:TABLE]:
            yield f"{name:{width}}" + "".join(f"  {count:9,}" for count in counts[name].values())
        if len(counts) > TABLE:
            yield f"and {len(counts) - TABLE:,} classes with more images"
    for title, problem in (("problems", True), ("notes", False)):
        findings = [finding for finding in report.findings if finding.problem == problem]
        yield f"\n{title}:" + ("\n  none" if problem and not findings else "")
        for finding in findings:
            yield f"  {one_line(finding.sentence)}"
            yield from (f"    {one_line(' = '.join(paths[:4]))}" for paths in finding.paths[:SHOWN])
            if len(finding.paths) > SHOWN:
                yield f"    and {len(finding.paths) - SHOWN:,} more, which --json FILE lists"
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (report.mean, report.std))
    yield f"  The mean of the pixels is {mean}, their standard deviation {std}; training from scratch uses 0.5 and 0.5."


def _draw(file: Path, root: Path, report: Report, augment: Augmentation, size: int, resize: str) -> None:
    """Draws training images, each in three augmentations or in the three ways of resizing, then validation images."""
    import numpy as np

    from project.evaluation.figures import image_grid
    from project.evaluation.fonts import wrapped

    base = manifest.folder_of(root)
    images, titles = [], []
    ways = ("stretch", "crop", "pad") if resize == "all" else (resize,)
    for split, draws in (("train", 4 - len(ways)), ("val", 1)):
        augmentation = augment if split == "train" else AUGMENTATIONS["none"]
        rows = [row for row in report.rows if row.split == split and row.path not in report.leave_out]
        for number, row in enumerate(rows[:: -(-len(rows) // SHOWN) or 1]):
            for way, draw in product(ways, range(draws)):
                square = read(base / row.path, round(size * augmentation.margin), way)
                images.append(augmentation.apply(square, np.random.default_rng((0, draw, number)), size))
                titles.append(wrapped(f"{row.label}\n{Path(row.path).name}\n{split}, {way}", 19))
    if not images:
        print("There is no preview, because fit could not split the images.")
        return
    with files.replacing(file, "wb") as stream:
        image_grid(np.stack(images), titles, columns=6, side=1.5).savefig(stream, dpi=120, format="png")
    print(f"written: {file}")
