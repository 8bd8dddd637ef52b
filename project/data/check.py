"""Dataset checks: inspects every image and lists findings, the worst first."""

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
from project.data.folders import ScanLog
from project.data.splits import SPLITS, Row
from project.data.workers import usable_cores
from project.errors import UserError

SIDE = 16  # of the thumbnail, in pixels
CONSTANT = 2.0  # standard deviation of the thumbnail's grey levels below which an image shows nearly nothing
ONES = np.full(1024, 1 / 1024, dtype=np.float32)
SMALL_CLASS, IMBALANCE = 10, 10.0
CHUNK = 32  # images a task of a worker process
INSPECTED = np.dtype(
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
    """One kind of finding.

    Attributes:
        kind: An identifier for programs.
        problem: Whether to look at it before training; otherwise it is for information.
        sentence: What was found.
        paths: The images; those that belong together are in one entry.
    """

    kind: str
    problem: bool
    sentence: str
    paths: list[list[str]]


@dataclass(frozen=True)
class Report:
    """The result of the checks of a data set.

    Attributes:
        rows: Path, label and split of every image.
        findings: The worst first.
        leave_out: Path and reason of the images to exclude from training.
        mean: Of the readable images' pixels, a channel each, 0 to 1.
        std: Their standard deviation.
    """

    rows: list[Row]
    findings: list[Finding]
    leave_out: dict[str, str]
    mean: list[float]
    std: list[float]

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class in each split."""
        counted = Counter((row.label, row.split) for row in self.rows)
        return {label: {s: counted[label, s] for s in SPLITS} for label in sorted({row.label for row in self.rows})}


def inspect_image(path: str) -> npt.NDArray[np.void]:
    """Decodes one image; a row of `INSPECTED`.

    Raises:
        ImageError: The image cannot be read.
    """
    row = np.zeros((), INSPECTED)
    with images.opened(path) as image:
        row["format"], row["mode"], row["size"] = image.format, image.mode, image.size
        row["rotated"] = image.getexif().get(images.ORIENTATION, 1) not in (0, 1)
        content = Path(path).read_bytes()
        images.require_short_decoding(content, path)
        row["digest"] = np.frombuffer(hashlib.sha256(content).digest()[:16], np.uint64)
        image.draft(image.mode, (96, 96))  # a JPEG is read to its end, but decoded at a fraction of its size
        images.upright(image)
        plain = image if images.is_plain_grey(image) else images.to_rgb(image)
        sample = np.asarray(plain.resize((32, 32), Image.Resampling.NEAREST), dtype=np.float32).reshape(1024, -1)
        small = plain.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=4.0).convert("L")
    sample /= 255
    mean, products = ONES @ sample, sample.T @ sample / 1024  # of a grey image, the same for each channel
    row["mean"], row["square"] = mean, np.diagonal(products)
    row["thumbnail"] = np.frombuffer(small.tobytes(), np.uint8)
    return row


def inspect_images(paths: list[str]) -> tuple[npt.NDArray[np.void], dict[int, str]]:
    """Rows of `INSPECTED`, and by index the reasons why images cannot be read."""
    rows, errors = np.zeros(len(paths), INSPECTED), {}
    for index, path in enumerate(paths):
        try:
            rows[index] = inspect_image(path)
        except images.ImageError as error:
            errors[index] = error.reason
    return rows, errors


def check_dataset(root: Path, progress: Any = None) -> Report:
    """Inspects every image of a data set.

    Args:
        root: A folder or CSV file, as `manifest.load` takes it.
        progress: Wraps the iterator over the chunks, given it and their number.

    Raises:
        UserError: There is no image.
    """
    log = ScanLog()
    rows = sorted(manifest.scan(root, log))
    if not rows:
        raise UserError(f"No images in {root}; expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.")
    findings: list[Finding] = []
    try:
        loaded = manifest.load(root)
    except UserError as error:
        findings.append(Finding("refused", True, f"fit would refuse this: {error}", []))
    else:
        columns = zip(loaded.paths, loaded.labels.tolist(), loaded.splits.tolist(), strict=True)
        rows = [Row(path, loaded.class_names[label], SPLITS[split]) for path, label, split in columns]
        notices = [text for text in loaded.notices if "left out" not in text]
        findings += [Finding("notice", "both sides" in text, text, []) for text in notices]
    base = root.parent if root.is_file() else root
    paths = [str(base / row.path) for row in rows]
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    inspected = np.zeros(len(rows), INSPECTED)
    errors: dict[int, str] = {}
    with ProcessPoolExecutor(usable_cores()) as pool:
        results: Iterator[Any] = pool.map(inspect_images, chunks)
        for number, (part, failed) in enumerate(progress(results, len(chunks)) if progress else results):
            inspected[number * CHUNK : number * CHUNK + len(part)] = part
            errors |= {number * CHUNK + index: reason for index, reason in failed.items()}
    return _report(rows, inspected, errors, findings, log)


def _report(
    rows: list[Row], inspected: npt.NDArray[np.void], errors: dict[int, str], findings: list[Finding], log: ScanLog
) -> Report:
    readable = np.ones(len(rows), dtype=bool)
    readable[list(errors)] = False
    is_constant = inspected["thumbnail"].std(axis=1) < CONSTANT
    leave_out = {rows[index].path: f"unreadable: {reason}" for index, reason in errors.items()}

    def add(kind: str, problem: bool, what: str, paths: Iterable[Sequence[str]]) -> None:
        if listed := [list(entry) for entry in paths]:
            findings.append(Finding(kind, problem, f"{len(listed):,} {what}", listed))

    def where(condition: npt.NDArray[np.bool_]) -> list[list[str]]:
        return [[rows[index].path] for index in np.flatnonzero(condition & readable)]

    add("unreadable", True, "cannot be read", ([f"{rows[index].path}: {errors[index]}"] for index in errors))
    for kind, what, groups in duplicates.groups(rows, inspected, np.flatnonzero(readable & ~is_constant)):
        add(kind, True, what, ([rows[index].path for index in group] for group in groups))
        for group in groups:
            keep = max(group, key=lambda index: (SPLITS.index(rows[index].split or "train"), -index))
            for index in group:
                if kind.endswith("label") or index != keep:
                    leave_out.setdefault(rows[index].path, f"{what}: {rows[keep].path}")
    format_of = Image.registered_extensions()
    formats = [name.decode().replace("MPO", "JPEG") for name in inspected["format"].tolist()]  # MPO: a phone's JPEG
    endings = [Path(row.path).suffix.lower() for row in rows]
    odd = [format_of.get(ending) != name for ending, name in zip(endings, formats, strict=True)]
    add("ending", True, "with the ending of another format", where(np.array(odd)))
    add("constant", True, "look like a single colour", where(is_constant))
    findings += classes(rows)
    for kind, (count, names) in log.skipped.items():
        problem = kind in ("folder without images", "not inside a class folder")
        findings.append(Finding("skipped", problem, f"{count:,} left out, {kind}", [[name] for name in names]))
    good = inspected[readable]
    if len(good):
        longer, shorter = inspected["size"].max(axis=1), inspected["size"].min(axis=1)
        usual = np.median(good["size"].min(axis=1))
        far = (shorter < usual / 4) | (shorter > usual * 4)
        add("size", False, f"far from the usual size ({usual:.0f} px)", where(far))
        add("aspect", False, "with one side more than 3 times the other", where(longer > 3 * shorter))
        common = Counter(good["mode"].tolist()).most_common(1)[0][0]
        add("mode", False, f"of another mode than {common.decode()}", where(inspected["mode"] != common))
        rotated = "turned by their EXIF orientation (training turns them too)"
        add("rotated", False, rotated, where(inspected["rotated"]))
        deep = np.char.startswith(inspected["mode"], b"I") | np.char.startswith(inspected["mode"], b"F")
        add("deep", False, "of 16 bits or more (scaled to 8)", where(deep))
    findings.sort(key=lambda finding: not finding.problem)
    mean = good["mean"].mean(axis=0) if len(good) else np.full(3, np.nan)
    std = np.sqrt(np.maximum(good["square"].mean(axis=0) - np.square(mean), 0)) if len(good) else mean
    return Report(rows, findings, leave_out, mean.tolist(), std.tolist())


def classes(rows: list[Row]) -> Iterator[Finding]:
    """Findings about the number of training images of each class."""
    train = Counter(row.label for row in rows if row.split in ("train", ""))
    if few := [[f"{label}: {count}"] for label, count in sorted(train.items()) if count < SMALL_CLASS]:
        yield Finding("small-class", True, f"{len(few):,} classes with fewer than {SMALL_CLASS} training images", few)
    if train and max(train.values()) > IMBALANCE * min(train.values()):
        most, least = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        text = f"{most} has {train[most] / train[least]:.0f} times the images of {least}; see --data.balance"
        yield Finding("imbalance", True, text, [])
