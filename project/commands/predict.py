"""Labels images with a checkpoint: python -m project.cli predict runs/digits/version_0 photos/ --out labels.csv."""

import heapq
import io
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, OpenUnitInterval, PositiveInt

from project import files
from project.data.inputs import STREAM, gather
from project.errors import FailedRun, UserError, one_line
from project.inference import predict_devices, predictions
from project.inference.load import locate
from project.inference.predictions import Prediction


def predict(
    checkpoint: str,
    images: list[str],
    /,
    out: str | None = None,
    top: PositiveInt | None = None,
    min_confidence: ClosedUnitInterval | None = None,
    unknown: OpenUnitInterval | None = None,
    tta: bool = False,
    calibrated: bool = False,
    overwrite: bool = False,
    batch_size: PositiveInt = 64,
    workers: PositiveInt | None = None,
    devices: PositiveInt = 1,
    trust: tuple[str, ...] = (),
) -> int:
    """Labels images, and writes one row for each, in the given order; of a single one, prints the likeliest classes.

    An unreadable image gets a row with its error; if all are unreadable, the exit code is 1.

    Args:
        checkpoint: A best.ckpt or last.ckpt, a run's folder, or a bundle made by `export`.
        images: Files, folders (all images in them and below), patterns like "photos/*.jpg", CSV files with a column
            path and, optionally, true or label, which holds the true class, and - for a list on standard input; in
            any mix.
        out: The CSV file to write; must not exist. A dash means standard output. By default none for a single image,
            otherwise predictions.csv, or where that exists predictions-2.csv and so on.
        top: Also print this many of the likeliest classes of each image, one line per image.
        min_confidence: Add a column abstained: 1 where the likeliest class has a lower probability than this, else 0.
            The label stays the likeliest class.
        unknown: Add a column unknown, a hint: 1 where the image may be of none of the classes, because its maximum
            logit is lower than those of the validation images, except this share of them, such as 0.05: false alarms.
        tta: Test-time augmentation: average over each image and its mirror image, in twice the time.
        calibrated: Use the temperature that `report` has found, so that probabilities match frequencies.
        overwrite: Replace an existing output file, once the new one is complete.
        batch_size: Images at a time.
        workers: Threads that read images; by default one per core.
        devices: Processes that share the images: one per accelerator, or several on the CPU.
        trust: Class path of the checkpoint's network, if that is neither this package's nor a library's; repeatable.
    """
    to_stdout = out == STREAM
    if to_stdout and top is not None:
        raise UserError("--top prints on standard output, where --out - writes; give --out a file.")
    if tta and unknown is not None:
        raise UserError("The false alarms of --unknown are not known with --tta; give one of the two.")
    source = locate(checkpoint, trust)
    paths, true = zip(*gather(images), strict=True)
    if out is None and len(paths) > 1:
        out = "predictions.csv" if overwrite else str(files.unused(Path("predictions.csv")))
    top = top or (None if out else 3)
    if out and not to_stdout:
        files.require_new(Path(out), "out", overwrite)
    if devices > 1:
        metadata, stream = predict_devices.predict(source, paths, devices, calibrated, tta, batch_size, workers)
    else:
        predictor = source.load(calibrated)
        metadata, stream = predictor.metadata, predictor.stream(paths, batch_size, workers, tta)
    names = metadata.class_names
    threshold, alarms = (None, "") if unknown is None else metadata.unknown_below(unknown)
    from rich.console import Console  # after the mistakes, which need none of it
    from rich.progress import Progress

    counts, prints = Counter[bool](), to_stdout or top is not None
    hidden = not sys.stderr.isatty() or (prints and sys.stdout.isatty())  # results go to the same terminal
    # redirect_stdout would send standard output to standard error
    bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)
    with closing(stream), bar as progress:
        rows = _labelled(progress.track(stream, len(paths), description="predict"), true, counts)
        if top is not None:
            rows = (_print(row, names, top, min_confidence or 0, threshold or 0) for row in rows)
        try:
            if out is None:
                deque(rows, maxlen=0)
            elif to_stdout:
                if isinstance(sys.stdout, io.TextIOWrapper):  # as in a file
                    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
                predictions.write_into(sys.stdout, rows, names, min_confidence, threshold)
            else:
                predictions.write(Path(out), rows, names, min_confidence, threshold)
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # cli.main ends quietly
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file.") from error
    summary = f"{counts[True]:,} image{'s' * (counts[True] != 1)} labelled, {counts[False]:,} unreadable"
    alarms = alarms and f"; unknown also flags {alarms}"
    summary += f"{f': {out}' if out else ''} ({metadata.calibration} probabilities{alarms})"
    print(summary, file=sys.stderr if prints else sys.stdout)
    if not counts[True]:
        raise FailedRun("No image can be read" + (f"; the column error of {out} has the reasons." if out else "."))
    return 0


def _labelled(stream: Iterable[Prediction], true: Iterable[str], counts: Counter[bool]) -> Iterator[Prediction]:
    """Adds the true classes; counts the images that can be read and those that cannot."""
    for prediction, label in zip(stream, true, strict=True):
        counts[not prediction.error] += 1
        yield prediction._replace(true=label)


def _print(
    prediction: Prediction, names: Sequence[str], top: int, min_confidence: float, threshold: float
) -> Prediction:
    """Prints an image with its likeliest classes, or with the reason why it could not be read."""
    pairs = zip(names, prediction.probabilities, strict=False)  # of an unreadable image, none
    best = heapq.nlargest(top, pairs, key=itemgetter(1))
    classes = ", ".join(f"{name} {probability:.4f}" for name, probability in best)
    abstained = "; abstained" * (not prediction.error and prediction.probability < min_confidence)
    unknown = "; perhaps of none of the classes" * (prediction.max_logit < threshold)
    print(one_line(f"{prediction.path}: {prediction.error or classes}{abstained}{unknown}"))
    return prediction
