"""The images that command-line arguments mean: files, folders, patterns, CSV files, standard input."""

import glob
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from project.data import folders, manifest
from project.data.strings import StringArray
from project.errors import UserError

STREAM = "-"  # standard input


def gather(arguments: Iterable[str]) -> tuple[StringArray, Iterable[str]]:
    """Collects the images that `arguments` mean, and their true classes, in little memory.

    Args:
        arguments: As for `expand`.

    Returns:
        N paths, and N true classes, each empty where it is unknown.

    Raises:
        UserError: An argument is invalid, or no image is found.
    """
    positions: dict[str, int] = {}
    indices = array("l")

    def paths() -> Iterator[str]:
        for path, true in _expand(arguments):
            indices.append(positions.setdefault(true, len(positions)))
            yield path

    collected = StringArray.of(paths())
    if not collected:
        raise UserError(f"There are no images in {' '.join(arguments)}.")
    names = list(positions)
    return collected, (names[index] for index in indices)


def expand(arguments: Iterable[str]) -> Iterator[str]:
    """Yields the path of every image that the arguments mean, in their order, as it is found.

    Args:
        arguments: A file means itself; a folder, all images below it in order of name, without hidden ones; a pattern
            like photos/*.jpg, its matches; a CSV file, its column path, relative to the file; a dash, the lines of
            standard input.

    Raises:
        UserError: An argument is none of these, or means no image.
    """
    return (path for path, _ in _expand(arguments))


def _expand(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields paths and true classes."""
    for name in arguments:
        if name == STREAM:
            yield from _expand(line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(name):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
            images = iter(folders.images(name))
            first = next(images, None)
            if first is None:
                raise UserError(f"There are no images in {name}.")
            yield from ((str(Path(path)), "") for path in chain([first], images))
        elif name.lower().endswith(".csv") and os.path.exists(name):  # noqa: PTH110
            table = Path(name)
            label = "true" if "true" in manifest.column_names(table) else "label"  # beside true, label is a prediction
            for path, true in manifest.columns(table, ("path", label), {"path"}, tidy=True):
                yield os.path.normpath(table.parent / path), true
        elif os.path.lexists(name):  # a dangling link exists, and gets its error row
            yield name, ""
        elif matches := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 (keeps the path as given)
            yield from _expand(matches)
        else:
            raise UserError(f"There is no file or folder {name}, and no match for it.")
