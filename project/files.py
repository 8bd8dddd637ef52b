"""Files that appear whole or not at all, whenever the process is killed."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

_serial = itertools.count()


def beside(file: Path) -> Path:
    """A name for the unfinished `file`, hidden and of its own, in the same folder.

    Beside its target, because a rename is atomic only within one file system.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f".{file.name}.{os.getpid()}-{next(_serial)}.tmp")


def settle(unfinished: Path, file: Path) -> None:
    """Brings a finished file to the disk, then puts it in its target's place."""
    try:
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """Opens a text file (UTF-8, line ends as given) that takes `file`'s place when the block ends well."""
    with _placed(file) as unfinished, unfinished.open("w", encoding="utf-8", errors="surrogateescape", newline="") as f:
        yield f


@contextmanager
def replacing_bytes(file: Path) -> Iterator[BinaryIO]:
    """Likewise, for bytes."""
    with _placed(file) as unfinished, unfinished.open("wb") as stream:
        yield stream


@contextmanager
def _placed(file: Path) -> Iterator[Path]:
    unfinished = beside(file)
    try:
        yield unfinished
        settle(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
