"""Walks folders for images and logs what is skipped."""

import os
from collections.abc import Iterable
from pathlib import Path

from project.data.images import is_image
from project.errors import UserError

SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXAMPLES = 20


class ScanLog:
    """What a scan skips, counted by kind with some names, and further notices for the user."""

    def __init__(self) -> None:
        self.skipped: dict[str, tuple[int, list[str]]] = {}
        self.notices: list[str] = []

    def skip(self, kind: str, path: str) -> None:
        count, names = self.skipped.get(kind, (0, []))
        self.skipped[kind] = (count + 1, names if count >= EXAMPLES else [*names, path])

    def sentences(self) -> list[str]:
        return self.notices + [
            f"left out, {kind}: {', '.join(names[:3])}" + (f" and {count - 3:,} more" if count > 3 else "")
            for kind, (count, names) in self.skipped.items()
        ]


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


def by_class(root: Path, log: ScanLog, below: str = "") -> Iterable[tuple[str, str]]:
    """Yields (path relative to `root`, folder directly below `below`) of every image; links are followed."""
    for entry in entries(root / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            log.skip("hidden", path)
        elif not entry.is_dir():
            log.skip("not inside a class folder", path)
        else:
            is_empty = True
            for image in _images(entry.path, path, log, frozenset()):
                is_empty = False
                yield image, entry.name
            if is_empty:
                log.skip("folder without images", path)


def images(folder: str) -> Iterable[str]:
    """Yields the path of every image in a folder and below it, sorted by name; hidden ones are skipped."""
    return _images(folder, folder.rstrip("/"), ScanLog(), frozenset())


def _images(folder: str, relative: str, log: ScanLog, parents: frozenset[str]) -> Iterable[str]:
    real = os.path.realpath(folder)
    if real in parents:  # a link to a folder above itself
        return
    for entry in entries(folder):
        path = f"{relative}/{entry.name}"
        if entry.name.startswith("."):
            log.skip("hidden", path)
        elif entry.is_dir():
            yield from _images(entry.path, path, log, parents | {real})
        elif is_image(entry.name):
            yield path
        else:
            log.skip("not an image", path)


def is_split(root: Path) -> bool:
    """Whether `root` holds train/<class>/ rather than a class that happens to be called "train".

    Raises:
        UserError: There is a folder val or test but none for train.
    """
    folders = {e.name.casefold(): e for e in entries(root) if e.is_dir() and not e.name.startswith(".")}
    if "train" in folders:
        return any(entry.is_dir() for entry in entries(folders["train"].path))
    if folders and folders.keys() <= SPLIT_OF_FOLDER.keys():
        raise UserError(f"{root} has {', '.join(sorted(folders))} but no train; rename the training folder to train.")
    return False


def by_split(root: Path, log: ScanLog) -> Iterable[tuple[str, str, str]]:
    """Yields (path relative to `root`, class, split) of every image of root/train|val|test/<class>/.

    Raises:
        UserError: Two folders are for the same split.
    """
    sources: dict[str, str] = {}
    for entry in entries(root):
        split = SPLIT_OF_FOLDER.get(entry.name.casefold())
        if split is None or not entry.is_dir():
            log.skip("hidden" if entry.name.startswith(".") else "not one of train, val, test", entry.name)
            continue
        if split in sources:
            raise UserError(f"{root} has both {sources[split]} and {entry.name}; keep one of them.")
        sources[split] = entry.name
        for path, label in by_class(root, log, entry.name):
            yield path, label, split
