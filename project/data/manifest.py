"""A folder or a CSV file of images becomes rows of path, label, split and group."""

import csv
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import files
from project.data import folders, splits
from project.data.folders import SPLIT_OF_FOLDER, ScanLog
from project.data.splits import SPLITS, Row
from project.data.strings import StringArray
from project.errors import UserError


@dataclass(frozen=True)
class Manifest:
    """The rows of a data set: images with labels and splits.

    Attributes:
        root: The folder that `paths` are relative to.
        paths: One POSIX path a row, in order.
        labels: (N,) int32, the row's index into `class_names`.
        splits: (N,) int8, the row's index into `SPLITS`.
        class_names: Sorted names of the training split's classes.
        groups: One name a row; a group must stay in one split. None where there are no groups.
        notices: Sentences about what was left out, for the user.
    """

    root: Path
    paths: StringArray
    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.int8]
    class_names: list[str]
    groups: StringArray | None = None
    notices: list[str] = field(default_factory=list)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Indices of one split's rows, in order of path."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def write_split(self, file: Path) -> None:
        """Writes path, label, split and, where there are groups, group of every row; `load(split=file)` reads it."""
        with files.replacing(file) as stream:
            writer = csv.writer(stream)
            names = [self.class_names[label] for label in self.labels.tolist()]
            columns = [self.paths, names, [SPLITS[split] for split in self.splits.tolist()]]
            writer.writerow(("path", "label", "split", "group")[: 4 if self.groups else 3])
            writer.writerows(zip(*columns, *([self.groups] if self.groups else []), strict=True))

    def summary(self) -> str:
        """One line: images, classes and the size of each split."""
        sizes = " / ".join(f"{name} {len(self.rows(name)):,}" for name in SPLITS)
        return f"{self.root}: {len(self.paths):,} images, {len(self.class_names)} classes, {sizes}"


def load(
    root: Path,
    split: Path | None = None,
    seed: int = 0,
    *,
    group: str | None = None,
    folds: int | None = None,
    fold: int | None = None,
    exclude: Path | None = None,
) -> Manifest:
    """Reads a data set's rows.

    Args:
        root: `root/<class>/**.jpg`, split here into 70 % train, 10 % val and 20 % test; or
            `root/train|val|test/<class>/**.jpg` (`valid`, `validation` too), taken as it is; or a CSV file with the
            columns path (relative to the file) and label, and perhaps split and group.
        split: A split.csv of an earlier run; its rows are used as they are.
        seed: Decides which image goes into which split.
        group: Regular expression; images in whose path it matches the same text stay in one split.
        folds: Number of equal parts; see `splits.assign`.
        fold: Which of them is the test split, from 0.
        exclude: CSV file with a column path: rows to leave out.

    Raises:
        UserError: There is no such folder, no image, a single class, a class with fewer than three images, or a class
            that one split has and another has not; the sentence names it.
    """
    if (folds is None) != (fold is None) or (folds is not None and fold is not None and not 0 <= fold < folds >= 2):
        raise UserError(
            f"--data.folds is {folds} and --data.fold is {fold}; both are needed, two folds or more and a fold from 0."
        )
    if folds is not None and split is not None:
        raise UserError(
            f"--data.folds and the split file {split} exclude each other; add --data.split null, or leave --data.folds "
            "out."
        )
    log = ScanLog()
    rows = list(scan(root, log))
    if split is not None:
        rows = _as_listed(rows, split, root, log)
    if group is not None:
        rows = _grouped(rows, group, log)
    if exclude is not None:
        rows = _without(rows, exclude, root, log)
    if rows and split is None:
        rows = _split(rows, root, seed, folds, fold, log)
    _note_groups_in_several_splits(rows, log)
    return _manifest(root, sorted(rows), log)


def scan(root: Path, log: ScanLog) -> Iterable[Row]:
    """Yields the rows of a folder or CSV file as they are there: without a split where none is given.

    Raises:
        UserError: The folder or file does not exist or cannot be read.
    """
    if not os.path.exists(root):  # noqa: PTH110 (False for a name that is too long, too)
        raise UserError(f"There is no folder {root}; --data.root takes a folder of images, {root}/<class>/*.jpg.")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UserError(
                f"{root} is a file; --data.root takes a folder of images, <folder>/<class>/*.jpg, or a CSV file."
            )
        yield from read_csv(root, {"path", "label"}, tidy=True)
    elif folders.is_split(root):
        for path, label, split in folders.by_split(root, log):
            yield Row(path, label, split)
    else:
        for path, label in folders.by_class(root, log):
            yield Row(path, label)


def read_csv(file: Path, needed: set[str], tidy: bool = False) -> list[Row]:
    """Rows of a CSV file with the columns path, label, split and group, in any case and order, with or without a BOM.

    Args:
        file: Written by a person, by another program, or by `Manifest.write_split`.
        needed: Columns that must be there and filled.
        tidy: Strip blanks, read a backslash as a slash (a table from Windows) and shorten `a/./b` and `a/../b`; not
            for a file that this program wrote, where a name is as it is.

    Raises:
        UserError: The file cannot be read, a needed column or value is missing, or a path is listed twice.
    """
    rows = [Row._make(values) for values in columns(file, Row._fields, needed, tidy)]
    rows = [row._replace(split=_split_name(row.split.strip(), file)) for row in rows]
    twice = [path for path, count in Counter(row.path for row in rows).items() if count > 1]
    if twice and "label" in needed:
        raise UserError(f"{file} lists {twice[0]} more than once; an image has one label and belongs to one split.")
    return rows


def columns(file: Path, wanted: Sequence[str], needed: set[str], tidy: bool = False) -> Iterator[list[str]]:
    """Yields some columns of each row of a CSV file, read as it goes.

    Args:
        file: See `read_csv`.
        wanted: Names of columns, the first of which is a path; one that is missing is empty.
        needed: Columns that must be there and filled.
        tidy: See `read_csv`.

    Raises:
        UserError: The file cannot be read, or a needed column or value is missing.
    """
    with _opened(file, tidy) as (names, lines):
        if missing := needed - set(names):
            raise UserError(
                f"{file} has no column {', '.join(sorted(missing))}; it has {', '.join(names) or 'nothing'}."
            )
        indices = [names.index(name) if name in names else None for name in wanted]
        for line in filter(None, lines):
            values = [line[index] if index is not None and index < len(line) else "" for index in indices]
            values = _tidied(values) if tidy else values
            if empty := [name for name in sorted(needed) if not values[wanted.index(name)]]:
                raise UserError(f"{file}, line {lines.line_num}, has no {empty[0]}; fill it in.")
            yield values


def column_names(file: Path) -> list[str]:
    """Names of a CSV file's columns, in lower case.

    Raises:
        UserError: The file cannot be read.
    """
    with _opened(file, tidy=True) as (names, _):
        return names


@contextmanager
def _opened(file: Path, tidy: bool) -> Iterator[tuple[list[str], Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            lines = csv.reader(stream, skipinitialspace=tidy)
            yield [name.strip().casefold() for name in next(lines, [])], lines
    except (OSError, csv.Error) as error:
        raise UserError(f"Cannot read {file}: {getattr(error, 'strerror', None) or error}.") from error


def _tidied(values: Sequence[str]) -> list[str]:
    path, *others = (value.strip() for value in values)
    return [posixpath.normpath(path.replace("\\", "/")) if path else "", *others]


def _split_name(name: str, file: Path) -> str:
    if name and name.casefold() not in SPLIT_OF_FOLDER:
        raise UserError(f"{file} has the split {name}; it must be one of {', '.join(SPLITS)}.")
    return SPLIT_OF_FOLDER.get(name.casefold(), "")


def _grouped(rows: list[Row], pattern: str, log: ScanLog) -> list[Row]:
    """Sets each row's group to what the pattern's first parentheses, or else all of it, match in the path."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--data.group {pattern} is no regular expression: {error}.") from error
    matches = [expression.search(row.path) for row in rows]
    groups = [(match and (match[1] if expression.groups else match[0])) or "" for match in matches]
    alone = groups.count("")
    if rows and alone == len(rows):
        raise UserError(f"--data.group {pattern} matches none of the paths; the first is {rows[0].path}.")
    if alone:
        log.notices.append(f"--data.group matches {len(rows) - alone:,} paths; the other {alone:,} images stand alone")
    return [row._replace(group=group) for row, group in zip(rows, groups, strict=True)]


def _without(rows: list[Row], exclude: Path, root: Path, log: ScanLog) -> list[Row]:
    listed = read_csv(exclude, {"path"})
    excluded = {row.path for row in listed} | {_tidied(row)[0] for row in listed}
    base = root.parent if root.is_file() else root
    kept = [row for row in rows if not {row.path, posixpath.normpath(f"{base}/{row.path}")} & excluded]
    log.notices.append(f"left out, listed in {exclude}: {len(rows) - len(kept):,} of {len(listed):,} paths")
    return kept


def _as_listed(rows: list[Row], split: Path, root: Path, log: ScanLog) -> list[Row]:
    listed = read_csv(split, {"path", "label", "split"})
    there, wanted = {row.path for row in rows}, {row.path for row in listed}
    log.notices, log.skipped = [], {}
    if extra := len(there - wanted):
        log.notices.append(f"{extra:,} images in {root} are not in {split}: left out")
    if missing := len(wanted - there):
        log.notices.append(f"{missing:,} images of {split} are not in {root}")
    return listed


def _split(rows: list[Row], root: Path, seed: int, folds: int | None, fold: int | None, log: ScanLog) -> list[Row]:
    with_split = sum(bool(row.split) for row in rows)
    if not with_split:
        return splits.assign(rows, seed, folds, fold)
    if folds is not None:
        raise UserError(f"{root} is split already; --data.folds needs a folder or file without splits.")
    if with_split < len(rows):
        bare = next(row.path for row in rows if not row.split)
        raise UserError(f"{root} has a split for {with_split:,} images but none for {bare}; give it to all or none.")
    present = {row.split for row in rows}
    if "val" not in present and "train" in present:
        rows = splits.carve_val(rows, seed)
        carved = sum(row.split == "val" for row in rows)
        log.notices.append(f"{root} has no val: {carved:,} images of train are set aside for it")
    if "test" not in present:
        log.notices.append(f"{root} has no test: the run will have validation figures only")
    return rows


def _note_groups_in_several_splits(rows: list[Row], log: ScanLog) -> None:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.group:
            found.setdefault(row.group, set()).add(row.split)
    if several := [group for group, names in found.items() if len(names) > 1]:
        log.notices.append(
            f"{len(several):,} groups lie on both sides of a split ({', '.join(several[:3])}): the figures of val and "
            "test will be better than on new groups"
        )


def _manifest(root: Path, rows: list[Row], log: ScanLog) -> Manifest:
    classes = {name: sorted({row.label for row in rows if row.split == name}) for name in SPLITS}
    names = classes["train"]
    if not rows:
        raise UserError(f"No images in {root}; expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.")
    if not names:
        raise UserError(f"No training images in {root}; expected {root}/train/<class>/*.jpg.")
    for split in ("val", "test"):
        if classes[split] and classes[split] != names:
            missing, extra = sorted(set(names) - set(classes[split])), sorted(set(classes[split]) - set(names))
            raise UserError(
                f"The classes of train and {split} differ in {root}: only in train: {', '.join(missing) or 'none'}; "
                f"only in {split}: {', '.join(extra) or 'none'}. Both need the same class folders, none empty."
            )
    if undecodable := [name for name in names if any("\udc80" <= letter <= "\udcff" for letter in name)]:
        raise UserError(f"The class folder {undecodable[0]!r} has a name that is not UTF-8; rename it.")
    if len(names) < 2:
        raise UserError(f"{root} has one class, {names[0]}; a classifier needs at least two class folders.")
    index = {name: number for number, name in enumerate(names)}
    return Manifest(
        root=root.parent if root.is_file() else root,
        paths=StringArray.of(row.path for row in rows),
        labels=np.array([index[row.label] for row in rows], dtype=np.int32),
        splits=np.array([SPLITS.index(row.split) for row in rows], dtype=np.int8),
        class_names=names,
        groups=StringArray.of(row.group for row in rows) if any(row.group for row in rows) else None,
        notices=log.sentences(),
    )
