"""Labels pictures with a checkpoint: python -m project.cli predict runs/digits/version_0 photos/ --out labels.csv."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from project import files, predictions
from project.data import folders, manifest
from project.errors import UserError


def predict(
    checkpoint: str,
    pictures: list[str],
    /,
    out: str = "predictions.csv",
    batch_size: int = 64,
    workers: int | None = None,
) -> int:
    """Labels pictures and writes one row for each, in the order given.

    An unreadable picture gets a row with its error.

    Args:
        checkpoint: A best.ckpt or last.ckpt, or a run's folder.
        pictures: Files, folders (all pictures in them and below), patterns like "photos/*.jpg", CSV files with a column
            path, and - for a list on standard input; in any mix.
        out: The CSV file to write; must not exist.
        batch_size: Pictures at a time.
        workers: Threads that read pictures; by default as many as there are cores.
    """
    target = Path(out)
    files.require_new(target, "out")
    paths = list(expand(pictures))
    for option, value, least in (("batch_size", batch_size, 1), ("workers", 1 if workers is None else workers, 1)):
        if value < least:
            raise UserError(f"--{option} is {value}; it must be at least {least}.")
    from project.predictor import load  # not before the arguments are known to be right

    predictor = load(checkpoint)
    counts = {"labelled": 0, "unreadable": 0}

    def counted() -> Iterable[predictions.Prediction]:
        from rich.console import Console
        from rich.progress import track

        stream = predictor.stream(paths, batch_size, workers)
        for prediction in track(stream, "predict", len(paths), console=Console(stderr=True), transient=True):
            counts["unreadable" if prediction.error else "labelled"] += 1
            yield prediction

    predictions.write(target, counted(), predictor.class_names)
    print(f"{counts['labelled']:,} pictures labelled, {counts['unreadable']:,} unreadable: {out}")
    return 0


def expand(pictures: Iterable[str]) -> Iterator[str]:
    """Yields the path of every picture that is meant, in the order given.

    Args:
        pictures: Files as they are; of folders, every picture below in order of name (hidden ones are passed over); of
            patterns like photos/*.jpg, what they match; of CSV files, the column path, relative to the file; of a
            dash, the lines of standard input.

    Raises:
        UserError: A name is none of these, or means no picture.
    """
    for name in pictures:
        if name == "-":
            yield from expand(line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif Path(name).is_dir():
            found = [str(Path(path)) for path in folders.pictures(name)]
            if not found:
                raise UserError(f"There are no pictures in {name}.")
            yield from found
        elif name.lower().endswith(".csv") and Path(name).exists():
            for row in manifest.read_csv(Path(name), {"path"}, folders.Findings(), tidy=True):
                yield os.path.normpath(Path(name).parent / row.path)
        elif os.path.lexists(name):  # a dangling link exists, and gets its error row
            yield name
        elif matched := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 (keeps the path as it was given)
            yield from expand(matched)
        else:
            raise UserError(f"There is no file or folder {name}, nor a match for it.")
