"""Decoded, resized pictures in one file: the second epoch reads at the speed of memory."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import PIL

from project import files
from project.data.images import Pixels, Resize
from project.data.rows import Texts

Choice = Literal["auto", "on", "off"]
FORMAT = 1  # of the file and of what `images.read` makes; another number makes the files anew


class Cache:
    """Pictures by row, filled as they are read, by any number of processes at once.

    A row is two numbers, stamp and checksum, and its pixels. It counts only if the stamp is that of the picture's file
    as it is now and the checksum that of the pixels. So a changed picture, a write that was killed half-way and two
    writers in one place are all the same: not there, read the picture.

    Read and written by file calls, not through a map: on a full disk these fail with an error, while touching a map of
    the unwritten part kills the process on some file systems (SIGBUS on tmpfs).

    Args:
        file: Made when the first row is written; the parts that are not written take no room.
        rows: How many rows there are.
        size: Side of the square pictures, in pixels.
    """

    def __init__(self, file: Path, rows: int, size: int) -> None:
        self.file, self.rows, self.size = file, rows, size
        self._row = 2 * 8 + size * size * 3
        self._off = False

    @property
    def bytes(self) -> int:
        """Size of the file when every row is in it."""
        return self.rows * self._row

    def get(self, row: int, stamp: int) -> Pixels | None:
        """The picture (size, size, 3), if it is there and made from the file of this `stamp`."""
        content = np.empty(self._row, dtype=np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as stream:  # noqa: PTH123 (a fifth of the time of Path.open)
                stream.seek(row * self._row)
                if stream.readinto(content.data) != self._row:
                    return None
        except OSError:  # nobody has written it yet
            return None
        head, pixels = content[:16].view(np.uint64).tolist(), content[16:].reshape(self.size, self.size, 3)
        return pixels if head == [stamp, checksum(pixels)] else None

    def put(self, row: int, stamp: int, pixels: Pixels) -> None:
        """Adds a picture; a disk that is full or cannot be written is said once, and the row stays out."""
        if self._off:
            return
        head = np.array([stamp, checksum(pixels)], dtype=np.uint64)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
            with self.file.open("rb+", buffering=0) as stream:
                stream.seek(row * self._row)
                stream.write(head.tobytes() + pixels.tobytes())
        except OSError as error:
            self._off = True
            self._say(error)

    def _say(self, error: OSError) -> None:
        told = self.file.with_suffix(".full")  # so that of many processes one says it
        try:
            told.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
        print(f"cache: {self.file}: {error.strerror or error}; going on without", flush=True)


def stamp(path: str) -> int:
    """Changes with the file, also when it is replaced by one of the same size and date; never 0, as an empty row is."""
    status = os.stat(path)  # noqa: PTH116 (a Path would take as long as the call)
    return hash((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)) % (1 << 64) or 1


def checksum(pixels: Pixels) -> int:
    """Sum of the bytes, eight at a time: 5 µs for a picture of 224 px; a row torn at any byte has another one."""
    flat = pixels.reshape(-1)
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    return (int(words.sum(dtype=np.uint64)) + int(flat[whole:].sum()) * 257 + 1) % (1 << 64)


def choose(
    choice: Choice, folder: Path, root: Path, paths: Texts, size: int, resize: Resize
) -> tuple[Cache | None, str]:
    """Decides whether to cache.

    Args:
        choice: `auto` caches where the whole fits into half of the free space.
        folder: Where caches lie.
        root: Folder that `paths` are relative to.
        paths: All rows of the data set.
        size: Side of the square pictures, in pixels.
        resize: How a picture becomes square.

    Returns:
        The cache, if any, and a sentence about it.
    """
    if choice == "off":
        return None, ""
    digest = hashlib.sha256(repr((FORMAT, PIL.__version__, str(root.resolve()))).encode("utf-8", "surrogateescape"))
    digest.update(paths.buffer.tobytes() + paths.ends.tobytes())
    file = folder / f"{digest.hexdigest()[:16]}-{size}-{resize}.pixels"
    cache = Cache(file, len(paths), size)
    there = getattr(file.stat(), "st_blocks", 0) * 512 if file.exists() else 0
    nearest = next(parent for parent in file.absolute().parents if parent.exists())
    free = shutil.disk_usage(nearest).free + there
    if choice == "auto" and cache.bytes > free / 2:
        need = f"{cache.bytes / 1e9:,.1f} GB, more than half of the {free / 1e9:,.1f} GB free"
        return None, f"cache: none, it would take {need} (--data.cache on would)"
    files.sweep(folder)
    with contextlib.suppress(OSError):  # a place that cannot be written is said when a row is
        file.with_suffix(".full").unlink()
    return cache, f"cache: {file}, {cache.bytes / 1e6:,.0f} MB when it is full"
