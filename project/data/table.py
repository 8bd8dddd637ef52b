"""Manifest: the rows of a data set, compact, and how they are kept from one start to the next."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from project import files
from project.data import rows
from project.data.rows import Array, Texts
from project.data.splits import SPLITS


@dataclass(frozen=True)
class Manifest:
    """What is in a data set, and which part of it is for what.

    Attributes:
        root: The folder that `paths` are relative to.
        paths: One POSIX path a row, in order.
        labels: (N,) int32, the row's index into `class_names`.
        splits: (N,) int8, the row's index into `SPLITS`.
        class_names: Sorted names of the training split's classes.
        groups: One name a row, of what must stay on one side of a split; None where there are no groups.
        notices: Sentences about what was left out, for the user.
    """

    root: Path
    paths: Texts
    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.int8]
    class_names: list[str]
    groups: Texts | None = None
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
        """One line: pictures, classes and the size of each split."""
        sizes = " / ".join(f"{name} {len(self.rows(name)):,}" for name in SPLITS)
        return f"{self.root}: {len(self.paths):,} pictures, {len(self.class_names)} classes, {sizes}"


def kept(file: Path) -> Manifest | None:
    """A kept manifest, mapped, if every folder and file that it was read from is as it was."""
    try:
        found = rows.load(file)
        header, arrays = found.header, found.arrays
        stamps = map(tuple, arrays["stamps"].tolist())
        if any(_stamp(place) != was for place, was in zip(header["read"], stamps, strict=True)):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return Manifest(
        root=Path(header["root"]),
        paths=found.texts("paths"),
        labels=arrays["labels"],
        splits=arrays["splits"],
        class_names=header["class_names"],
        groups=found.texts("groups") if "groups.ends" in arrays else None,
        notices=header["notices"],
    )


def keep(file: Path, manifest: Manifest, read: Sequence[str], started: int) -> Manifest:
    """Keeps a manifest.

    Args:
        file: Where.
        manifest: What.
        read: The folders and files that it was read from.
        started: When reading began, in nanoseconds since the epoch.

    Returns:
        The manifest, mapped from the file; as it is where it cannot be kept.
    """
    try:
        stamps = np.array([_stamp(place) for place in read], dtype=np.int64)
        # a change in the same tick of the file system's clock would go unseen: what is that new is read again
        if stamps[:, 0].max() > started - 2_000_000_000:
            return manifest
        texts = {"paths": manifest.paths} | ({"groups": manifest.groups} if manifest.groups else {})
        arrays: dict[str, Array] = {"labels": manifest.labels, "splits": manifest.splits, "stamps": stamps}
        for name, column in texts.items():
            arrays |= rows.as_arrays(name, column)
        header = {"class_names": manifest.class_names, "notices": manifest.notices, "read": list(read)}
        rows.save(file, header | {"root": str(manifest.root)}, arrays)
    except OSError:  # no room, or no permission: the next start reads the folders again
        return manifest
    return kept(file) or manifest


def _stamp(place: str) -> tuple[int, ...]:
    """What changes when an entry of a folder is added, removed or renamed, or a file is written."""
    status = os.stat(place)  # noqa: PTH116 (a million folders: no Path for each)
    return status.st_mtime_ns, status.st_ctime_ns, hash((status.st_ino, status.st_size))
