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
    copies = list(same.values())
    near = near_groups(fingerprints(seen["thumbnail"][[files[0] for files in copies]]))
    found = [("near-duplicate", [place for one in group for place in copies[one]]) for group in near]
    alone = set(range(len(copies))) - {one for group in near for one in group}
    found += [("duplicate", copies[one]) for one in sorted(alone) if len(copies[one]) > 1]
    sorts: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
    for kind, group in found:
        labels, splits = {rows[place].label for place in group}, {rows[place].split for place in group}
        where = "-label" if len(labels) > 1 else "-split" if len(splits) > 1 else ""
        sorts[kind, where].append(sorted(group))
    for kind, what in (("duplicate", "the same file"), ("near-duplicate", "nearly the same")):
        yield f"{kind}-label", f"{what}, with different labels", sorts[kind, "-label"]
        yield f"{kind}-split", f"{what}, on both sides of the split", sorts[kind, "-split"]
        yield kind, f"{what}, within one class and split", sorts[kind, ""]


def fingerprints(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Thumbnails (N, D), each less its mean and at length 1."""
    made = np.empty(thumbnails.shape, dtype=np.float16)
    for start in range(0, len(made), 65536):
        block = thumbnails[start : start + 65536].astype(np.float32)
        block -= block.mean(axis=1, keepdims=True)
        made[start : start + 65536] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)
    return made


def near_groups(fingerprints: npt.NDArray[np.float16]) -> list[list[int]]:
    """Groups of rows that are linked by a correlation of at least `NEARLY_SAME`, directly or through others.

    A fingerprint is the picture at 16 x 16 grey levels, less its mean, at length 1. A photograph that is saved anew as
    JPEG, at half its size or with another contrast nearly always keeps a correlation above 0.998 with what it was. Of
    3.4 million pairs of solar cells, all much alike, 4 have it, the same cells taken twice; of 1.6 million pairs of
    digits none, of which a difference hash of 256 bits would call 63,005 the same at a distance of 16 bits. A cropped
    copy is not found.

    Exact, and quick because vectors that are that near have nearly the same place along every direction: rows are
    compared only with those that are near along the direction in which they spread most.

    Args:
        fingerprints: (N, D), each of length 1.

    Returns:
        Places of two rows or more, a list a group.
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
    places, reach = places[order], float(np.sqrt(2 - 2 * NEARLY_SAME)) + 1e-3
    parent = np.arange(len(order))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = int(parent[one])
        return one

    for start in range(0, len(order), 1024):
        end = min(start + 1024, len(order))
        last = int(np.searchsorted(places, places[end - 1] + reach, side="right"))
        block = fingerprints[order[start:end]].astype(np.float32)
        for other in range(start, last, 16384):
            against = order[other : min(other + 16384, last)]
            alike = block @ fingerprints[against].astype(np.float32).T >= NEARLY_SAME
            for row in np.flatnonzero(alike.sum(axis=1) > (other == start)):  # in its own block each is like itself
                one = find(int(order[start + row]))
                for parents in np.unique(parent[against[alike[row]]]).tolist():
                    parent[find(parents)] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for one in range(len(parent)):
        groups[find(one)].append(one)
    return [group for group in groups.values() if len(group) > 1]
