"""Dataset checks: inspects every image and lists findings, the worst first."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from PIL import Image

from project.data import duplicates, images, manifest, shards
from project.data.folders import HIDDEN, NOT_IMAGE, NOT_SPLIT, OURS, TOOL, UNREAD, Layout, Skipped, nothing_in
from project.data.splits import SPLITS, Row
from project.data.workers import follow, usable_cores
from project.errors import FailedRun, UserError

SIDE = 16  # of the thumbnail, in pixels
CONSTANT = 2.0  # standard deviation of the thumbnail's grey levels below which an image shows nearly nothing
SMALL_CLASS, IMBALANCE = 10, 10.0
INSPECTED = np.dtype(
    [
        ("digest", np.uint64, 2),  # of the file's bytes
        ("format", "S9"),
        ("mode", "S8"),
        ("size", np.int32, 2),  # width and height
        ("rotated", np.bool_),  # by its EXIF orientation
        ("no_data", np.bool_),
        ("mean", np.float32, 3),  # of the pixels, 0 to 1
        ("square", np.float32, 3),  # mean of their squares
        ("thumbnail", np.uint8, SIDE * SIDE),  # in grey
    ]
)


@dataclass(frozen=True)
class Finding:
    """One kind of finding."""

    kind: str  # an identifier for programs
    problem: bool  # whether to look at it before training; otherwise it is for information
    sentence: str  # what was found
    paths: list[list[str]]  # the images; those that belong together are in one entry


@dataclass(frozen=True)
class Report:
    """The result of the checks of a data set."""

    rows: list[Row]  # path, label and split of every image
    findings: list[Finding]  # the worst first
    leave_out: dict[str, str]  # path and reason of the images to exclude from training
    mean: list[float]  # of the readable images' pixels, a channel each, 0 to 1
    std: list[float]  # their standard deviation


def inspect_image(path: str) -> tuple[npt.NDArray[np.void], str]:
    """Decodes one image; returns a row of `INSPECTED`, and the reason if the image cannot be read."""
    row = np.zeros((), INSPECTED)
    try:
        with images.opened(path) as image:
            row["format"], row["mode"], row["size"] = image.format, image.mode, image.size
            with suppress(Exception):  # damaged metadata raises anything
                row["rotated"] = int(image.getexif().get(images.ORIENTATION, 1)) not in (0, 1)
            content = shards.read(path)
            images.require_short_decoding(content, path)
            row["digest"] = np.frombuffer(hashlib.sha256(content).digest()[:16], np.uint64)
            image.draft(image.mode, (96, 96))  # a JPEG is read to its end, but decoded at a fraction of its size
            images.upright(image)
            plain = images.to_8_bits(image)
            row["no_data"] = image.info.get("has_no_data", False)
            sample = np.asarray(plain.resize((32, 32), Image.Resampling.NEAREST), dtype=np.float32).reshape(1024, -1)
            small = plain.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=4.0).convert("L")
    except images.ImageError as error:
        return row, error.reason
    sample /= 255
    row["mean"], row["square"] = sample.mean(axis=0), np.square(sample).mean(axis=0)  # grey: the same for each channel
    row["thumbnail"] = np.frombuffer(small.tobytes(), np.uint8)
    return row, ""


def check_dataset(
    root: Path,
    progress: Callable[..., Iterable[Any]] = lambda results, total: results,
    layout: Layout | None = None,
    keep: str = "",
) -> Report:
    """Inspects every image of a data set, which is given as for `manifest.load`; UserError where there is none.

    `progress` wraps the iterator over the images, given it and their number, `total`.
    """
    skipped = Skipped(keep)
    rows = sorted(row._replace(label=normalize("NFC", row.label)) for row in manifest.scan(root, skipped, layout))
    if not rows:
        raise nothing_in(root, skipped)
    findings: list[Finding] = []
    try:
        loaded = manifest.load(root, layout=layout, keep=keep)
    except UserError as error:
        findings.append(Finding("refused", True, f"fit would refuse this: {error}", []))
    else:
        columns = zip(loaded.paths, loaded.labels.tolist(), loaded.splits.tolist(), strict=True)
        rows = [Row(path, loaded.class_names[label], SPLITS[split]) for path, label, split in columns]
        notices = (text for text in loaded.notices if "left out" not in text)
        findings += [Finding("notice", "both sides" in text, text, []) for text in notices]
    base = manifest.folder_of(root)
    inspected, errors = np.zeros(len(rows), INSPECTED), dict[int, str]()
    pool = ProcessPoolExecutor(usable_cores(), initializer=follow)
    try:
        results = pool.map(inspect_image, [str(base / row.path) for row in rows], chunksize=32)
        for index, (row, reason) in enumerate(progress(results, total=len(rows))):
            inspected[index] = row
            if reason:
                errors[index] = reason
    except BrokenProcessPool as error:
        raise FailedRun(
            "A process that reads images was killed, perhaps for lack of memory; run check alone."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return _report(base, rows, inspected, errors, findings, skipped)


def _report(
    base: Path,
    rows: list[Row],
    inspected: npt.NDArray[np.void],
    errors: dict[int, str],
    findings: list[Finding],
    skipped: Skipped,
) -> Report:
    readable = np.ones(len(rows), dtype=bool)
    readable[list(errors)] = False
    good = inspected[readable] if readable.any() else inspected
    is_constant = inspected["thumbnail"].std(axis=1) < CONSTANT
    leave_out = {rows[index].path: f"unreadable: {reason}" for index, reason in errors.items()}

    def add(kind: str, problem: bool, what: str, paths: list[list[str]], noun: str = "image") -> None:
        if paths:
            findings.append(Finding(kind, problem, there_are(len(paths), noun, what), paths))

    first = {(rows[index].label, rows[index].split): index for index in reversed(errors)}
    for index in np.flatnonzero(readable).tolist():
        first.pop((rows[index].label, rows[index].split), None)
    lost = [[f"{label} ({split or 'all'}): {rows[i].path}: {errors[i]}"] for (label, split), i in sorted(first.items())]
    add("unreadable-class", True, "in which a class has no readable image", lost, "split")
    add("unreadable", True, "that cannot be read", [[f"{rows[index].path}: {errors[index]}"] for index in errors])
    for kind, what, groups in duplicates.groups(rows, inspected, np.flatnonzero(readable & ~is_constant)):
        add(kind, True, f"of {what}", [[rows[index].path for index in group] for group in groups], "group")
        for group in groups:
            keep = max(group, key=lambda index: (SPLITS.index(rows[index].split or "train"), -index))
            for index in group:
                if kind.endswith("label") or index != keep:
                    others = (other for other in group if rows[other].label != rows[index].label)
                    leave_out.setdefault(rows[index].path, f"{what}: {rows[next(others, keep)].path}")
    format_of = Image.registered_extensions() | dict.fromkeys((".heic", ".heif", ".hif"), "HEIF")
    named = np.array([format_of.get(Path(row.path).suffix.lower(), "").encode() for row in rows])
    formats = np.where(inspected["format"] == b"MPO", b"JPEG", inspected["format"])  # MPO: a phone's JPEG
    formats = named if shards.is_shards(base) else formats  # `shard` changes formats, and no names
    longer, shorter = inspected["size"].max(axis=1), inspected["size"].min(axis=1)
    usual = np.median(good["size"].min(axis=1))
    common = Counter(good["mode"].tolist()).most_common(1)[0][0]
    for kind, problem, what, condition in (
        ("ending", True, "with the file name extension of another format", named != formats),
        ("constant", True, "of a single colour", is_constant),
        ("size", False, f"far from the usual size of {usual:.0f} px", (shorter < usual / 4) | (shorter > usual * 4)),
        ("aspect", False, "with one side more than 3 times as long as the other", longer > 3 * shorter),
        ("mode", False, f"with another colour mode than the usual {common.decode()}", inspected["mode"] != common),
        ("rotated", False, "turned by an EXIF orientation, which training follows", inspected["rotated"]),
        ("no-data", False, "with no-data values, which become black or white", inspected["no_data"]),
        ("deep", False, "with 16 or 32 bits, scaled to 8", np.isin(inspected["mode"].astype("S1"), [b"I", b"F"])),
    ):
        add(kind, problem, what, [[rows[index].path] for index in np.flatnonzero(condition & readable)])
    findings += classes(rows)
    for kind, names in skipped.items():
        problem = kind not in (HIDDEN, NOT_IMAGE, NOT_SPLIT, OURS, TOOL, UNREAD)
        add("skipped", problem, f"left out: {kind}", [[name] for name in names], "path")
    findings.sort(key=lambda finding: (not finding.problem, finding.kind != "unreadable-class"))
    mean = good["mean"].mean(axis=0)
    std = np.sqrt(np.maximum(good["square"].mean(axis=0) - np.square(mean), 0))
    return Report(rows, findings, leave_out, mean.tolist(), std.tolist())


def there_are(count: int, noun: str, what: str) -> str:
    """A sentence about a number of images, classes or other things."""
    plural = "classes" if noun == "class" else f"{noun}s"
    return f"There is 1 {noun} {what}." if count == 1 else f"There are {count:,} {plural} {what}."


def classes(rows: list[Row]) -> Iterator[Finding]:
    """Findings about the number of training images of each class."""
    train = Counter(row.label for row in rows if row.split in ("train", ""))
    if few := [[f"{label}: {count}"] for label, count in sorted(train.items()) if count < SMALL_CLASS]:
        text = there_are(len(few), "class", f"with fewer than {SMALL_CLASS} training images")
        yield Finding("small-class", True, text, few)
    if train and max(train.values()) > IMBALANCE * min(train.values()):
        most, least = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        text = f"{most} has {train[most] / train[least]:.0f} times as many images as {least}; see fit --data.balance."
        yield Finding("imbalance", True, text, [])
