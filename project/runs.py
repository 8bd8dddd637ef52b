"""Run folders, runs/<name>/version_N: make the next one, lock it while a fit writes, read and write its files."""

import contextlib
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from project import files
from project.errors import UserError

ROOT = Path("runs")
VARIABLE = "PROJECT_RUN"  # hands the run's folder to the processes of other ranks, which run the same command
STATUS, METRICS = "status.json", "metrics.csv"  # of a fit
PREDICTIONS, VAL_PREDICTIONS = "predictions.csv", "val_predictions.csv"
TEST_METRICS, REPORT = "test_metrics.json", "report.html"
TEST_FILES = (PREDICTIONS, VAL_PREDICTIONS, TEST_METRICS, REPORT)
Curve = tuple[list[float], list[float]]  # epochs and values


class RunLock:
    """An exclusive lock on a run folder, until the process exits at most; BlockingIOError where another holds it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(ImportError):
            import fcntl  # Windows has none: two fits of one run are not noticed there

            self._descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise
            except OSError as error:  # some network file systems have no locks
                print(f"{folder.parent} cannot be locked ({error.strerror}): keep other fits out of it", flush=True)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def create_run(name: str, fill: Callable[[Path], None], root: Path = ROOT) -> tuple[Path, RunLock]:
    """Makes and locks the next root/<name>/version_N, which appears with its first files, those that `fill` writes.

    Raises UserError for a name that cannot be used (TensorBoard splits it at `,` and `:`) or a folder without access.
    """
    if name in ("", ".", "..", "latest") or Path(name).name != name or {",", ":"} & set(name):
        raise UserError(f"A run cannot be called {name!r}; give a name without / , : and other than latest by --name.")
    try:
        unfinished = files.beside(root / name / "version")
        unfinished.mkdir()
        lock = RunLock(unfinished)
        fill(unfinished)
        while True:
            numbers = [p.name.removeprefix("version_") for p in (root / name).glob("version_*")]
            run = root / name / f"version_{max((int(n) for n in numbers if n.isdigit()), default=-1) + 1}"
            try:
                unfinished.rename(run)
                break
            except OSError:
                if not run.exists():  # else another fit, started at the same time, has this number
                    raise
    except OSError as error:
        raise UserError(f"Cannot write into {root}/: {error.strerror}; check its permissions.") from error
    os.environ[VARIABLE] = str(run)
    return run, lock


def point_latest(run: Path, latest: Path) -> None:
    """Replaces `latest` by a link to the run, or by a file with its path where links are not available."""
    unfinished = files.beside(latest)
    target = os.path.relpath(run.resolve(), latest.parent.resolve())
    try:
        unfinished.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        unfinished.write_text(target, encoding="utf-8")
    unfinished.replace(latest)


def read_status(run: Path) -> dict[str, Any]:
    """The status of the run's last fit; its `state` is running (also after a kill), stopped, failed or finished."""
    file = run / STATUS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def write_status(run: Path, **entries: Any) -> None:
    """Changes some entries of a run's status."""
    files.write_json(run / STATUS, read_status(run) | entries)


def unfinished(root: Path = ROOT) -> list[Path]:
    """Runs whose fit has not finished, the newest first."""
    folders = [file.parent for file in root.glob(f"*/version_*/{STATUS}")]
    waiting = [run for run in folders if read_status(run).get("state") not in (None, "finished")]
    return sorted(waiting, key=_started, reverse=True)


def folder_of(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the folder of a checkpoint that has been moved out of its run."""
    return path.parent.parent if is_inside(path) else path.parent


def is_inside(path: Path) -> bool:
    """Whether a checkpoint lies in its run."""
    return path.parent.name == "checkpoints"


def name_of(path: Path) -> str:
    """The name of a checkpoint's run; for a checkpoint outside a run, or a bundle, its own name."""
    return folder_of(path).resolve().parent.name if is_inside(path) else path.absolute().stem


def newest_checkpoint(root: Path = ROOT) -> Path:
    """The best.ckpt of the newest run that has one; raises UserError where there is none."""
    checkpoints = list(root.glob("*/version_*/checkpoints/best.ckpt"))
    if not checkpoints:
        raise UserError(
            f"No run in {root}/ has a best.ckpt; train one first, python -m project.cli fit, or give a run."
        )
    return max(checkpoints, key=lambda file: _started(folder_of(file)))


def resolve_latest(path: Path) -> Path:
    """The run that the file runs/latest names (see `point_latest`), or the path; UserError if a link names nothing."""
    is_name = path.name == "latest" and path.is_file()
    target = path.parent / path.read_text(encoding="utf-8") if is_name else path
    if os.path.lexists(path) and not target.exists():
        raise UserError(f"{path} names {os.path.realpath(target)}, which is gone; give a run, runs/<name>/version_N.")
    return target


def resolve(path: Path) -> Path:
    """The folder that a path means, without links; relative to the current folder where it lies there."""
    folder = Path(os.path.realpath(resolve_latest(path)))  # unlike Path.resolve, passes over a link to itself
    here = Path.cwd()
    return folder.relative_to(here) if here in folder.parents else folder


def _started(run: Path) -> float:
    config = run / "config.yaml"  # written when a fit starts or is resumed
    return (config if config.exists() else run).stat().st_mtime


def read_metrics(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and complete rows of a metrics.csv, none without the file; a row that a kill has cut off is left out."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return list(reader.fieldnames or []), list(reader)


def write_metrics(file: Path, columns: list[str], rows: list[Any]) -> None:
    """Writes a metrics.csv atomically."""
    files.write_csv(file, [columns, *([row.get(name) for name in columns] for row in rows)])


def curves(file: Path) -> dict[str, Curve]:
    """Each metric of a metrics.csv over the epochs (the first is 1); empty without the file."""
    curves: dict[str, Curve] = {}
    for row in read_metrics(file)[1]:
        for name, value in row.items():
            if name.startswith(("train/", "val/")) and not name.endswith("_step") and value:
                epochs, values = curves.setdefault(name, ([], []))
                epochs.append(float(row["epoch"]) + 1)
                values.append(float(value))
    return curves
