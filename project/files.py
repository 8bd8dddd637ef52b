"""Files that appear whole or not at all, whenever the process is killed."""

import contextlib
import itertools
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from project.errors import UserError

_serial = itertools.count()


def beside(file: Path) -> Path:
    """A hidden name for the unfinished `file`, in its folder: a rename is atomic only within one file system.

    The name holds process and machine, by which leftovers of killed processes are recognised; they are removed here.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sweep(file.parent)
    return file.with_name(f".{file.name}.{os.getpid()}@{platform.node()}.{next(_serial)}.tmp")


def sweep(folder: Path, mine: bool = False) -> None:
    """Removes what killed processes have left unfinished in a folder.

    Args:
        folder: Its subfolders are left alone.
        mine: Remove all unfinished files, as nobody else may write here; otherwise those of this machine's processes
            that have ended.
    """
    for file in folder.glob(".*.tmp"):
        owner = re.search(r"\.(\d+)@(.+)\.\d+\.tmp$", file.name)
        if owner and (mine or (owner[2] == platform.node() and not _is_running(int(owner[1])))):
            with contextlib.suppress(OSError):  # another process may sweep, too
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _is_running(process: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere, signal 0 would end the process
            os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def require_new(file: Path, option: str, overwrite: bool | None = None) -> None:
    """Checks that an output file can be created and does not exist yet.

    Args:
        file: The output.
        option: Its name on the command line.
        overwrite: Whether an existing file may be replaced; None if the verb has no such option.

    Raises:
        UserError: The file exists or cannot be created.
    """
    folder = file.absolute().parent
    try:
        file.lstat()
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder} for --{option} {file}; make it first.") from None
    except OSError as error:
        raise UserError(f"Cannot write --{option} {file}: {error.strerror}; give another file.") from error
    else:
        if not overwrite:
            way_out = "remove it" if overwrite is None else "add --overwrite"
            raise UserError(f"{file} exists; give another file by --{option}, or {way_out}.")
        if not file.is_file():
            raise UserError(f"{file} is not a file, which --overwrite could replace; give another by --{option}.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write into {folder} for --{option} {file}; change its permissions.")


def replacing(file: Path) -> AbstractContextManager[TextIO]:
    """Opens a text file (UTF-8, line ends as given) that replaces `file` when the block ends without an error."""
    return _replacing(file, "w", encoding="utf-8", errors="surrogateescape", newline="")


def replacing_bytes(file: Path) -> AbstractContextManager[BinaryIO]:
    """Opens a binary file that replaces `file` when the block ends without an error."""
    return _replacing(file, "wb")


@contextmanager
def _replacing(file: Path, mode: str, **options: Any) -> Iterator[Any]:
    unfinished = beside(file)
    try:
        with unfinished.open(mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder for files that is renamed to `folder` when the block ends without an error."""
    unfinished = beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def folder_to_disk(folder: Path) -> None:
    """Returns when the names in a folder are on the disk; at once where the system cannot wait for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
