"""Assigns rows to train, val and test: by class, by group, by fold; the same on every machine and file system."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from project.errors import UserError, some

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.1, 0.2


class Row(NamedTuple):
    """One image: path, class, split and group; split and group are empty where there is none (yet)."""

    path: str
    label: str
    split: str = ""
    group: str = ""

    @property
    def unit(self) -> str:
        """What stays in one split: the group, or the image alone."""
        return self.group or self.path


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Images of each class in each split."""
    counted = Counter((row.label, row.split) for row in rows)
    return {label: {split: counted[label, split] for split in SPLITS} for label in sorted({row.label for row in rows})}


def assign(rows: Sequence[Row], seed: int, folds: int | None = None, fold: int | None = None) -> list[Row]:
    """Gives every row a split: 70 % train, 10 % val and 20 % test of each class, at least one image to each.

    Rows of one group get the same split. With `folds`, test is one of that many equal parts, the one with the number
    `fold`, from 0, and val a tenth of all rows, taken from the rest. UserError where classes are too small.
    """
    least = {None: 3, 2: 4}.get(folds) or max(3, folds or 0)  # two folds of three would leave nothing for train
    if not any(row.group for row in rows):
        split = _by_class(
            rows, seed, least, lambda paths: paths[: _quota(paths, TEST_SHARE)] if folds is None else paths[fold::folds]
        )
        return [row._replace(split=split[row.path]) for row in rows]
    if folds is None:
        part = _by_group(rows, [1 - VAL_SHARE - TEST_SHARE, VAL_SHARE, TEST_SHARE], seed, least)
        return [row._replace(split=SPLITS[part[row.unit]]) for row in rows]
    part = _by_group(rows, [1 / folds] * folds, seed, least)
    rest = [row for row in rows if part[row.unit] != fold]
    val_share = VAL_SHARE / (1 - 1 / folds)
    is_val = _by_group(rest, [1 - val_share, val_share], seed, 2)
    return [row._replace(split="test" if part[row.unit] == fold else SPLITS[is_val[row.unit]]) for row in rows]


def carve_val(rows: Sequence[Row], seed: int) -> list[Row]:
    """Makes a tenth of each class's training rows validation rows, groups together; UserError for too small a class."""
    train = [row for row in rows if row.split == "train"]
    if any(row.group for row in train):
        is_val = _by_group(train, [1 - VAL_SHARE, VAL_SHARE], seed, 2)
        split = {row.path: SPLITS[is_val[row.unit]] for row in train}
    else:
        split = _by_class(train, seed, 2, lambda _: [])
    return [row._replace(split=split.get(row.path, row.split)) for row in rows]


def _by_class(rows: Sequence[Row], seed: int, least: int, test_of: Callable[[list[str]], list[str]]) -> dict[str, str]:
    """The split of each path: of a class's shuffled paths `test_of` takes those for test, a tenth of all become val."""
    classes: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        classes[row.label].append(row.path)
    _require({label: len(paths) for label, paths in classes.items()}, least, "images")
    split: dict[str, str] = {}
    for paths in classes.values():
        order = _shuffled(paths, seed)
        test = set(test_of(order))
        rest, val = [path for path in order if path not in test], _quota(order, VAL_SHARE)
        split |= dict.fromkeys(test, "test") | dict.fromkeys(rest[:val], "val") | dict.fromkeys(rest[val:], "train")
    return split


def _by_group(rows: Sequence[Row], shares: Sequence[float], seed: int, least: int) -> dict[str, int]:
    """The part of each group: the largest group first, each to the part that lacks most of its classes."""
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        members[row.unit][row.label] += 1
    totals = Counter(row.label for row in rows)
    _require(Counter(label for counts in members.values() for label in counts), least, "groups")
    order = sorted(_shuffled(list(members), seed), key=lambda group: -members[group].total())
    for penalty in (1.0, 0.0):  # of filling a part beyond its share; without it even few groups reach every part
        missing = [{label: share * total for label, total in totals.items()} for share in shares]
        part = {}
        for group in order:
            counts = members[group]
            gains = [
                sum(n * (2 * lacks[label] - penalty * n) / (share * totals[label]) for label, n in counts.items())
                for lacks, share in zip(missing, shares, strict=True)
            ]
            part[group] = gains.index(max(gains))
            for label, n in counts.items():
                missing[part[group]][label] -= n
        reached = {(label, part[group]) for group in order for label in members[group]}
        untouched = {label for label in totals for index in range(len(shares)) if (label, index) not in reached}
        if not untouched:
            return part
    raise UserError(
        f"The groups cannot be split so that every split has every class; one lacks {some(sorted(untouched))}. "
        "Give smaller groups, or a split of your own by --data.split."
    )


def _quota(paths: Sequence[str], share: float) -> int:
    return max(1, round(len(paths) * share))


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    """A shuffle that depends on nothing but the seed and the names."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest())


def _require(counts: Mapping[str, int], least: int, unit: str) -> None:
    if few := [f"{label} ({count})" for label, count in sorted(counts.items()) if count < least]:
        raise UserError(
            f"Too few {unit} for a split: {some(few)}; each class needs at least {least}; add some or remove it."
        )
