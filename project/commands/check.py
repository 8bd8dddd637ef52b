"""Checks a data set before training: python -m project.cli check photos/ --preview preview.png."""

import csv
import json
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from project import files
from project.data.check import Finding, Report, check_dataset
from project.data.images import RESIZERS, read
from project.data.transforms import AUGMENTATIONS, Augment

SHOWN, TABLE = 5, 30  # images of a finding, rows of the table of classes


def check(
    root: str,
    /,
    json: str | None = None,
    preview: str | None = None,
    quarantine: str | None = None,
    augment: Augment = "flip",
    image_size: PositiveInt = 224,
) -> int:
    """Decodes every image of a data set and reports what is wrong with it, worst first. Changes nothing.

    Exits with 0 if there are no problems, with 1 if there are.

    Args:
        root: The images: a folder or a CSV file, as fit takes them.
        json: Write everything into this file too; must not exist.
        preview: Draw into this PNG file what the network will see; must not exist.
        quarantine: Write the images to exclude into this CSV file, which fit --data.exclude takes; must not exist.
        augment: Augmentation of the preview.
        image_size: Side of the preview's images, in pixels.
    """
    from rich.console import Console
    from rich.progress import track

    for option, file in (("json", json), ("preview", preview), ("quarantine", quarantine)):
        if file is not None:
            files.require_new(Path(file), option)

    def progress(results: Any, total: int) -> Any:
        return track(results, "check", total, console=Console(stderr=True), transient=True)

    report = check_dataset(Path(root), progress)
    print("\n".join(_lines(root, report)))
    if json is not None:
        _write_json(Path(json), root, report)
    if quarantine is not None:
        with files.replacing(Path(quarantine)) as stream:
            csv.writer(stream).writerows([("path", "reason"), *sorted(report.leave_out.items())])
        print(f"written: {quarantine}, {len(report.leave_out):,} images; fit --data.exclude {quarantine}")
    if preview is not None:
        _draw(Path(preview), Path(root), report, augment, image_size)
    return int(any(finding.problem for finding in report.findings))


def _lines(root: str, report: Report) -> list[str]:
    counts = report.counts()
    width = max(map(len, [*counts, "class"]))
    names = sorted(counts, key=lambda name: sum(counts[name].values()))
    lines = [f"{root}: {len(report.rows):,} images, {len(counts)} classes", ""]
    if any(row.split for row in report.rows):
        lines.append(f"{'class':{width}}  {'train':>9}  {'val':>9}  {'test':>9}")
        lines += [
            f"{name:{width}}" + "".join(f"  {count:9,}" for count in counts[name].values()) for name in names[:TABLE]
        ]
        lines += [f"and {len(names) - TABLE:,} classes with more images"] if len(names) > TABLE else []
    for title, problem in (("problems", True), ("notes", False)):
        lines += ["", f"{title}:"]
        findings = [finding for finding in report.findings if finding.problem == problem]
        lines += [line for finding in findings for line in _described(finding)] or ["  none"]
    numbers = [" ".join(f"{value:.3f}" for value in values) for values in (report.mean, report.std)]
    lines.append(f"  mean of the pixels {numbers[0]}, standard deviation {numbers[1]}; in use from scratch: 0.5, 0.5")
    return lines


def _described(finding: Finding) -> list[str]:
    lines = [f"  {finding.sentence}"]
    lines += [f"    {' = '.join(paths[:4])}" for paths in finding.paths[:SHOWN]]
    more = len(finding.paths) - SHOWN
    return lines + ([f"    and {more:,} more; --json FILE lists all"] if more > 0 else [])


def _write_json(file: Path, root: str, report: Report) -> None:
    content = {
        "root": root,
        "images": len(report.rows),
        "classes": report.counts(),
        "mean": report.mean,
        "std": report.std,
        "findings": [vars(finding) for finding in report.findings],
        "leave_out": report.leave_out,
    }
    with files.replacing(file) as stream:
        json.dump(content, stream, indent=2)
    print(f"written: {file}")


def _draw(file: Path, root: Path, report: Report, augment: Augment, size: int) -> None:
    """Draws training images, three augmentations of each way of resizing, then validation images."""
    import numpy as np

    from project.evaluation.figures import image_grid

    base = root.parent if root.is_file() else root
    augmentation = AUGMENTATIONS[augment]
    images, titles = [], []
    for split, count in (("train", 5), ("val", 6)):
        rows = [row for row in report.rows if row.split == split and row.path not in report.leave_out]
        for number, row in enumerate(rows[:: max(1, len(rows) // count)][:count]):
            for resize in RESIZERS:
                if split == "val":
                    images.append(read(base / row.path, size, resize))
                    titles.append(f"val {resize}")
                    continue
                square = read(base / row.path, round(size * augmentation.margin), resize)
                for draw in range(3):
                    images.append(augmentation.apply(square, np.random.default_rng((0, draw, number)), size))
                    titles.append(f"{resize} {draw + 1}")
    if not images:
        print("no preview: the images have no split that fit could use")
        return
    with files.replacing_bytes(file) as stream:
        image_grid(np.stack(images), titles, columns=9).savefig(stream, dpi=120, format="png")
    print(f"written: {file}")
