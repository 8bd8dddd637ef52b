"""Many strings in two arrays: small in memory and quick to pickle for a worker."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


class StringArray(Sequence[str]):
    """N strings in one buffer: their bytes and 8 more each.

    A list of strings costs some 100 bytes each, and again in every worker: reading an object changes its reference
    count, so that the worker needs a page of its own (pytorch#13246).

    Args:
        buffer: (bytes,) uint8, all strings in UTF-8, one after the other.
        ends: (N,) int64, the end of each in `buffer`.
    """

    def __init__(self, buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "StringArray":
        """Packs strings, one at a time."""
        buffer, ends = bytearray(), array("q")
        for text in strings:
            buffer += text.encode("utf-8", "surrogateescape")
            ends.append(len(buffer))
        return cls(np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start, everything = 0, self.buffer.tobytes()
        for end in self.ends.tolist():
            yield everything[start:end].decode("utf-8", "surrogateescape")
            start = end
