"""Many paths in one array, which takes half the memory of a list, and none where it lies on the disk."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Paths(Sequence[str]):
    """Paths as text; `encoded` (N,) has them as bytes."""

    def __init__(self, encoded: npt.NDArray[np.bytes_]) -> None:
        self.encoded = encoded

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        return paths if isinstance(paths, cls) else cls(np.array([*map(os.fsencode, paths)], dtype=np.bytes_))

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: Any) -> Any:
        """One path; of a slice or an array of rows, their paths."""
        found = self.encoded[row]
        return os.fsdecode(found) if isinstance(found, bytes) else Paths(found)

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded.tolist())
