"""A folder of pictures becomes rows of path, label and split."""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from project import files
from project.data.images import is_picture
from project.errors import UserError

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.1, 0.2
_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Manifest:
    """What is in a data set, and which part of it is for what.

    Attributes:
        root: The folder that `paths` are relative to.
        paths: One POSIX path a row.
        labels: (N,) int64, the row's index into `class_names`.
        splits: (N,) int8, the row's index into `SPLITS`.
        class_names: Sorted names of the training split's classes.
        notices: Sentences about what was left out, for the user.
    """

    root: Path
    paths: list[str]
    labels: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int8]
    class_names: list[str]
    notices: list[str] = field(default_factory=list)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Indices of one split's rows, in order of path."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def write_split(self, file: Path) -> None:
        """Writes path, label and split of every row as CSV; `load(split=file)` reads it back."""
        with files.replacing(file) as stream:
            writer = csv.writer(stream)
            writer.writerow(("path", "label", "split"))
            for path, label, split in zip(self.paths, self.labels, self.splits, strict=True):
                writer.writerow((path, self.class_names[label], SPLITS[split]))

    def summary(self) -> str:
        """One line: pictures, classes and the size of each split."""
        sizes = " / ".join(f"{name} {len(self.rows(name)):,}" for name in SPLITS)
        return f"{self.root}: {len(self.paths):,} pictures, {len(self.class_names)} classes, {sizes}"


def load(root: Path, split: Path | None = None, seed: int = 0) -> Manifest:
    """Reads a data set's rows.

    Args:
        root: `root/<class>/**.jpg`, split here into 70 % train, 10 % val and 20 % test; or
            `root/train|val|test/<class>/**.jpg` (`valid`, `validation` too), taken as it is.
        split: A split.csv of an earlier run; its rows are used as they are.
        seed: Decides which picture goes into which split.

    Raises:
        UserError: There is no such folder, no picture, a single class, a class with fewer than three pictures, or
            a class that one split has and another has not.
    """
    if not root.exists():
        raise UserError(f"There is no folder {root}; --data.root takes a folder of pictures, {root}/<class>/*.jpg.")
    if not root.is_dir():
        raise UserError(f"{root} is a file; --data.root takes a folder of pictures, <folder>/<class>/*.jpg.")
    found = _Findings()
    if split is not None:
        rows = _read_split(split)
        listed = {path for path, _, _ in rows}
        on_disk = {path for _, path in _walk(root, found)}
        found.notices = []
        if extra := len(on_disk - listed):
            found.say(f"{extra:,} pictures in {root} are not in {split}: left out")
        if missing := len(listed - on_disk):
            found.say(f"{missing:,} pictures of {split} are not in {root}")
    elif _is_split(root):
        rows = _split_by_folder(root, found, seed)
    else:
        by_class = _by_class(_walk(root, found))
        _require(by_class, 3, root)
        rows = split_by_quota(by_class, seed)
    return _manifest(root, sorted(rows), found)


Row = tuple[str, str, str]  # path, class name, split


class _Findings:
    """What a scan passes over, counted by kind, with the first few names."""

    def __init__(self) -> None:
        self.skipped: dict[str, list[str]] = defaultdict(list)
        self.notices: list[str] = []

    def skip(self, kind: str, path: str) -> None:
        self.skipped[kind].append(path)

    def say(self, sentence: str) -> None:
        self.notices.append(sentence)

    def sentences(self) -> list[str]:
        skipped = [
            f"left out, {kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            for kind, names in self.skipped.items()
        ]
        return self.notices + skipped


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}; change its permissions.") from error


def _walk(root: Path, found: _Findings, below: str = "") -> Iterable[tuple[str, str]]:
    """Yields (folder directly below `below`, path relative to `root`) of every picture; links are followed."""
    for entry in _entries(root / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            found.skip("hidden", path)
        elif not entry.is_dir():
            found.skip("not inside a class folder", path)
        else:
            count = 0
            for picture in _pictures(entry.path, path, found, frozenset()):
                count += 1
                yield entry.name, picture
            if not count:
                found.skip("folder without pictures", path)


def pictures(folder: str) -> Iterable[str]:
    """Yields the path of every picture in a folder and below it, in order of name; hidden ones are passed over."""
    return _pictures(folder, folder.rstrip("/"), _Findings(), frozenset())


def _pictures(folder: str, relative: str, found: _Findings, above: frozenset[str]) -> Iterable[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above itself
        return
    for entry in _entries(folder):
        path = f"{relative}/{entry.name}"
        if entry.name.startswith("."):
            found.skip("hidden", path)
        elif entry.is_dir():
            yield from _pictures(entry.path, path, found, above | {real})
        elif is_picture(entry.name):
            yield path
        else:
            found.skip("not a picture", path)


def _is_split(root: Path) -> bool:
    """Whether `root` holds train/<class>/ rather than a class that happens to be called "train"."""
    folders = {e.name.casefold(): e for e in _entries(root) if e.is_dir() and not e.name.startswith(".")}
    if "train" not in folders:
        if folders and folders.keys() <= _SPLIT_OF_FOLDER.keys():
            raise UserError(
                f"{root} has {', '.join(sorted(folders))} but no train; rename the training folder to train."
            )
        return False
    return any(entry.is_dir() for entry in _entries(folders["train"].path))


def _split_by_folder(root: Path, found: _Findings, seed: int) -> list[Row]:
    rows: list[Row] = []
    sources: dict[str, str] = {}
    for entry in _entries(root):
        split = _SPLIT_OF_FOLDER.get(entry.name.casefold())
        if split is None or not entry.is_dir():
            found.skip("hidden" if entry.name.startswith(".") else "not one of train, val, test", entry.name)
            continue
        if split in sources:
            raise UserError(f"{root} has both {sources[split]} and {entry.name}; keep one of them.")
        sources[split] = entry.name
        rows += [(path, label, split) for label, path in _walk(root, found, entry.name)]
    if "val" not in sources and rows:
        by_class = _by_class((label, path) for path, label, split in rows if split == "train")
        _require(by_class, 2, root)
        carved = {
            path for paths in by_class.values() for path in _ordered(paths, seed)[: _quota(len(paths), VAL_SHARE)]
        }
        rows = [(path, label, "val" if path in carved else split) for path, label, split in rows]
        found.say(f"{root} has no val: {len(carved):,} pictures of train are set aside for it")
    if "test" not in sources:
        found.say(f"{root} has no test: the run will have validation figures only")
    return rows


def split_by_quota(by_class: Mapping[str, list[str]], seed: int) -> list[Row]:
    """Deals each class's pictures out, 70 % train, 10 % val and 20 % test, at least one to each.

    Args:
        by_class: Paths of each class, at least three.
        seed: Decides which picture goes where.

    Returns:
        (path, class name, split) of every picture.
    """
    rows: list[Row] = []
    for label, paths in by_class.items():
        test = _quota(len(paths), TEST_SHARE)
        val = test + _quota(len(paths), VAL_SHARE)
        for place, path in enumerate(_ordered(paths, seed)):
            rows.append((path, label, "test" if place < test else "val" if place < val else "train"))
    return rows


def _by_class(pictures: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = defaultdict(list)
    for label, path in pictures:
        by_class[label].append(path)
    return by_class


def _quota(count: int, share: float) -> int:
    return max(1, round(count * share))


def _ordered(paths: list[str], seed: int) -> list[str]:
    """A shuffle that depends on nothing but the seed and the names: same on every machine and file system."""
    return sorted(paths, key=lambda path: hashlib.sha256(f"{seed}/{path}".encode("utf-8", "surrogateescape")).digest())


def _require(by_class: Mapping[str, list[str]], least: int, root: Path) -> None:
    few = [f"{label} ({len(paths)})" for label, paths in by_class.items() if len(paths) < least]
    if few:
        raise UserError(
            f"Too few pictures in {root} for a split: {', '.join(few)}; each class needs at least {least}. "
            "Add pictures, or remove the folder."
        )


def _read_split(file: Path) -> list[Row]:
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            reader = csv.DictReader(stream)
            if missing := {"path", "label", "split"} - set(reader.fieldnames or ()):
                raise UserError(f"{file} has no column {', '.join(sorted(missing))}; give the split.csv of a run.")
            rows = [(row["path"], row["label"], row["split"]) for row in reader]
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}; --data.split takes the split.csv of a run.") from error
    unknown = sorted({str(split) for _, _, split in rows} - set(SPLITS))
    if unknown:
        raise UserError(f"{file} has splits {', '.join(unknown)}; they must be {', '.join(SPLITS)}.")
    twice = [path for path, count in Counter(path for path, _, _ in rows).items() if count > 1]
    if twice:
        raise UserError(f"{file} lists {twice[0]} more than once; a picture belongs to one split.")
    return rows


def _manifest(root: Path, rows: list[Row], found: _Findings) -> Manifest:
    classes = {name: sorted({label for _, label, split in rows if split == name}) for name in SPLITS}
    names = classes["train"]
    if not rows:
        raise UserError(f"No pictures in {root}; expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.")
    if not names:
        raise UserError(f"No training pictures in {root}; expected {root}/train/<class>/*.jpg.")
    for split in ("val", "test"):
        if classes[split] and classes[split] != names:
            missing, extra = sorted(set(names) - set(classes[split])), sorted(set(classes[split]) - set(names))
            raise UserError(
                f"The classes of train and {split} differ in {root}: only in train: {', '.join(missing) or 'none'}; "
                f"only in {split}: {', '.join(extra) or 'none'}. Both need the same class folders, none empty."
            )
    if strange := [name for name in names if any("\udc80" <= letter <= "\udcff" for letter in name)]:
        raise UserError(f"The class folder {strange[0]!r} has a name that is not UTF-8; rename it.")
    if len(names) < 2:
        raise UserError(f"{root} has one class, {names[0]}; a classifier needs at least two class folders.")
    index = {name: number for number, name in enumerate(names)}
    return Manifest(
        root=root,
        paths=[path for path, _, _ in rows],
        labels=np.array([index[label] for _, label, _ in rows], dtype=np.int64),
        splits=np.array([SPLITS.index(split) for _, _, split in rows], dtype=np.int8),
        class_names=names,
        notices=found.sentences(),
    )
