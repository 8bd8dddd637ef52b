"""Files that appear whole or not at all, whenever the process is killed."""

import contextlib
import itertools
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from project.errors import UserError

_serial = itertools.count()


def beside(file: Path) -> Path:
    """A name for the unfinished `file`, hidden and of its own, in the same folder.

    Beside its target, because a rename is atomic only within one file system. It names machine and process, so that
    `sweep` knows when nobody will finish it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f".{file.name}.{os.getpid()}@{platform.node()}.{next(_serial)}.tmp")


def sweep(folder: Path, mine: bool = False) -> None:
    """Removes what killed processes have left unfinished in a folder.

    Args:
        folder: Looked through, not the folders in it.
        mine: Nobody else may write here now, so that nothing unfinished will be finished; otherwise only what is of
            processes of this machine that have ended.
    """
    for file in folder.glob(".*.tmp"):
        owner = re.search(r"\.(\d+)@(.+)\.\d+\.tmp$", file.name)
        if owner and (mine or (owner[2] == platform.node() and not _runs(int(owner[1])))):
            with contextlib.suppress(OSError):  # another process sweeps too
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _runs(process: int) -> bool:
    if os.name != "posix":  # there, signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def require_new(file: Path, option: str, overwrite: bool | None = None) -> None:
    """Checks that an output file can be made and is not there yet.

    Args:
        file: The output.
        option: Its name on the command line.
        overwrite: One that is there may be replaced, if it is a file; None where the verb has no such option.

    Raises:
        UserError: It cannot, or it is.
    """
    folder = file.absolute().parent
    try:
        there = os.path.lexists(file)
        if not there:
            file.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"Cannot write --{option} {file}: {error.strerror}; give another file.") from error
    if there and overwrite and not file.is_file():
        raise UserError(f"{file} is not a file, which --overwrite could replace; give another by --{option}.")
    if there and not overwrite:
        way_out = "remove it" if overwrite is None else "add --overwrite"
        raise UserError(f"{file} exists; give another file by --{option}, or {way_out}.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} for --{option} {file}; make it first.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write into {folder} for --{option} {file}; change its permissions.")


def settle(unfinished: Path, file: Path) -> None:
    """Brings a finished file to the disk, then puts it in its target's place."""
    try:
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def folder_to_disk(folder: Path) -> None:
    """Returns when the names in a folder are on the disk; where that cannot be asked for, at once."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder for files, which gets its name when the block ends well; they are on the disk by then."""
    unfinished = beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        folder_to_disk(unfinished)
        unfinished.rename(folder)
        folder_to_disk(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _placed(file: Path) -> Iterator[Path]:
    unfinished = beside(file)
    try:
        yield unfinished
        settle(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
