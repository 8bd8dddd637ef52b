"""metrics.csv and TensorBoard's event files, of which a resumed fit shows no point twice."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from project import runs
from project.errors import FailedRun


class MetricsFile(Logger):
    """Appends a row to the run's metrics.csv for each call; a new column rewrites the file atomically.

    Lightning's CSVLogger deletes an existing file and rewrites the header in place.

    Args:
        run: The run's folder; rows that are there stay.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._file = run / runs.METRICS
        self._columns: list[str] = []
        self._waiting: list[dict[str, float]] = []
        self._trouble = ""  # why the last write failed, perhaps half-way
        self.rows = 0  # logged so far
        if self._file.exists():
            self._columns, rows = runs.read_metrics(self._file)
            self.rows = len(rows)

    @property
    def name(self) -> str:
        return self._file.parent.parent.name

    @property
    def version(self) -> str:
        return self._file.parent.name

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._waiting.append({**metrics, "step": self.rows if step is None else step})
        self.rows += 1

    def save(self) -> None:
        """Writes the waiting rows; where they cannot be written, they keep waiting."""
        if not self._waiting:
            return
        columns = sorted(set(self._columns).union(*self._waiting))
        try:
            if columns != self._columns or self._trouble:
                old = runs.read_metrics(self._file)[1][: self.rows - len(self._waiting)] if self._file.exists() else []
                runs.write_metrics(self._file, columns, [*old, *self._waiting])
            else:
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    csv.DictWriter(stream, columns).writerows(self._waiting)
        except OSError as error:
            if not self._trouble:
                print(f"{self._file}: {error.strerror}; the rows wait until they can be written", flush=True)
            self._trouble = error.strerror or str(error)
            return
        self._columns, self._waiting, self._trouble = columns, [], ""

    def require_written(self) -> None:
        """Raises FailedRun where rows still wait for room on the disk."""
        if self._trouble:
            raise FailedRun(f"The last rows of {self._file} could not be written: {self._trouble}.")


def tensorboard_logger(run: Path, purge_step: int | None = None) -> TensorBoardLogger:
    """TensorBoard's event files in a run's folder; from `purge_step` on, those of an interrupted fit are hidden."""
    folders = run.parent.parent, run.parent.name, run.name
    return TensorBoardLogger(*folders, default_hp_metric=False, purge_step=purge_step)


def truncate(run: Path, rows: int) -> None:
    """Cuts a run's metrics.csv down to its first rows, those before the checkpoint that a fit is resumed from."""
    if (metrics := run / runs.METRICS).exists():
        columns, lines = runs.read_metrics(metrics)
        runs.write_metrics(metrics, columns, lines[:rows])
