"""metrics.csv and TensorBoard's event files, of which a resumed fit shows no point twice."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from project import runs
from project.training.resume import Run


class MetricsFile(Logger):
    """Appends a row to the run's metrics.csv for each call; a new column rewrites the file atomically.

    Lightning's CSVLogger deletes an existing file and rewrites the header in place. This one keeps `rows` of its rows,
    by default all.
    """

    name, version = runs.METRICS, ""

    def __init__(self, file: Path, rows: int | None = None) -> None:
        super().__init__()
        self._file = file
        self._columns, logged = runs.read_metrics(file)
        self.rows = len(logged[:rows])  # logged so far

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
    folders = run.folder.parent.parent, run.folder.parent.name
    # a validation comes next, and no fit has gone beyond: the training points of its step stay
    purge = run.state.step + run.state.validate if run.resumed else None
    return [
        TensorBoardLogger(*folders, run.folder.name, default_hp_metric=False, purge_step=purge),
        MetricsFile(run.folder / runs.METRICS, run.state.rows if run.resumed else None),
    ]
