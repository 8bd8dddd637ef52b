"""Decoded, resized images in one file: the second epoch reads at the speed of memory."""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import PIL

from project.data import shards
from project.data.images import Pixels
from project.data.paths import Paths

Choice = Literal["auto", "on", "off"]
FOLDER = Path("data/cache")  # `make clean-cache` removes it
# The source of what a row holds, with modules that a fork adds beside it. A change there makes the files anew, whereas
# a number is forgotten in a fork.
OTHERS = re.compile(
    "check|datamodule|digits|duplicates|folders|inputs|loader|manifest|own|paths|shards|splits|transforms|workers"
)
SOURCE = tuple(file for file in sorted(Path(__file__).parent.glob("*.py")) if not OTHERS.fullmatch(file.stem))


class Cache:
    """Images by row, written when they are first read, by any number of processes at once.

    A row is two numbers, stamp and checksum, and its pixels. It counts only if the stamp is that of the image's file
    as it is now and the checksum that of the pixels: not after a changed image, a write that was killed half-way or
    two of one row at once. Rows that are not written take no space. `size` is the side of the square images, in pixels.

    Read and written by file calls: on a full disk these fail, while a memory map kills the process (SIGBUS on tmpfs).
    """

    def __init__(self, file: Path, rows: int, size: int) -> None:
        self.file, self.size = file, size
        self._row = 2 * 8 + size * size * 3
        self.bytes = rows * self._row  # size of the file when every row is in it
        self._is_broken = False

    def get(self, row: int, stamp: int) -> Pixels | None:
        """The image (size, size, 3), if it is there and was made from the file with this `stamp`."""
        content = np.empty(self._row, dtype=np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as stream:  # noqa: PTH123 (a fifth of the time of Path.open)
                stream.seek(row * self._row)
                if stream.readinto(content.data) != self._row:
                    return None
        except OSError:  # no row has been written yet
            return None
        head, pixels = content[:16].view(np.uint64).tolist(), content[16:].reshape(self.size, self.size, 3)
        return pixels if head == [stamp, checksum(pixels)] else None

    def put(self, row: int, stamp: int, pixels: Pixels) -> None:
        """Adds an image; where that fails, prints why, and adds none from then on."""
        if self._is_broken:
            return
        head = np.array([stamp, checksum(pixels)], dtype=np.uint64)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
            with self.file.open("rb+", buffering=0) as stream:
                stream.seek(row * self._row)
                stream.write(head.tobytes() + pixels.tobytes())
        except OSError as error:
            self._is_broken = True
            print(f"cache: {self.file}: {error.strerror or error}; continuing without", flush=True)


def stamp(path: str) -> int:
    """Changes with the file, also when it is replaced by one of the same size and date; never 0, as an empty row is."""
    status = shards.status(path)
    return hash((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)) % (1 << 64) or 1


def checksum(pixels: Pixels) -> int:
    """Sum of the bytes, eight at a time: 5 µs for an image of 224 px; a row torn at any byte has another one."""
    flat = pixels.reshape(-1)
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    return (int(words.sum(dtype=np.uint64)) + int(flat[whole:].sum()) * 257 + 1) % (1 << 64)


def choose(
    choice: Choice, folder: Path, root: Path, paths: Sequence[str], size: int, resize: str
) -> tuple[Cache | None, str]:
    """The cache of `root`'s images, with `auto` if it takes at most half of the free space, and a sentence about it."""
    if choice == "off":
        return None, ""
    key = os.fsencode(repr((PIL.__version__, str(root.resolve())))) + Paths.of(paths).encoded.tobytes()
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCE) + key).hexdigest()
    file = folder / f"{digest[:16]}-{size}-{resize.replace(':', '-')}.pixels"
    cache = Cache(file, len(paths), size)
    allocated = getattr(file.stat(), "st_blocks", 0) * 512 if file.exists() else 0
    nearest = next(parent for parent in file.absolute().parents if parent.exists())
    free = shutil.disk_usage(nearest).free + allocated
    if choice == "auto" and cache.bytes > free / 2:
        need = f"{cache.bytes / 1e9:,.1f} GB, more than half of the {free / 1e9:,.1f} GB free"
        return None, f"cache: none, it would take {need} (--data.cache on would)"
    return cache, f"cache: {file}, {cache.bytes / 1e6:,.0f} MB when it is full"
