"""Walks folders for images and lists what is skipped."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from project.data.images import is_image
from project.data.splits import Row
from project.errors import UserError

SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Skipped = defaultdict[str, list[str]]  # the paths that a scan leaves out, by the reason


def scan(root: Path, skipped: Skipped) -> Iterator[Row]:
    """Yields the images of root/train|val|test/<class>/, or else of root/<class>/; links are followed.

    Raises:
        UserError: A folder cannot be read, two are for the same split, or there is none for train beside val or test.
    """
    top = {e.name.casefold(): e for e in entries(root) if e.is_dir() and not e.name.startswith(".")}
    if top and "train" not in top and top.keys() <= SPLIT_OF_FOLDER.keys():
        raise UserError(f"{root} has {', '.join(sorted(top))} but no train; rename the training folder to train.")
    if "train" not in top or not any(entry.is_dir() for entry in entries(top["train"].path)):  # a class called "train"
        yield from _classes(root, "", "", skipped)
        return
    sources: dict[str, str] = {}
    for entry in entries(root):
        split = SPLIT_OF_FOLDER.get(entry.name.casefold())
        if split is None or not entry.is_dir():
            skipped["hidden" if entry.name.startswith(".") else "not one of train, val, test"].append(entry.name)
            continue
        if split in sources:
            raise UserError(f"{root} has both {sources[split]} and {entry.name}; keep one of them.")
        sources[split] = entry.name
        yield from _classes(root, f"{entry.name}/", split, skipped)


def _classes(root: Path, prefix: str, split: str, skipped: Skipped) -> Iterator[Row]:
    for entry in entries(root / prefix):
        path = prefix + entry.name
        if entry.name.startswith("."):
            skipped["hidden"].append(path)
        elif not entry.is_dir():
            skipped["not inside a class folder"].append(path)
        elif found := list(images(entry.path, path, skipped)):
            yield from (Row(image, entry.name, split) for image in found)
        else:
            skipped["folder without images"].append(path)


def images(folder: str, name: str, skipped: Skipped, parents: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the path of every image in a folder and below it, sorted by name; hidden ones are skipped.

    Args:
        folder: Where it is.
        name: What the paths begin with.
        skipped: Gets the paths of other files.
        parents: Folders above, which a link may lead back to.

    Raises:
        UserError: A folder cannot be read.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    for entry in entries(folder):
        path = f"{name}/{entry.name}"
        if entry.name.startswith("."):
            skipped["hidden"].append(path)
        elif entry.is_dir():
            yield from images(entry.path, path, skipped, parents | {real})
        elif is_image(entry.name):
            yield path
        else:
            skipped["not an image"].append(path)


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}; change its permissions.") from error
