"""Labels images with a checkpoint: python -m project.cli predict runs/digits/version_0 photos/ --out labels.csv."""

import heapq
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from project import files
from project.data.inputs import STREAM, gather
from project.errors import FailedRun, UserError
from project.inference import predictions
from project.inference.load import locate
from project.inference.predictions import Prediction

if TYPE_CHECKING:
    from rich.progress import Progress


def predict(
    checkpoint: str,
    images: list[str],
    /,
    out: str = "predictions.csv",
    top: PositiveInt | None = None,
    min_confidence: ClosedUnitInterval | None = None,
    tta: bool = False,
    calibrated: bool = False,
    overwrite: bool = False,
    batch_size: PositiveInt = 64,
    workers: PositiveInt | None = None,
    devices: PositiveInt = 1,
) -> int:
    """Labels images and writes one row for each, in the given order.

    An unreadable image gets a row with its error; if all are unreadable, the exit code is 1.

    Args:
        checkpoint: A best.ckpt or last.ckpt, a run's folder, or a bundle made by `export`.
        images: Files, folders (all images in them and below), patterns like "photos/*.jpg", CSV files with a column
            path and, optionally, true or label, which holds the true class, and - for a list on standard input; in
            any mix.
        out: The CSV file to write; must not exist. A dash means standard output.
        top: Also print this many of the likeliest classes of each image, one line per image.
        min_confidence: Add a column abstained: 1 where the likeliest class has a lower probability than this, else 0.
            The label stays the likeliest class.
        tta: Test-time augmentation: average over each image and its mirror image, in twice the time.
        calibrated: Use the temperature that `report` has found, so that probabilities match frequencies.
        overwrite: Replace an existing output file, once the new one is complete.
        batch_size: Images at a time.
        workers: Threads that read images; by default one per core.
        devices: Processes that share the images: one per accelerator, or several on the CPU.
    """
    to_stdout = out == STREAM
    if to_stdout and top is not None:
        raise UserError("--top prints on standard output, where --out - writes; give --out a file.")
    if not to_stdout:
        files.require_new(Path(out), "out", overwrite)
    source = locate(checkpoint)
    paths, true = gather(images)
    if devices > 1:
        try:
            from project.training import predict_devices  # only here: it imports Lightning
        except ModuleNotFoundError as error:
            raise UserError(f"--devices needs {error.name}, which is not installed; leave it out.") from error
        names, stream = predict_devices.predict(source, paths, devices, calibrated, tta, batch_size, workers)
    else:
        predictor = source.load(calibrated)
        names, stream = predictor.class_names, predictor.stream(paths, batch_size, workers, tta)
    counts, prints = Counter[str](), to_stdout or top is not None
    with _write_errors(out), closing(stream), _progress(prints) as progress:
        rows = _with_true(progress.track(stream, len(paths), description="predict"), true, counts)
        if top is not None:
            rows = _printed(rows, names, top)
        if to_stdout:
            with _standard_output() as output:
                predictions.write_into(output, rows, names, min_confidence)
        else:
            predictions.write(Path(out), rows, names, min_confidence)
        sys.stdout.flush()
    labelled, unreadable = counts["labelled"], counts["unreadable"]
    summary = f"{labelled:,} image{'s' * (labelled != 1)} labelled, {unreadable:,} unreadable: {out}"
    print(summary, file=sys.stderr if prints else sys.stdout)
    if not labelled:
        raise FailedRun(f"No image can be read; the column error of {out} has the reasons.")
    return 0


def _with_true(stream: Iterable[Prediction], true: Iterable[str], counts: Counter[str]) -> Iterator[Prediction]:
    for prediction, label in zip(stream, true, strict=True):
        counts["unreadable" if prediction.error else "labelled"] += 1
        yield prediction.labelled(label)


def _printed(stream: Iterable[Prediction], class_names: Sequence[str], top: int) -> Iterator[Prediction]:
    """Prints each image with its likeliest classes, or with the reason why it could not be read."""
    for prediction in stream:
        numbers = prediction.probabilities
        best = heapq.nlargest(top, range(len(numbers)), key=numbers.__getitem__)
        classes = ", ".join(f"{class_names[index]} {numbers[index]:.4f}" for index in best)
        line = f"{prediction.path}: {prediction.error or classes}"
        print(re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], line))  # a name may contain line breaks
        yield prediction


def _progress(prints: bool) -> "Progress":
    """A progress bar on standard error; hidden where results go to the same terminal."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not sys.stderr.isatty() or (prints and sys.stdout.isatty())
    # redirect_stdout would send standard output to standard error
    return Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)


@contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output with a file's encoding and line ends."""
    output = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield output
    finally:
        output.detach()  # flushes, and leaves it open


@contextmanager
def _write_errors(out: str) -> Iterator[None]:
    """Turns an error in writing the output into one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise  # cli.main ends quietly
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file.") from error
