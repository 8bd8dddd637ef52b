"""metrics.csv and TensorBoard's event files, of which a resumed fit shows no point twice."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from project import runs
from project.training.resume import Run, rank


class MetricsFile(Logger):
    """Appends a row to the run's metrics.csv for each call; a new column rewrites the file atomically.

    Lightning's CSVLogger deletes an existing file and rewrites the header in place.
    """

    name, version = runs.METRICS, ""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._columns, rows = runs.read_metrics(file)
        self.rows = len(rows)  # logged so far

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": self.rows if step is None else step}
        columns = sorted({*self._columns, *row})
        if columns != self._columns:
            runs.write_metrics(self._file, columns, [*runs.read_metrics(self._file)[1], row])
        else:
            size = self._file.stat().st_size
            try:
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    csv.DictWriter(stream, columns).writerow(row)
            except OSError:
                os.truncate(self._file, size)  # no part of a row stays on a full disk
                raise
        self._columns, self.rows = columns, self.rows + 1


def loggers(run: Run) -> list[Logger]:
    """TensorBoard's event files and metrics.csv; those of a resumed run end at the position of its checkpoint."""
    metrics, folders, purge = run.folder / runs.METRICS, (run.folder.parent.parent, run.folder.parent.name), None
    if run.resumed:
        # a validation comes next, and no fit has gone beyond: the training points of its step stay
        purge = run.state.step + run.state.validate
        columns, rows = runs.read_metrics(metrics)
        if columns and rank() == 0:
            runs.write_metrics(metrics, columns, rows[: run.state.rows])
    return [
        TensorBoardLogger(*folders, run.folder.name, default_hp_metric=False, purge_step=purge),
        MetricsFile(metrics),
    ]
