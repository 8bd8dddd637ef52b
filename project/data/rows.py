"""Many texts and numbers as a few arrays: small in memory, kept in one file, shared by every process that maps it."""

import json
import os
from array import array as integers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from project import files

Array = npt.NDArray[Any]
Identity = tuple[int, int]
ALIGNMENT = 64


class Texts(Sequence[str]):
    """N texts in one buffer: their bytes and 8 more each; a Python object only when one is asked for.

    A list of strings costs some 100 bytes each, and again in every worker: reading an object changes its reference
    count, so that the worker needs a page of its own (pytorch#13246).

    Args:
        buffer: (bytes,) uint8, all texts in UTF-8, one after the other.
        ends: (N,) int64, where each ends.
        source: File, name in it and identity of the file, where they are mapped; a pickle then holds this alone.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        ends: npt.NDArray[np.int64],
        source: tuple[Path, str, Identity] | None = None,
    ) -> None:
        self.buffer, self.ends, self.source = buffer, ends, source

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """From strings, which are not held as such meanwhile."""
        buffer, ends = bytearray(), integers("q")
        for text in texts:
            buffer += text.encode("utf-8", "surrogateescape")
            ends.append(len(buffer))
        return cls(np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        start = int(self.ends[place - 1]) if place else 0
        return self.buffer[start : self.ends[place]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start, everything = 0, self.buffer.tobytes()
        for end in self.ends.tolist():
            yield everything[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __reduce__(self) -> tuple[Any, ...]:
        if self.source and identity(self.source[0]) == self.source[2]:
            return mapped_texts, self.source
        return Texts, (self.buffer, self.ends)


def identity(file: Path) -> Identity | None:
    """What a file that is put in this one's place does not share with it."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def mapped_texts(file: Path, name: str, which: Identity) -> Texts:
    """The texts that `save` has put into a file under a name; a worker maps them like this."""
    header = load(file)
    if header.identity != which:
        raise RuntimeError(f"{file} was made anew while the workers started; start again.")
    return header.texts(name)


def as_arrays(name: str, texts: Texts) -> dict[str, Array]:
    """Texts as two arrays."""
    return {f"{name}.buffer": texts.buffer, f"{name}.ends": texts.ends}


def save(file: Path, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Writes one file, whole or not at all: a line of JSON, then the arrays, each at a place that can be mapped."""
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = {"dtype": array.dtype.str, "shape": array.shape, "start": end}
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    line = json.dumps({"header": header, "arrays": places}).encode() + b"\n"
    with files.replacing_bytes(file) as stream:
        stream.write(line.rjust(-(-len(line) // ALIGNMENT) * ALIGNMENT))
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).tobytes().ljust(-(-array.nbytes // ALIGNMENT) * ALIGNMENT, b"\0"))


@dataclass(frozen=True)
class Kept:
    """What is in a file of `save`.

    Attributes:
        file: Where it lies.
        identity: Of the file that is mapped.
        header: As it was given.
        arrays: By name; mapped, not read.
    """

    file: Path
    identity: Identity
    header: dict[str, Any]
    arrays: dict[str, Array]

    def texts(self, name: str) -> Texts:
        """The texts that `as_arrays` has made arrays of."""
        source = (self.file, name, self.identity)
        return Texts(self.arrays[f"{name}.buffer"], self.arrays[f"{name}.ends"], source)


def load(file: Path) -> Kept:
    """Maps a file of `save`.

    Raises:
        OSError: There is no such file.
        ValueError: It is not whole.
    """
    with file.open("rb") as stream:
        status, line = os.fstat(stream.fileno()), stream.readline()
        try:
            content = json.loads(line)
            arrays = {
                name: np.memmap(stream, place["dtype"], "r", len(line) + place["start"], tuple(place["shape"]))
                if np.prod(place["shape"])
                else np.empty(place["shape"], place["dtype"])
                for name, place in content["arrays"].items()
            }
            return Kept(file.resolve(), (status.st_ino, status.st_mtime_ns), content["header"], arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged") from error
