"""metrics.csv, and how a run's logs go back to the place from which a fit goes on: no point twice, none missing."""

import csv
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event

from project import files

METRICS = "metrics.csv"


class MetricsFile(Logger):
    """Writes what is logged into the run's metrics.csv, a row each time.

    Lightning's CSVLogger deletes the file when it finds one, and writes a changed header over it in place. Here rows
    are appended whole, and a file with new columns takes the old one's place.

    Args:
        run: The run's folder; rows that are there stay.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._file = run / METRICS
        self._columns: list[str] = []
        self._waiting: list[dict[str, float]] = []
        self._torn = False  # the last write failed half-way
        self.rows = 0  # logged so far
        if self._file.exists():
            self._columns, rows = read(self._file)
            self.rows = len(rows)

    @property
    def name(self) -> str:
        """The run's name."""
        return self._file.parent.parent.name

    @property
    def version(self) -> str:
        """The run's folder in it."""
        return self._file.parent.name

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row."""
        self._waiting.append({**metrics, "step": self.rows if step is None else step})
        self.rows += 1

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait; where they cannot be written, they wait on."""
        if not self._waiting:
            return
        columns = sorted(set(self._columns).union(*self._waiting))
        try:
            if columns != self._columns or self._torn:
                old = read(self._file)[1][: self.rows - len(self._waiting)] if self._file.exists() else []
                write(self._file, columns, [*old, *self._waiting])
            else:
                text = io.StringIO(newline="")
                csv.DictWriter(text, columns).writerows(self._waiting)
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    stream.write(text.getvalue())
        except OSError as error:
            if not self._torn:
                print(f"{self._file}: {error.strerror}; its rows wait until they can be written", flush=True)
            self._torn = True
            return
        self._columns, self._waiting, self._torn = columns, [], False


def read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a metrics.csv; one that was cut off while it was written is left out."""
    text = file.read_text(encoding="utf-8")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def write(file: Path, columns: list[str], rows: list[Any]) -> None:
    """Writes a metrics.csv, whole or not at all."""
    with files.replacing(file) as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def rewind(run: Path, rows: int, step: int, time: float) -> None:
    """Takes back what a fit has logged after the place that it goes on from.

    Args:
        run: The run's folder.
        rows: Of metrics.csv that are from before.
        step: That the next point will have.
        time: When the place was passed, in seconds since the epoch: points of `step` itself are from before and after.
    """
    if (metrics := run / METRICS).exists():
        columns, lines = read(metrics)
        write(metrics, columns, lines[:rows])
    for file in sorted(run.glob("events.out.tfevents.*")):
        kept = bytearray()
        for record, event in _events(file.read_bytes()):
            head = event.WhichOneof("what") == "file_version"
            if head or event.step < step or (event.step == step and event.wall_time <= time):
                kept += record
        with files.replacing_bytes(file) as stream:
            stream.write(kept)


def _events(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """The whole records of an event file, and what is in them: TFRecord's length, checksum, data, checksum."""
    start = 0
    while start + 12 <= len(content):
        end = start + 16 + struct.unpack_from("<Q", content, start)[0]
        if end > len(content):  # the process was killed while it wrote this one
            return
        yield content[start:end], Event.FromString(content[start + 12 : end - 4])
        start = end
