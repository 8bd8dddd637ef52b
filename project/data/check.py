"""The doctor of data sets: looks at every picture and says what is wrong, worst first."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from project.data import duplicates, images, manifest
from project.data.folders import Findings
from project.data.splits import SPLITS, Row
from project.data.workers import usable_cores
from project.errors import UserError

SIDE = 16  # of the thumbnail, in pixels
CONSTANT = 2.0  # standard deviation of the thumbnail's grey levels below which a picture shows nearly nothing
ONES = np.full(1024, 1 / 1024, dtype=np.float32)
SMALL_CLASS, IMBALANCE = 10, 10.0
ENDINGS = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".jpe", ".jfif"},  # a telephone's JPEG with a second picture in it
    "PNG": {".png"},
    "GIF": {".gif"},
    "BMP": {".bmp"},
    "WEBP": {".webp"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
    "AVIF": {".avif"},
    "JPEG2000": {".jp2"},
}
EXAMINED = np.dtype(
    [
        ("digest", np.uint64, 2),  # of the file's bytes
        ("format", "S9"),
        ("mode", "S8"),
        ("size", np.int32, 2),  # width and height
        ("rotated", np.bool_),  # by its EXIF orientation
        ("mean", np.float32, 3),  # of the pixels, 0 to 1
        ("square", np.float32, 3),  # mean of their squares
        ("thumbnail", np.uint8, SIDE * SIDE),  # in grey
    ]
)


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: A word for programs.
        problem: Whether it should be looked at before training; the rest is for information.
        sentence: What it is.
        paths: Which pictures; where they belong together, several in one entry.
    """

    kind: str
    problem: bool
    sentence: str
    paths: list[list[str]]


@dataclass(frozen=True)
class Report:
    """What the doctor says of a data set.

    Attributes:
        rows: Path, label and split of every picture.
        findings: Worst first.
        leave_out: Path and reason of what had better not be trained on.
        mean: Of the readable pictures' pixels, a channel each, 0 to 1.
        std: Likewise, their standard deviation.
    """

    rows: list[Row]
    findings: list[Finding]
    leave_out: dict[str, str]
    mean: list[float]
    std: list[float]

    def counts(self) -> dict[str, dict[str, int]]:
        """Pictures of each class in each split."""
        counted = Counter((row.label, row.split) for row in self.rows)
        return {label: {s: counted[label, s] for s in SPLITS} for label in sorted({row.label for row in self.rows})}


def examine(path: str) -> npt.NDArray[np.void]:
    """Decodes one picture; a row of `EXAMINED`.

    Raises:
        ImageError: It cannot be read.
    """
    row = np.zeros((), EXAMINED)
    with images.opened(path) as image:
        row["format"], row["mode"], row["size"] = image.format, image.mode, image.size
        row["rotated"] = image.getexif().get(images.ORIENTATION, 1) not in (0, 1)
        with open(path, "rb") as stream:  # noqa: PTH123
            row["digest"] = np.frombuffer(hashlib.sha256(stream.read()).digest()[:16], np.uint64)
        image.draft(image.mode, (96, 96))  # a JPEG is read to its end, but decoded at a fraction of its size
        images.upright(image)
        plain = image if images.is_plain_grey(image) else images.to_rgb(image)
        sample = np.asarray(plain.resize((32, 32), Image.Resampling.NEAREST), dtype=np.float32).reshape(1024, -1)
        small = plain.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=4.0).convert("L")
    sample /= 255
    mean, products = ONES @ sample, sample.T @ sample / 1024  # of a grey picture, the same for each channel
    row["mean"], row["square"] = mean, np.diagonal(products)
    row["thumbnail"] = np.frombuffer(small.tobytes(), np.uint8)
    return row


def examine_all(paths: list[str]) -> tuple[npt.NDArray[np.void], dict[int, str]]:
    """Rows of `EXAMINED`, and by place the reasons of those that cannot be read."""
    rows, errors = np.zeros(len(paths), EXAMINED), {}
    for place, path in enumerate(paths):
        try:
            rows[place] = examine(path)
        except images.ImageError as error:
            errors[place] = error.reason
    return rows, errors


def check(root: Path, progress: Any = None) -> Report:
    """Looks at every picture of a data set.

    Args:
        root: A folder or CSV file, as `manifest.load` takes it.
        progress: Wraps the iterator over the chunks, given it and their number.

    Raises:
        UserError: There is nothing that could be looked at.
    """
    found = Findings()
    rows = sorted(manifest.scan(root, found))
    if not rows:
        raise UserError(f"No pictures in {root}; expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.")
    findings: list[Finding] = []
    try:
        made = manifest.load(root)
    except UserError as error:
        findings.append(Finding("refused", True, f"fit would refuse this: {error}", []))
    else:
        rows = [
            Row(path, made.class_names[label], SPLITS[split])
            for path, label, split in zip(made.paths, made.labels, made.splits, strict=True)
        ]
        findings += [
            Finding("notice", "both sides" in text, text, []) for text in made.notices if "left out" not in text
        ]
    base = root.parent if root.is_file() else root
    chunks = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    work: Iterable[list[str]] = [[str(base / row.path) for row in chunk] for chunk in chunks]
    parts: list[npt.NDArray[np.void]] = []
    errors: dict[str, str] = {}
    with ProcessPoolExecutor(usable_cores()) as pool:
        results: Iterator[Any] = pool.map(examine_all, work)
        for number, (part, failed) in enumerate(progress(results, len(chunks)) if progress else results):
            parts.append(part)
            errors |= {rows[number * 32 + place].path: reason for place, reason in failed.items()}
    return _judge(rows, np.concatenate(parts), errors, findings, found)


def _judge(
    rows: list[Row], seen: npt.NDArray[np.void], errors: dict[str, str], findings: list[Finding], found: Findings
) -> Report:
    bad = np.array([row.path in errors for row in rows])
    empty = seen["thumbnail"].std(axis=1) < CONSTANT
    leave_out = {path: f"unreadable: {reason}" for path, reason in errors.items()}

    def add(kind: str, problem: bool, what: str, paths: Iterable[Sequence[str]]) -> None:
        listed = [list(entry) for entry in paths]
        if listed:
            findings.append(Finding(kind, problem, f"{len(listed):,} {what}", listed))

    def where(condition: npt.NDArray[np.bool_]) -> list[list[str]]:
        return [[rows[place].path] for place in np.flatnonzero(condition & ~bad)]

    add("unreadable", True, "cannot be read", ([f"{path}: {reason}"] for path, reason in errors.items()))
    for kind, what, places in duplicates.groups(rows, seen, np.flatnonzero(~bad & ~empty)):
        add(kind, True, what, ([rows[place].path for place in group] for group in places))
        for group in places:
            keep = max(group, key=lambda place: (SPLITS.index(rows[place].split or "train"), -place))
            for place in group:
                if kind.endswith("label") or place != keep:
                    leave_out.setdefault(rows[place].path, f"{what}: {rows[keep].path}")
    endings = np.array(
        [
            Path(row.path).suffix.lower() in ENDINGS.get(kind.decode(), {""})
            for row, kind in zip(rows, seen["format"], strict=True)
        ]
    )
    add("ending", True, "with the ending of another format", where(~endings))
    add("constant", True, "look like a single colour", where(empty))
    findings += classes(rows)
    for kind, (count, names) in found.skipped.items():
        problem = kind in ("folder without pictures", "not inside a class folder")
        findings.append(Finding("skipped", problem, f"{count:,} left out, {kind}", [[name] for name in names]))
    good = seen[~bad]
    if len(good):
        width, height = seen["size"].T.astype(np.float64)
        usual, shorter = np.median(good["size"].min(axis=1)), np.minimum(width, height)
        far = (shorter < usual / 4) | (shorter > usual * 4)
        add("size", False, f"far from the usual size ({usual:.0f} px)", where(far))
        long = np.maximum(width, height) > 3 * shorter
        add("aspect", False, "with one side more than 3 times the other", where(long))
        common = Counter(good["mode"].tolist()).most_common(1)[0][0]
        add("mode", False, f"of another mode than {common.decode()}", where(seen["mode"] != common))
        add("rotated", False, "turned by their EXIF orientation (training turns them too)", where(seen["rotated"]))
        deep = np.char.startswith(seen["mode"], b"I") | np.char.startswith(seen["mode"], b"F")
        add("deep", False, "of 16 bits or more (scaled to 8)", where(deep))
    findings.sort(key=lambda finding: not finding.problem)
    mean = good["mean"].mean(axis=0) if len(good) else np.full(3, np.nan)
    std = np.sqrt(np.maximum(good["square"].mean(axis=0) - np.square(mean), 0)) if len(good) else mean
    return Report(rows, findings, leave_out, mean.tolist(), std.tolist())


def classes(rows: list[Row]) -> Iterator[Finding]:
    """What is wrong with the number of training pictures of each class."""
    train = Counter(row.label for row in rows if row.split in ("train", ""))
    if few := [[f"{label}: {count}"] for label, count in sorted(train.items()) if count < SMALL_CLASS]:
        yield Finding("small-class", True, f"{len(few):,} classes with fewer than {SMALL_CLASS} training pictures", few)
    if train and max(train.values()) > IMBALANCE * min(train.values()):
        most, least = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        text = f"{most} has {train[most] / train[least]:.0f} times the pictures of {least}; see --data.balance"
        yield Finding("imbalance", True, text, [])
