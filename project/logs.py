"""metrics.csv and TensorBoard's files: points wait while the disk is full; where a fit goes on, none is there twice."""

import contextlib
import csv
import io
import itertools
import os
import platform
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from project import curves, files

_serial = itertools.count()


class MetricsFile(Logger):
    """Writes what is logged into the run's metrics.csv, a row each time.

    Lightning's CSVLogger deletes the file when it finds one, and writes a changed header over it in place. Here rows
    are appended whole, and a file with new columns takes the old one's place.

    Args:
        run: The run's folder; rows that are there stay.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._file = run / curves.METRICS
        self._columns: list[str] = []
        self._waiting: list[dict[str, float]] = []
        self.trouble = ""  # why the last write failed, perhaps half-way
        self.rows = 0  # logged so far
        if self._file.exists():
            self._columns, rows = curves.read(self._file)
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
            if columns != self._columns or self.trouble:
                old = curves.read(self._file)[1][: self.rows - len(self._waiting)] if self._file.exists() else []
                curves.write(self._file, columns, [*old, *self._waiting])
            else:
                text = io.StringIO(newline="")
                csv.DictWriter(text, columns).writerows(self._waiting)
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    stream.write(text.getvalue())
        except OSError as error:
            self.trouble = _told(self._file, error, self.trouble)
            return
        self._columns, self._waiting, self.trouble = columns, [], ""


class Board(TensorBoardLogger):
    """Lightning's logger for TensorBoard, which a full disk does not stop.

    Args:
        run: The run's folder.
        after: Step after which a TensorBoard that is open shall forget what it has seen; None for a run that begins.
    """

    def __init__(self, run: Path, after: int | None = None) -> None:
        super().__init__(run.parent.parent, run.parent.name, run.name, default_hp_metric=False)
        self._after = after

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
            if self._after is not None:
                event = Event(step=self._after + 1, session_log=SessionLog(status=SessionLog.START))
                self._experiment.file_writer.add_event(event, self._after + 1)
        return self._experiment

    @property
    def trouble(self) -> str:
        """Why what is logged cannot be written; empty where it can."""
        writer: Any = self._experiment
        return writer.file_writer.event_writer.trouble if writer is not None else ""


class EventFile:
    """An event file that grows by whole records, each written when the disk takes it.

    TensorBoard's own writes in a thread, which dies where the disk is full and leaves a record cut off.

    Args:
        folder: Where it is made.
    """

    def __init__(self, folder: str) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}.{next(_serial):04d}"
        self._file = Path(folder, name)
        self._waiting, self._size = io.BytesIO(), 0
        self.trouble = ""  # why the last write failed
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def get_logdir(self) -> str:
        """The folder it is in."""
        return str(self._file.parent)

    def add_event(self, event: Any) -> None:
        """Adds a record."""
        RecordWriter(self._waiting).write(event.SerializeToString())

    def flush(self) -> None:
        """Writes the records that wait; where they cannot be written, they wait on."""
        if not (records := self._waiting.getvalue()):
            return
        try:
            with self._file.open("ab", buffering=0) as stream:
                rest = memoryview(records)
                while rest:  # a full disk takes a part, and says so at the next call
                    rest = rest[stream.write(rest) :]
        except OSError as error:
            self.trouble = _told(self._file, error, self.trouble)
            with contextlib.suppress(OSError):
                os.truncate(self._file, self._size)
            return
        self._waiting, self._size, self.trouble = io.BytesIO(), self._size + len(records), ""

    close = flush

    def reopen(self) -> None:
        """Nothing: it is open while it is written."""


class _Events(FileWriter):
    def __init__(self, folder: str) -> None:
        self.event_writer: Any = EventFile(folder)


class _Writer(SummaryWriter):
    """TensorBoard's writer, into an `EventFile`."""

    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            self.file_writer = _Events(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer


def _told(file: Path, error: OSError, before: str) -> str:
    """Says once why a log cannot be written, and gives the reason."""
    if not before:
        print(f"{file}: {error.strerror}; what is logged waits until it can be written", flush=True)
    return error.strerror or str(error)


def rewind(run: Path, rows: int, step: int, time: float) -> None:
    """Takes back what a fit has logged after the place that it goes on from.

    Args:
        run: The run's folder.
        rows: Of metrics.csv that are from before.
        step: That the next point will have.
        time: When the place was passed, in seconds since the epoch: points of `step` itself are from before and after.
    """
    if (metrics := run / curves.METRICS).exists():
        columns, lines = curves.read(metrics)
        curves.write(metrics, columns, lines[:rows])
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
