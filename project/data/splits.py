"""Deals rows out to train, val and test: by class, by group, by fold; the same on every machine and file system."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from project.errors import UserError

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.1, 0.2


class Row(NamedTuple):
    """One picture: path, class, split and group; split and group are empty where there is none (yet)."""

    path: str
    label: str
    split: str = ""
    group: str = ""

    @property
    def unit(self) -> str:
        """What stays together: the group, or the picture alone."""
        return self.group or self.path


def assign(rows: Sequence[Row], seed: int, folds: int | None = None, fold: int | None = None) -> list[Row]:
    """Gives every row a split: 70 % train, 10 % val and 20 % test of each class, at least one picture to each.

    Rows with the same group stay together. With `folds`, test is the fold-th of so many equal parts and val a tenth
    of everything, out of the rest.

    Args:
        rows: All without a split.
        seed: Decides which picture goes where.
        folds: How many parts.
        fold: Which of them is test, from 0.

    Raises:
        UserError: It cannot be done; the sentence names the classes that are too small.
    """
    shares = [1 - VAL_SHARE - TEST_SHARE, VAL_SHARE, TEST_SHARE] if folds is None else [1 / folds] * folds
    least = {None: 3, 2: 4}.get(folds) or max(3, folds or 0)  # two folds of three would leave nothing for train
    if not any(row.group for row in rows):
        split = _by_class(rows, seed, least, folds, fold)
        return [row._replace(split=split[row.path]) for row in rows]
    if folds is None:
        part = _by_group(rows, shares, seed, least)
        return [row._replace(split=SPLITS[part[row.unit]]) for row in rows]
    part = _by_group(rows, shares, seed, least)
    rest = [row for row in rows if part[row.unit] != fold]
    val_share = VAL_SHARE / (1 - 1 / folds)
    val = _by_group(rest, [1 - val_share, val_share], seed, 2)
    return [row._replace(split="test" if part[row.unit] == fold else SPLITS[val[row.unit]]) for row in rows]


def carve_val(rows: Sequence[Row], seed: int) -> list[Row]:
    """Makes a tenth of each class's training rows validation rows; groups stay together.

    Raises:
        UserError: A class is too small.
    """
    train = [row for row in rows if row.split == "train"]
    if any(row.group for row in train):
        part = _by_group(train, [1 - VAL_SHARE, VAL_SHARE], seed, 2)
        chosen = {row.path for row in train if part[row.unit]}
    else:
        of_class = _paths(train)
        _require({label: len(paths) for label, paths in of_class.items()}, 2, "pictures")
        chosen = {p for paths in of_class.values() for p in ordered(paths, seed)[: _quota(len(paths), VAL_SHARE)]}
    return [row._replace(split="val") if row.path in chosen else row for row in rows]


def _by_class(rows: Sequence[Row], seed: int, least: int, folds: int | None, fold: int | None) -> dict[str, str]:
    of_class = _paths(rows)
    _require({label: len(paths) for label, paths in of_class.items()}, least, "pictures")
    split: dict[str, str] = {}
    for paths in of_class.values():
        order = ordered(paths, seed)
        if folds is None:
            test, rest = order[: _quota(len(paths), TEST_SHARE)], order[_quota(len(paths), TEST_SHARE) :]
        else:
            test = order[fold::folds]
            rest = [path for place, path in enumerate(order) if place % folds != fold]
        val = _quota(len(paths), VAL_SHARE)
        split |= dict.fromkeys(test, "test") | dict.fromkeys(rest[:val], "val") | dict.fromkeys(rest[val:], "train")
    return split


def _by_group(rows: Sequence[Row], shares: Sequence[float], seed: int, least: int) -> dict[str, int]:
    """The part of each group: the largest group first, each to the part that misses most of its classes."""
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        members[row.unit][row.label] += 1
    totals = Counter(row.label for row in rows)
    _require(Counter(label for counts in members.values() for label in counts), least, "groups")
    order = sorted(ordered(list(members), seed), key=lambda group: -members[group].total())
    for penalty in (1.0, 0.0):  # of filling a part beyond its share; without it even few groups reach every part
        missing = [{label: share * total for label, total in totals.items()} for share in shares]
        part = {}
        for group in order:
            gains = [
                sum(
                    n * (2 * lacks[label] - penalty * n) / (share * totals[label])
                    for label, n in members[group].items()
                )
                for lacks, share in zip(missing, shares, strict=True)
            ]
            part[group] = gains.index(max(gains))
            for label, n in members[group].items():
                missing[part[group]][label] -= n
        lacking = {
            label
            for number, share in enumerate(shares)
            for label, total in totals.items()
            if missing[number][label] == share * total
        }
        if not lacking:
            return part
    raise UserError(
        f"The groups cannot be dealt out so that every split has every class; one lacks {', '.join(sorted(lacking))}. "
        "Give smaller groups, or a split of your own by --data.split."
    )


def _paths(rows: Sequence[Row]) -> dict[str, list[str]]:
    of_class: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        of_class[row.label].append(row.path)
    return of_class


def _quota(count: int, share: float) -> int:
    return max(1, round(count * share))


def ordered(names: Sequence[str], seed: int) -> list[str]:
    """A shuffle that depends on nothing but the seed and the names."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest())


def _require(counts: Mapping[str, int], least: int, what: str) -> None:
    few = [f"{label} ({count})" for label, count in sorted(counts.items()) if count < least]
    if few:
        raise UserError(
            f"Too few {what} for a split: {', '.join(few)}; each class needs at least {least}. "
            "Add pictures, or remove the class."
        )
