"""Decoded, resized pictures in one memory-mapped file: the second epoch reads at the speed of memory."""

import hashlib
import mmap
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL

from project.data.images import Pixels, Resize
from project.data.rows import Texts

Choice = Literal["auto", "on", "off"]
FORMAT = 1  # of the file and of what `images.read` makes; another number makes the files anew
INDEX_ENTRY = 16  # stamp and checksum, 8 bytes each


class Cache:
    """Pictures by row, filled as they are read, by any number of processes at once.

    A row is two numbers, stamp and checksum, and its pixels. The pixels are written first; a row counts only if its
    stamp is that of the picture's file as it is now and its checksum that of the pixels. So a changed picture, a
    write that was killed half-way and two writers in one place are all the same: not there, read the picture. Writes go
    through the file rather than the map: on a full disk they fail with an error, where a map would kill the process.

    Args:
        file: Made when the first row is written.
        rows: How many rows there are.
        size: Side of the square pictures, in pixels.
    """

    def __init__(self, file: Path, rows: int, size: int) -> None:
        self.file, self.rows, self.size = file, rows, size
        self.start = -(-rows * INDEX_ENTRY // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._index: npt.NDArray[np.uint64] | None = None
        self._full = False

    @property
    def bytes(self) -> int:
        """Size of the file when every row is in it."""
        return self.start + self.rows * self.size * self.size * 3

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.file, self.rows, self.size)  # each process opens the file itself

    def get(self, row: int, stamp: int) -> Pixels | None:
        """The picture (size, size, 3), mapped, if it is there and made from the file of this `stamp`."""
        if self._full or not self._opened():
            return None
        assert self._index is not None
        if self._index[row, 0] != stamp:
            return None
        pixels: Pixels = self._pixels[row]
        return pixels if self._index[row, 1] == checksum(pixels) else None

    def put(self, row: int, stamp: int, pixels: Pixels) -> None:
        """Adds a picture; a disk that is full or cannot be written is said once, and the row stays out."""
        if self._full or not self._opened():
            return
        try:
            with self.file.open("rb+", buffering=0) as stream:
                stream.seek(self.start + row * pixels.nbytes)
                stream.write(pixels.tobytes())
                stream.seek(row * INDEX_ENTRY)
                stream.write(np.array([stamp, checksum(pixels)], dtype=np.uint64).tobytes())
        except OSError as error:
            self._stop(error)

    def _opened(self) -> bool:
        if self._index is not None:
            return True
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
            with self.file.open("rb+") as stream:
                if os.fstat(stream.fileno()).st_size < self.bytes:
                    stream.truncate(self.bytes)  # by whoever comes first; for the others it changes nothing
                mapped = mmap.mmap(stream.fileno(), self.bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            self._stop(error)
            return False
        self._index = np.frombuffer(mapped, np.uint64, self.rows * 2).reshape(self.rows, 2)
        self._pixels = np.frombuffer(mapped, np.uint8, offset=self.start).reshape(self.rows, self.size, self.size, 3)
        return True

    def _stop(self, error: OSError) -> None:
        self._full = True
        told = self.file.with_suffix(".full")  # so that of many processes one says it
        try:
            told.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
        print(f"cache: {self.file}: {error.strerror or error}; going on without", flush=True)


def stamp(path: str) -> int:
    """Changes with the file: never 0, which is what an empty row has."""
    status = os.stat(path)  # noqa: PTH116 (a Path would take as long as the call)
    return (status.st_mtime_ns * 1_000_003 + status.st_size * 31 + status.st_ino) % (1 << 64) | 1


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
    file.with_suffix(".full").unlink(missing_ok=True)
    return cache, f"cache: {file}, {cache.bytes / 1e6:,.0f} MB when it is full"
