"""Walks folders for pictures, and keeps account of what it passes over and which folders it has read."""

import os
from collections.abc import Iterable
from pathlib import Path

from project.data.images import is_picture
from project.errors import UserError

SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXAMPLES = 20


class Findings:
    """What a reader passes over, counted by kind with some names; what else it has to say; which places it read."""

    def __init__(self) -> None:
        self.skipped: dict[str, tuple[int, list[str]]] = {}
        self.notices: list[str] = []
        self.read: list[str] = []  # folders and files: the rows are as they were while these stay as they are

    def skip(self, kind: str, path: str) -> None:
        """Counts one that is passed over."""
        count, names = self.skipped.get(kind, (0, []))
        self.skipped[kind] = (count + 1, names if count >= EXAMPLES else [*names, path])

    def say(self, sentence: str) -> None:
        """Keeps a sentence for the user."""
        self.notices.append(sentence)

    def sentences(self) -> list[str]:
        """Everything for the user, a sentence each."""
        return self.notices + [
            f"left out, {kind}: {', '.join(names[:3])}" + (f" and {count - 3:,} more" if count > 3 else "")
            for kind, (count, names) in self.skipped.items()
        ]


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in order of name.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}; change its permissions.") from error


def by_class(root: Path, found: Findings, below: str = "") -> Iterable[tuple[str, str]]:
    """Yields (path relative to `root`, folder directly below `below`) of every picture; links are followed."""
    found.read.append(str(root / below))
    for entry in entries(root / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            found.skip("hidden", path)
        elif not entry.is_dir():
            found.skip("not inside a class folder", path)
        else:
            count = 0
            for picture in _pictures(entry.path, path, found, frozenset()):
                count += 1
                yield picture, entry.name
            if not count:
                found.skip("folder without pictures", path)


def pictures(folder: str) -> Iterable[str]:
    """Yields the path of every picture in a folder and below it, in order of name; hidden ones are passed over."""
    return _pictures(folder, folder.rstrip("/"), Findings(), frozenset())


def _pictures(folder: str, relative: str, found: Findings, above: frozenset[str]) -> Iterable[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above itself
        return
    found.read.append(folder)
    for entry in entries(folder):
        path = f"{relative}/{entry.name}"
        if entry.name.startswith("."):
            found.skip("hidden", path)
        elif entry.is_dir():
            yield from _pictures(entry.path, path, found, above | {real})
        elif is_picture(entry.name):
            yield path
        else:
            found.skip("not a picture", path)


def is_split(root: Path) -> bool:
    """Whether `root` holds train/<class>/ rather than a class that happens to be called "train".

    Raises:
        UserError: It has val or test but no train.
    """
    folders = {e.name.casefold(): e for e in entries(root) if e.is_dir() and not e.name.startswith(".")}
    if "train" not in folders:
        if folders and folders.keys() <= SPLIT_OF_FOLDER.keys():
            raise UserError(
                f"{root} has {', '.join(sorted(folders))} but no train; rename the training folder to train."
            )
        return False
    return any(entry.is_dir() for entry in entries(folders["train"].path))


def by_split(root: Path, found: Findings) -> Iterable[tuple[str, str, str]]:
    """Yields (path relative to `root`, class, split) of every picture of root/train|val|test/<class>/.

    Raises:
        UserError: Two folders are for the same split.
    """
    found.read.append(str(root))
    sources: dict[str, str] = {}
    for entry in entries(root):
        split = SPLIT_OF_FOLDER.get(entry.name.casefold())
        if split is None or not entry.is_dir():
            found.skip("hidden" if entry.name.startswith(".") else "not one of train, val, test", entry.name)
            continue
        if split in sources:
            raise UserError(f"{root} has both {sources[split]} and {entry.name}; keep one of them.")
        sources[split] = entry.name
        for path, label in by_class(root, found, entry.name):
            yield path, label, split
