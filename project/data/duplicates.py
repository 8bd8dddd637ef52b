"""Images that are in a data set more than once: the same file, or the same image saved again."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from project.data.splits import Row

NEARLY_SAME = 0.998  # correlation


def groups(
    rows: list[Row], inspected: npt.NDArray[np.void], indices: npt.NDArray[np.int64]
) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Yields (kind, what they are, groups of indices), the worst kind first, of the images with the given indices.

    `inspected` has the row of `check.inspect_image` for each image, with `digest` and `thumbnail`.
    """
    same_file: dict[bytes, list[int]] = defaultdict(list)
    for index in indices.tolist():
        same_file[inspected["digest"][index].tobytes()].append(index)
    copies = list(same_file.values())
    near = near_groups(fingerprints(inspected["thumbnail"][[files[0] for files in copies]]))
    found = [("near-duplicate", sorted(index for member in group for index in copies[member])) for group in near]
    alone = set(range(len(copies))).difference(*near)
    found += [("duplicate", copies[member]) for member in sorted(alone) if len(copies[member]) > 1]
    by_kind: dict[str, list[list[int]]] = defaultdict(list)
    for kind, group in found:
        labels, splits = {rows[index].label for index in group}, {rows[index].split for index in group}
        by_kind[kind + ("-label" if len(labels) > 1 else "-split" if len(splits) > 1 else "")].append(group)
    for kind, what in (("duplicate", "identical files"), ("near-duplicate", "nearly identical images")):
        yield f"{kind}-label", f"{what} with different labels", by_kind[f"{kind}-label"]
        yield f"{kind}-split", f"{what} in different splits", by_kind[f"{kind}-split"]
        yield kind, f"{what} in one class and split", by_kind[kind]


def fingerprints(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Thumbnails (N, D) minus their means, scaled to length 1."""
    unit = np.empty(thumbnails.shape, dtype=np.float16)
    for start in range(0, len(unit), 65536):
        block = thumbnails[start : start + 65536].astype(np.float32)
        block -= block.mean(axis=1, keepdims=True)
        unit[start : start + 65536] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)
    return unit


def near_groups(fingerprints: npt.NDArray[np.float16]) -> list[list[int]]:
    """Groups of rows (N, D) that are linked by a correlation of at least `NEARLY_SAME`, directly or through others.

    A photograph that is saved again as JPEG, at half its size or with another contrast nearly always has it; a cropped
    copy has not. Of 3.4 million pairs of solar cells 4 have it, of the same cell each; of 1.6 million of digits none.

    Exact, and quick because near vectors have nearly the same position along every direction: a row is compared only
    with those near it along the direction of largest spread.
    """
    if len(fingerprints) < 2:
        return []
    sample = fingerprints[:: max(1, len(fingerprints) // 4096)].astype(np.float32)
    direction = np.linalg.svd(sample - sample.mean(0), full_matrices=False)[2][0]
    position = np.einsum("nd,d->n", fingerprints, direction)  # which converts a part at a time
    order = np.argsort(position)
    position, reach = position[order], float(np.sqrt(2 - 2 * NEARLY_SAME)) + 1e-3
    parent = np.arange(len(order))  # of a forest with a tree for each group

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    for start in range(0, len(order), 1024):
        rows = order[start : start + 1024]
        last = int(np.searchsorted(position, position[start + len(rows) - 1] + reach, side="right"))
        block = fingerprints[rows].astype(np.float32)
        for other in range(start, last, 16384):
            against = order[other : min(other + 16384, last)]
            near = block @ fingerprints[against].astype(np.float32).T >= NEARLY_SAME
            for row in np.flatnonzero(near.sum(axis=1) > (other == start)):  # in its own block each is near itself
                joined = root(int(rows[row]))
                for parents in np.unique(parent[against[near[row]]]).tolist():
                    parent[root(parents)] = joined
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(parent)):
        groups[root(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]
