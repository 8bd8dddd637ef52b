"""A folder or a CSV file of pictures becomes rows of path, label, split and group."""

import csv
import hashlib
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project.data import folders, splits, table
from project.data.folders import SPLIT_OF_FOLDER, Findings
from project.data.rows import Texts
from project.data.splits import SPLITS, Row
from project.data.table import Manifest
from project.errors import UserError

CACHE = Path("data/cache")  # what can be made again; `make clean-cache` removes it
FORMAT = 1  # of the kept manifests; another number makes them anew


@dataclass(frozen=True)
class Source:
    """What `load` is asked for."""

    root: Path
    split: Path | None = None
    seed: int = 0
    group: str | None = None
    folds: int | None = None
    fold: int | None = None
    exclude: Path | None = None


def load(
    root: Path,
    split: Path | None = None,
    seed: int = 0,
    *,
    group: str | None = None,
    folds: int | None = None,
    fold: int | None = None,
    exclude: Path | None = None,
    keep: bool = False,
) -> Manifest:
    """Reads a data set's rows.

    Args:
        root: `root/<class>/**.jpg`, split here into 70 % train, 10 % val and 20 % test; or
            `root/train|val|test/<class>/**.jpg` (`valid`, `validation` too), taken as it is; or a CSV file with the
            columns path (relative to the file) and label, and perhaps split and group.
        split: A split.csv of an earlier run; its rows are used as they are.
        seed: Decides which picture goes into which split.
        group: Regular expression; what it matches in a path stays in one split.
        folds: Number of equal parts; see `splits.assign`.
        fold: Which of them is the test split, from 0.
        exclude: CSV file with a column path: rows to leave out.
        keep: Keep the rows in `CACHE`, and take them from there while no folder or file that was read has changed.

    Raises:
        UserError: There is no such folder, no picture, a single class, a class with fewer than three pictures, or
            a class that one split has and another has not; the sentence says which.
    """
    source = Source(root, split, seed, group, folds, fold, exclude)
    if not keep:
        return _read(source, Findings())
    question = repr([FORMAT, str(root.resolve()), source]).encode("utf-8", "surrogateescape")
    file = CACHE / f"{hashlib.sha256(question).hexdigest()[:16]}.rows"
    if kept := table.kept(file):
        return kept
    started, found = time.time_ns(), Findings()
    made = _read(source, found)
    return table.keep(file, made, found.read, started)


def _read(source: Source, found: Findings) -> Manifest:
    folds, fold = source.folds, source.fold
    if (folds is None) != (fold is None) or (folds is not None and fold is not None and not 0 <= fold < folds >= 2):
        raise UserError(
            f"--data.folds is {folds} and --data.fold is {fold}; both are needed, two folds or more and a fold from 0."
        )
    if folds is not None and source.split is not None:
        raise UserError(
            f"--data.folds and the split file {source.split} exclude each other; add --data.split null, or leave "
            "--data.folds out."
        )
    read = list(scan(source.root, found))
    if source.split is not None:
        read = _as_listed(read, source.split, source.root, found)
    if source.group is not None:
        read = _grouped(read, source.group, found)
    if source.exclude is not None:
        read = _excluded(read, source, found)
    if read and source.split is None:
        read = _split(read, source, found)
    _say_groups_on_both_sides(read, found)
    return _manifest(source.root, sorted(read), found)


def scan(root: Path, found: Findings) -> Iterable[Row]:
    """The rows of a folder or CSV file as they stand there: without a split where none is given.

    Raises:
        UserError: There is no such folder or file, or it cannot be read.
    """
    if not os.path.exists(root):  # noqa: PTH110 (False for a name that is too long, too)
        raise UserError(f"There is no folder {root}; --data.root takes a folder of pictures, {root}/<class>/*.jpg.")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UserError(
                f"{root} is a file; --data.root takes a folder of pictures, <folder>/<class>/*.jpg, or a CSV file."
            )
        yield from read_csv(root, {"path", "label"}, found, tidy=True)
    elif folders.is_split(root):
        for path, label, split in folders.by_split(root, found):
            yield Row(path, label, split)
    else:
        for path, label in folders.by_class(root, found):
            yield Row(path, label)


def read_csv(file: Path, needed: set[str], found: Findings, tidy: bool = False) -> list[Row]:
    """Rows of a CSV file with the columns path, label, split and group, in any case and order, BOM or not.

    Args:
        file: Written by a person, by a program, or by `Manifest.write_split`.
        needed: Columns that must be there and filled.
        found: Is told that the file was read.
        tidy: Take blanks off the ends, read a backslash as a slash (a table from Windows) and shorten `a/./b` and
            `a/../b`; not in a file that this program wrote, where a name is as it is.

    Raises:
        UserError: It cannot be read, a needed column or value is missing, or a path comes twice.
    """
    found.read.append(str(file))
    rows = map(Row._make, columns(file, Row._fields, needed, tidy))
    read = [row._replace(split=_split_name(row.split.strip(), file)) for row in rows]
    twice = [path for path, count in Counter(row.path for row in read).items() if count > 1]
    if twice and "label" in needed:
        raise UserError(f"{file} lists {twice[0]} more than once; a picture has one label and belongs to one split.")
    return read


def columns(file: Path, wanted: Sequence[str], needed: set[str], tidy: bool = False) -> Iterator[list[str]]:
    """Yields some columns of each row of a CSV file; see `read_csv`.

    Args:
        file: Is read as far as it is asked for.
        wanted: Names of columns, the first of which is a path; one that is not there is empty.
        needed: Those that must be there and filled.
        tidy: As for `read_csv`.

    Raises:
        UserError: It cannot be read, or a needed column or value is missing.
    """
    with _opened(file, tidy) as (names, lines):
        if missing := needed - set(names):
            raise UserError(
                f"{file} has no column {', '.join(sorted(missing))}; it has {', '.join(names) or 'nothing'}."
            )
        places = [names.index(name) if name in names else None for name in wanted]
        for line in lines:
            if line:
                values = ["" if p is None or p >= len(line) else line[p] for p in places]
                values = _tidied(values) if tidy else values
                if lacking := [name for name in sorted(needed) if not values[wanted.index(name)]]:
                    raise UserError(f"{file}, line {lines.line_num}, has no {lacking[0]}; fill it in.")
                yield values


def column_names(file: Path) -> list[str]:
    """Names of a CSV file's columns, in lower case.

    Raises:
        UserError: It cannot be read.
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


def _grouped(read: list[Row], pattern: str, found: Findings) -> list[Row]:
    """The part of the path that the pattern's first parentheses, or all of it, match is the group."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--data.group {pattern} is no regular expression: {error}.") from error
    matches = [expression.search(row.path) for row in read]
    texts = [(match and (match[1] if expression.groups else match[0])) or "" for match in matches]
    alone = texts.count("")
    if read and alone == len(read):
        raise UserError(f"--data.group {pattern} matches none of the paths; the first is {read[0].path}.")
    if alone:
        found.say(f"--data.group matches {len(read) - alone:,} paths; the other {alone:,} pictures stand alone")
    return [row._replace(group=text) for row, text in zip(read, texts, strict=True)]


def _excluded(read: list[Row], source: Source, found: Findings) -> list[Row]:
    assert source.exclude is not None
    listed = read_csv(source.exclude, {"path"}, found)
    unwanted = {row.path for row in listed} | {_tidied(row)[0] for row in listed}
    base = source.root.parent if source.root.is_file() else source.root
    kept = [row for row in read if not {row.path, posixpath.normpath(f"{base}/{row.path}")} & unwanted]
    found.say(f"left out, listed in {source.exclude}: {len(read) - len(kept):,} of {len(listed):,} paths")
    return kept


def _as_listed(read: list[Row], split: Path, root: Path, found: Findings) -> list[Row]:
    listed = read_csv(split, {"path", "label", "split"}, found)
    there, wanted = {row.path for row in read}, {row.path for row in listed}
    found.notices, found.skipped = [], {}
    if extra := len(there - wanted):
        found.say(f"{extra:,} pictures in {root} are not in {split}: left out")
    if missing := len(wanted - there):
        found.say(f"{missing:,} pictures of {split} are not in {root}")
    return listed


def _split(read: list[Row], source: Source, found: Findings) -> list[Row]:
    root = source.root
    with_split = sum(bool(row.split) for row in read)
    if not with_split:
        return splits.assign(read, source.seed, source.folds, source.fold)
    if source.folds is not None:
        raise UserError(f"{root} is split already; --data.folds needs a folder or file without splits.")
    if with_split < len(read):
        bare = next(row.path for row in read if not row.split)
        raise UserError(f"{root} has a split for {with_split:,} pictures but none for {bare}; give it to all or none.")
    present = {row.split for row in read}
    if "val" not in present and "train" in present:
        read = splits.carve_val(read, source.seed)
        carved = sum(row.split == "val" for row in read)
        found.say(f"{root} has no val: {carved:,} pictures of train are set aside for it")
    if "test" not in present:
        found.say(f"{root} has no test: the run will have validation figures only")
    return read


def _say_groups_on_both_sides(read: list[Row], found: Findings) -> None:
    sides: dict[str, set[str]] = {}
    for row in read:
        if row.group:
            sides.setdefault(row.group, set()).add(row.split)
    if both := [group for group, names in sides.items() if len(names) > 1]:
        found.say(
            f"{len(both):,} groups lie on both sides of a split ({', '.join(both[:3])}): the figures of val and test "
            "will be better than on new groups"
        )


def _manifest(root: Path, read: list[Row], found: Findings) -> Manifest:
    classes = {name: sorted({row.label for row in read if row.split == name}) for name in SPLITS}
    names = classes["train"]
    if not read:
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
        root=root.parent if root.is_file() else root,
        paths=Texts.of(row.path for row in read),
        labels=np.array([index[row.label] for row in read], dtype=np.int32),
        splits=np.array([SPLITS.index(row.split) for row in read], dtype=np.int8),
        class_names=names,
        groups=Texts.of(row.group for row in read) if any(row.group for row in read) else None,
        notices=found.sentences(),
    )
