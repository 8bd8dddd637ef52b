"""Labels pictures with a checkpoint: python -m project.cli predict runs/digits/version_0 photos/ --out labels.csv."""

import contextlib
import glob
import heapq
import io
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from project import bundle, files, predictions, runs
from project.data import folders, manifest
from project.data.rows import Texts
from project.errors import FailedRun, UserError
from project.predictions import Prediction

if TYPE_CHECKING:
    from rich.progress import Progress

STREAM = "-"  # standard input among pictures, standard output as --out


def predict(
    checkpoint: str,
    pictures: list[str],
    /,
    out: str = "predictions.csv",
    top: int | None = None,
    min_confidence: float | None = None,
    tta: bool = False,
    calibrated: bool = False,
    overwrite: bool = False,
    batch_size: int = 64,
    workers: int | None = None,
    devices: int = 1,
) -> int:
    """Labels pictures and writes one row for each, in the order given.

    An unreadable picture gets a row with its error; where all are unreadable, the exit code is 1.

    Args:
        checkpoint: A best.ckpt or last.ckpt, a run's folder, or a bundle that `export` has made.
        pictures: Files, folders (all pictures in them and below), patterns like "photos/*.jpg", CSV files with a column
            path, and perhaps true or label, which says what the pictures are, and - for a list on standard input; in
            any mix.
        out: The CSV file to write; must not exist. A dash means standard output.
        top: Print so many likeliest classes of each picture, too, one line a picture.
        min_confidence: Add a column abstained: 1 where the likeliest class has a lower probability than this, else 0.
            The label stays what is likeliest.
        tta: Test-time augmentation: the mean over each picture and its mirror image, in twice the time.
        calibrated: Use the temperature that `report` has found, so that probabilities mean what they say.
        overwrite: Replace the output if it exists, once the new one is complete.
        batch_size: Pictures at a time.
        workers: Threads that read pictures; by default as many as there are cores.
        devices: Processes that share the pictures: one an accelerator, or several on the processor.
    """
    for option, value in (("batch_size", batch_size), ("workers", workers), ("top", top), ("devices", devices)):
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1.")
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UserError(f"--min_confidence is {min_confidence}; it must be a probability, from 0 to 1.")
    if out == STREAM and top is not None:
        raise UserError("--top prints on standard output, where --out - writes; give --out a file.")
    if out != STREAM:
        files.require_new(Path(out), "out", overwrite)
    if not bundle.is_bundle(checkpoint):
        runs.find(checkpoint)
    paths, true = gather(pictures)
    if devices > 1:
        try:
            from project import spread  # Lightning: only where its Trainer is needed
        except ModuleNotFoundError as error:
            raise UserError(f"--devices needs {error.name}, which is not installed; leave it out.") from error
        names, stream = spread.predict(checkpoint, paths, devices, calibrated, tta, batch_size, workers)
    else:
        from project.predictor import load  # not before the arguments are known to be right

        predictor = load(checkpoint, calibrated)
        names, stream = predictor.class_names, predictor.stream(paths, batch_size, workers, tta)
    counts, speaks = Counts(), out == STREAM or top is not None
    with _told(out), contextlib.closing(stream), _progress(speaks) as progress:
        shown = counts.of(progress.track(stream, len(paths), description="predict"))
        labelled = (prediction.labelled(label) for prediction, label in zip(shown, true, strict=True))
        rows = labelled if top is None else _printed(labelled, names, top)
        if out == STREAM:
            with _standard_output() as output:
                predictions.write_into(output, rows, names, min_confidence)
        else:
            files.sweep(Path(out).absolute().parent)  # what a killed one has left
            predictions.write(Path(out), rows, names, min_confidence)
        sys.stdout.flush()
    print(f"{counts}: {out}", file=sys.stderr if speaks else sys.stdout)
    if not counts.labelled:
        raise FailedRun(f"No picture can be read; the column error of {out} says why.")
    return 0


class Counts:
    """How many pictures were labelled, and how many could not be read."""

    def __init__(self) -> None:
        self.labelled = self.unreadable = 0

    def of(self, stream: Iterable[Prediction]) -> Iterator[Prediction]:
        """Counts what passes."""
        for prediction in stream:
            self.labelled += not prediction.error
            self.unreadable += bool(prediction.error)
            yield prediction

    def __str__(self) -> str:
        return f"{self.labelled:,} picture{'s' * (self.labelled != 1)} labelled, {self.unreadable:,} unreadable"


def _progress(speaks: bool) -> "Progress":
    """A bar on standard error; none where results go to the same terminal."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not sys.stderr.isatty() or (speaks and sys.stdout.isatty())
    # redirected, what is printed on standard output would come out on standard error
    return Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)


def _printed(stream: Iterable[Prediction], class_names: Sequence[str], top: int) -> Iterator[Prediction]:
    for prediction in stream:
        print(line(prediction, class_names, top))
        yield prediction


def line(prediction: Prediction, class_names: Sequence[str], top: int) -> str:
    """A picture and its likeliest classes, the likeliest first, or why it could not be read.

    Args:
        prediction: What is told.
        class_names: K names.
        top: How many; above K it means K.
    """
    numbers = prediction.probabilities
    best = heapq.nlargest(top, range(len(numbers)), key=numbers.__getitem__)
    told = ", ".join(f"{class_names[place]} {numbers[place]:.4f}" for place in best)
    text = f"{prediction.path}: {prediction.error or told}"
    return re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], text)  # a name may have line ends


@contextlib.contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output with a file's encoding and line ends."""
    output = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield output
    finally:
        output.detach()  # flushes, and leaves it open


@contextlib.contextmanager
def _told(out: str) -> Iterator[None]:
    """Says in a sentence what goes wrong in writing."""
    try:
        yield
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise FailedRun("Standard output was closed before all was written.") from error
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file.") from error


def gather(pictures: Iterable[str]) -> tuple[Texts, Iterable[str]]:
    """The pictures that are meant and what they are said to be, held in little memory.

    Args:
        pictures: As for `expand`.

    Returns:
        N paths, and N true classes, each empty where it is unknown.

    Raises:
        UserError: As `expand`.
    """
    names: dict[str, int] = {}
    places = array("l")

    def paths() -> Iterator[str]:
        for path, true in _listed(pictures):
            places.append(names.setdefault(true, len(names)))
            yield path

    held = Texts.of(paths())
    if not held:
        raise UserError(f"There are no pictures in {' '.join(pictures)}.")
    known = list(names)
    return held, (known[place] for place in places)


def expand(pictures: Iterable[str]) -> Iterator[str]:
    """Yields the path of every picture that is meant, in the order given, as it is found.

    Args:
        pictures: Files as they are; of folders, every picture below in order of name (hidden ones are passed over); of
            patterns like photos/*.jpg, what they match; of CSV files, the column path, relative to the file; of a
            dash, the lines of standard input.

    Raises:
        UserError: A name is none of these, or means no picture.
    """
    return (path for path, _ in _listed(pictures))


def _listed(pictures: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Paths and true classes."""
    for name in pictures:
        if name == STREAM:
            yield from _listed(line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(name):  # noqa: PTH112 (False for a name that is too long, too)
            found = iter(folders.pictures(name))
            first = next(found, None)
            if first is None:
                raise UserError(f"There are no pictures in {name}.")
            yield from ((str(Path(path)), "") for path in chain([first], found))
        elif name.lower().endswith(".csv") and os.path.exists(name):  # noqa: PTH110
            table = Path(name)
            known = "true" if "true" in manifest.column_names(table) else "label"  # beside true, label is a prediction
            for path, true in manifest.columns(table, ("path", known), {"path"}, tidy=True):
                yield os.path.normpath(table.parent / path), true
        elif os.path.lexists(name):  # a dangling link exists, and gets its error row
            yield name, ""
        elif matched := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 (keeps the path as it was given)
            yield from _listed(matched)
        else:
            raise UserError(f"There is no file or folder {name}, nor a match for it.")
