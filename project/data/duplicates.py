"""Pictures that are in a data set more than once: the same file, or the same picture saved anew."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from project.data.splits import Row

NEARLY_SAME = 0.998


def groups(
    rows: list[Row], seen: npt.NDArray[np.void], places: npt.NDArray[np.int64]
) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Yields (kind, sentence, groups of places), the worst kind first.

    Args:
        rows: Path, label and split of each picture.
        seen: What `check.examine` says of each: `digest` and `thumbnail`.
        places: Which of them to compare.
    """
    same: dict[bytes, list[int]] = defaultdict(list)
    for place in places.tolist():
        same[seen["digest"][place].tobytes()].append(place)
    firsts = np.array([group[0] for group in same.values()], dtype=np.int64)
    near = [[int(firsts[a]), int(firsts[b])] for a, b in near_pairs(fingerprints(seen["thumbnail"][firsts]))]
    exact = [group for group in same.values() if len(group) > 1]
    for kind, what, found in (("duplicate", "the same file", exact), ("near-duplicate", "nearly the same", near)):
        sorts: dict[str, list[list[int]]] = {"-label": [], "-split": [], "": []}
        for group in found:
            labels, splits = {rows[place].label for place in group}, {rows[place].split for place in group}
            sorts["-label" if len(labels) > 1 else "-split" if len(splits) > 1 else ""].append(group)
        yield f"{kind}-label", f"{what}, with different labels", sorts["-label"]
        yield f"{kind}-split", f"{what}, on both sides of the split", sorts["-split"]
        yield kind, f"{what}, within one class and split", sorts[""]


def fingerprints(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Thumbnails (N, D), each less its mean and at length 1."""
    made = np.empty(thumbnails.shape, dtype=np.float16)
    for start in range(0, len(made), 65536):
        block = thumbnails[start : start + 65536].astype(np.float32)
        block -= block.mean(axis=1, keepdims=True)
        made[start : start + 65536] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)
    return made


def near_pairs(fingerprints: npt.NDArray[np.float16], least: float = NEARLY_SAME) -> list[tuple[int, int]]:
    """Pairs of rows whose correlation is at least `least`.

    A fingerprint is the picture at 16 x 16 grey levels, less its mean, at length 1. A photograph that is saved anew as
    JPEG, at half its size or with another contrast nearly always keeps a correlation above 0.998 with what it was. Of
    3.4 million pairs of solar cells, all much alike, 7 have it; of 1.6 million pairs of digits none. A difference hash
    of 256 bits would call 63,005 pairs of digits the same at a distance of 16 bits. A cropped copy is not found.

    Exact, and quick because vectors that are that near have nearly the same place along every direction: rows are
    compared only with those that are near along the direction in which they spread most.

    Args:
        fingerprints: (N, D), each of length 1.
        least: Correlation from which two are nearly the same.
    """
    if len(fingerprints) < 2:
        return []
    sample = fingerprints[:: max(1, len(fingerprints) // 4096)].astype(np.float32)
    direction = np.linalg.svd(sample - sample.mean(0), full_matrices=False)[2][0]
    places = np.concatenate(
        [
            fingerprints[start : start + 65536].astype(np.float32) @ direction
            for start in range(0, len(fingerprints), 65536)
        ]
    )
    order = np.argsort(places)
    places, reach = places[order], float(np.sqrt(2 - 2 * least)) + 1e-3
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(order), 1024):
        end = min(start + 1024, len(order))
        last = int(np.searchsorted(places, places[end - 1] + reach, side="right"))
        block = fingerprints[order[start:end]].astype(np.float32)
        for other in range(start, last, 16384):
            against = fingerprints[order[other : min(other + 16384, last)]].astype(np.float32)
            for a, b in zip(*np.nonzero(block @ against.T >= least), strict=True):
                if start + a < other + b:
                    one, two = int(order[start + a]), int(order[other + b])
                    pairs.append((min(one, two), max(one, two)))
    return sorted(pairs)
