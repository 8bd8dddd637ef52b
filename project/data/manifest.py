"""A folder or a table of images, CSV or Parquet, becomes rows of path, label, split and group."""

import contextlib
import csv
import io
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from project import files
from project.data import folders, shards, splits
from project.data.folders import SPLIT_OF_FOLDER, Layout, Skipped
from project.data.paths import Paths
from project.data.splits import SPLITS, Row
from project.errors import UserError, look_alike, some


@dataclass(frozen=True)
class Manifest:
    """The rows of a data set: images with labels and splits."""

    root: Path  # the folder that `paths` are relative to
    paths: Sequence[str]  # one POSIX path a row, in order
    labels: npt.NDArray[np.int32]  # (N,) the row's index into `class_names`
    splits: npt.NDArray[np.int8]  # (N,) the row's index into `SPLITS`
    class_names: list[str]  # sorted names of the training split's classes
    groups: list[str] = field(default_factory=list)  # a row each; a group must stay in one split. Empty without groups
    notices: list[str] = field(default_factory=list)  # sentences about what was left out, for the user
    is_stored: bool = False  # whether labels and splits are in the data set as they are here: shards

    @classmethod
    def of(cls, root: Path, rows: Sequence[Row]) -> "Manifest":
        """The data set of rows that all have a split, as `splits.assign` gives them one; UserError as by `load`."""
        return _manifest(root, sorted(rows), [], Skipped())

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Indices of one split's rows, in order of path."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def write_split(self, file: Path) -> None:
        """Writes path, label, split and, where there are groups, group of every row; `load(split=file)` reads it."""
        names = [self.class_names[label] for label in self.labels.tolist()]
        columns = {"path": self.paths, "label": names, "split": [SPLITS[split] for split in self.splits.tolist()]}
        columns |= {"group": self.groups} if self.groups else {}
        files.write_csv(file, [columns, *zip(*columns.values(), strict=True)])

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
    layout: Layout | None = None,
    keep: str = "",
) -> Manifest:
    """Reads a data set's rows. The arguments are those of `ImageData`, which describes them; `seed` is its split_seed.

    A root `root/<class>/**.jpg` is split here into 70 % train, 10 % val and 20 % test, or into folds;
    `root/train|val|test/<class>/**.jpg` (or other names in use) is taken as it is, as is the column split of a CSV
    file, whose paths are relative to it. UserError where there is no such folder, no image, a single class, a class
    with fewer than three images, or a class that one split has and another has not.
    """
    if (folds is None) != (fold is None):
        raise UserError("--data.folds, the number of parts, and --data.fold, the part to test on, need each other.")
    if folds is not None and fold is not None and not 0 <= fold < folds >= 2:
        raise UserError(f"There is no --data.fold {fold} of --data.folds {folds}: the first is 0, and 2 is the least.")
    if shards.is_shards(root) and (split, group, folds, exclude) == (None,) * 4:
        names, stored = shards.opened(root)
        return Manifest(root, Paths(stored["path"]), stored["label"], stored["split"], names, is_stored=True)
    skipped, notices = Skipped(keep), list[str]()
    rows = list(scan(root, skipped, layout if split is None else "classes"))  # the same paths
    if split is not None:
        found, rows = {row.path for row in rows}, read_rows(split, is_split_file=True)
        listed = {row.path for row in rows}
        skipped.clear()
        if extra := len(found - listed):
            notices.append(f"{extra:,} images in {root} are not in {split}: left out")
        if missing := len(listed - found):
            notices.append(f"{missing:,} images of {split} are not in {root}")
    for folder in skipped.get(folders.EMPTY, ()):
        if unread := [path for path in skipped.get(folders.UNREAD, ()) if path.startswith(f"{folder}/")]:
            raise UserError(f"No image in {folder} has a format that is read: {some(unread, 3)}; convert them to JPEG.")
    spelling = {normalize("NFC", row.label): row.label for row in rows if row.split in ("train", "")}
    again = sorted({row.label for row in rows if row.split in ("train", "")} - {*spelling.values()})
    notices += [f"{name!a} is read as {spelling[normalize('NFC', name)]!a}, which looks alike" for name in again]
    rows = [row._replace(label=spelling.get(normalize("NFC", row.label), row.label)) for row in rows]
    if group is not None:
        rows = _grouped(rows, group, notices)
    if exclude is not None:
        rows = _without(rows, exclude, root, notices)
    is_split = any(row.split for row in rows)
    if is_split and folds is not None:
        raise UserError(f"{split or root} is split already; folds need images without a split.")
    if not is_split:
        rows = splits.assign(rows, seed, folds, fold)
    elif split is None:
        rows = _completed(rows, root, seed, notices)
    sides = Counter(group for group, _ in dict.fromkeys((row.group, row.split) for row in rows))
    if several := [name for name, count in sides.items() if name and count > 1]:
        notices.append(
            f"{len(several):,} groups lie on both sides of a split ({some(several, 3)}): the figures of val and "
            "test will be better than on new groups"
        )
    if skipped.again:
        notices.append(f"through links, the same images are read twice: {some(skipped.again)}")
    for kind, paths in skipped.items():
        hint = "; --data.keep NAME reads folders of that name" if kind == folders.TOOL else ""
        notices.append(f"left out, {kind}: {some(paths, 3)}{hint}")
    return _manifest(root, sorted(rows), skipped.notices + notices, skipped)


def scan(root: Path, skipped: Skipped, layout: Layout | None = None) -> Iterator[Row]:
    """Yields the rows of a folder or CSV file, without a split where none is given; UserError if it cannot be read."""
    if shards.is_shards(root):
        yield from rows_of_shards(root)
    elif os.path.isdir(root):  # noqa: PTH112 (False for a name that is too long, too)
        yield from folders.scan(root, skipped, layout)
    elif files.is_table(root.name) and os.path.isfile(root):  # noqa: PTH113
        yield from read_rows(root)
    else:
        what = f"{root} is neither a folder nor a CSV file" if os.path.isfile(root) else f"There is no folder {root}"  # noqa: PTH113
        raise UserError(f"{what}; give a folder of images, <folder>/<class>/*.jpg, or a CSV file.")


def rows_of_shards(root: Path) -> Iterator[Row]:
    """The images in a folder of shards; UserError where it is not whole."""
    names, rows = shards.opened(root)
    for path, label, split, group in rows[["path", "label", "split", "group"]].tolist():
        yield Row(os.fsdecode(path), names[label], SPLITS[split], os.fsdecode(group))


def folder_of(root: Path) -> Path:
    """The folder that the paths of a data set are relative to."""
    return root.parent if root.is_file() else shards.local(root)


def read_rows(file: Path, is_split_file: bool = False) -> list[Row]:
    """The images that a CSV file lists, as `read_csv` reads it.

    Every row of a split file needs a split, and its names are taken as they are: `Manifest.write_split` wrote them.
    UserError as by `read_csv`, and where a path is listed twice.
    """
    rows, needed = list[Row](), {"path", "label"} | ({"split"} if is_split_file else set())
    for line in read_csv(file, needed, tidy=not is_split_file):
        split = folders.normalized(line.get("split", ""))
        if split and split not in SPLIT_OF_FOLDER:
            raise UserError(f"{file} has the split {split}; it must be one of {', '.join(SPLITS)}.")
        rows.append(Row(line["path"], line["label"], SPLIT_OF_FOLDER.get(split, ""), line.get("group", "")))
    if twice := [path for path, count in Counter(row.path for row in rows).items() if count > 1]:
        raise UserError(f"{file} lists {twice[0]} more than once; an image has one label and belongs to one split.")
    return rows


def read_csv(file: Path, needed: set[str], tidy: bool) -> Iterator[dict[str, str]]:
    """Yields the rows of a table by the names of its columns in lower case; an empty string for a missing value.

    The header may follow a byte order mark, and have the columns in any order; those `needed`, path among them, must be
    filled. `tidy` strips blanks, reads a backslash as a slash (a table from Windows) and shortens `a/./b` and `a/../b`.
    UserError where the file cannot be read or is not UTF-8, or a needed column or value is missing.
    """
    try:
        with _open(file) as stream:
            lines = csv.DictReader(stream, restval="", skipinitialspace=tidy)
            names = [name.strip().casefold() for name in lines.fieldnames or []]
            lines.fieldnames = names
            if "\0" in "".join(names):
                raise UnicodeError("UTF-16")
            if missing := sorted(needed - set(names)):
                what = f"{file} has no column {some(missing)}; it has {some(names) or 'nothing'}"
                raise UserError(f"{what}. Its first line must name the columns, with commas between: path,label")
            for line in lines:
                values = {name: line[name].strip() if tidy else line[name] for name in names}
                if empty := [name for name in sorted(needed) if not values[name]]:
                    raise UserError(f"{file}, line {lines.line_num}, has no {empty[0]}; fill it in.")
                if tidy:
                    values["path"] = posixpath.normpath(values["path"].replace("\\", "/"))
                    is_ours = {"probability", "error"} <= {*names}  # by predict, whose paths are as they were given
                    if is_ours:  # relative to the folder where predict ran, which usually is this one or above the file
                        above = (base / values["path"] for base in (Path(), *file.absolute().parents))
                        if found := next(filter(os.path.lexists, above), None):
                            values["path"] = os.path.relpath(found, file.parent)
                used = {"path", "label", "true"} & {*names} if tidy else ()
                bad = {name for name in used if re.search("[\udc80-\udcff]", values[name])}
                if bad - {"path"} or (bad and not os.path.lexists(file.parent / values["path"])):
                    raise UnicodeError("WINDOWS-1252")  # unless a program has listed paths of any bytes
                yield values
    except UnicodeError as error:
        way_out = f"save it as CSV UTF-8, or convert it: iconv -f {error} -t UTF-8 {file.name!r} > NEW.csv"
        raise UserError(f"The table {file} is not UTF-8; {way_out}") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"Cannot read {file}: {getattr(error, 'strerror', None) or error}.") from error


def _open(file: Path) -> TextIO:
    """A CSV file, or a Parquet file as one; columns of lists and the like are left out."""
    if file.suffix.lower() != ".parquet":
        return file.open(newline="", encoding="utf-8-sig", errors="surrogateescape")
    try:
        import pyarrow
        from pyarrow import csv as text
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file} needs the library pyarrow; install it: pip install -e .[parquet]") from error
    try:
        columns, content = {}, io.BytesIO()
        table = parquet.read_table(file)
        for name, column in zip(table.column_names, table.columns, strict=True):
            with contextlib.suppress(pyarrow.ArrowNotImplementedError):
                columns[name] = column.cast(pyarrow.string())
        text.write_csv(pyarrow.table(columns), content)
    except pyarrow.ArrowException as error:
        raise UserError(f"Cannot read {file}: {str(error).splitlines()[0]}.") from error
    return io.TextIOWrapper(io.BytesIO(content.getvalue()), "utf-8", newline="")


def _grouped(rows: list[Row], pattern: str, notices: list[str]) -> list[Row]:
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
        notices.append(f"--data.group matches {len(rows) - alone:,} paths; the other {alone:,} images stand alone")
    return [row._replace(group=group) for row, group in zip(rows, groups, strict=True)]


def _without(rows: list[Row], exclude: Path, root: Path, notices: list[str]) -> list[Row]:
    """Leaves out the images whose paths are listed, as they are or tidied, relative to the root or with it."""
    listed = {line["path"] for line in read_csv(exclude, {"path"}, tidy=False)}
    tidied = {posixpath.normpath(path.strip().replace("\\", "/")) for path in listed}
    base = folder_of(root)
    kept = [row for row in rows if not {row.path, posixpath.normpath(f"{base}/{row.path}")} & (listed | tidied)]
    notices.append(f"left out, listed in {exclude}: {len(rows) - len(kept):,} of {len(listed):,} paths")
    return kept


def _completed(rows: list[Row], root: Path, seed: int, notices: list[str]) -> list[Row]:
    """Sets images aside for validation if none are, where the data set has splits of its own."""
    if bare := [row.path for row in rows if not row.split]:
        given = len(rows) - len(bare)
        raise UserError(f"{root} has a split for {given:,} images but none for {bare[0]}; give it to all or none.")
    present = {row.split for row in rows}
    if "val" not in present and "train" in present:
        rows = splits.carve_val(rows, seed)
        carved = sum(row.split == "val" for row in rows)
        notices.append(f"{root} has no val: {carved:,} images of train are set aside for it")
    if "test" not in present:
        notices.append(f"{root} has no test: the run will have validation figures only")
    return rows


def _manifest(root: Path, rows: list[Row], notices: list[str], skipped: Skipped) -> Manifest:
    classes = {name: sorted({row.label for row in rows if row.split == name}) for name in SPLITS}
    names = classes["train"]
    if not names:
        raise folders.nothing_in(root, skipped, "training images" if rows else "images")
    for split in ("val", "test"):
        if classes[split] and classes[split] != names:
            missing, extra = sorted(set(names) - set(classes[split])), sorted(set(classes[split]) - set(names))
            sides = [f"only in {name}: {some(names)}" for name, names in (("train", missing), (split, extra)) if names]
            raise UserError(
                f"The classes of train and {split} differ in {root}: {'; '.join(sides)}. Both need the same class "
                f"folders, none empty.{look_alike(missing, extra)}"
            )
    if undecodable := [name for name in names if any("\udc80" <= letter <= "\udcff" for letter in name)]:
        raise UserError(f"The class folder {undecodable[0]!r} has a name that is not UTF-8; rename it.")
    if len(names) < 2:
        hint = f" If its folders are the classes or splits, give {root / names[0]}." if root.is_dir() else ""
        if loose := skipped[folders.LOOSE]:
            hint = f" {len(loose):,} images lie directly in {root}, without a class folder."
        raise UserError(f"{root} has one class, {names[0]}; a classifier needs at least two class folders.{hint}")
    index = {name: number for number, name in enumerate(names)}
    return Manifest(
        root=folder_of(root),
        paths=Paths.of(row.path for row in rows),
        labels=np.array([index[row.label] for row in rows], dtype=np.int32),
        splits=np.array([SPLITS.index(row.split) for row in rows], dtype=np.int8),
        class_names=names,
        groups=[row.group for row in rows] if any(row.group for row in rows) else [],
        notices=notices,
    )
