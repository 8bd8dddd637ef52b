"""Run folders, runs/<name>/version_N: make the next one, hold it while a fit writes, and find a checkpoint in them."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from project import files
from project.errors import UserError

ROOT = Path("runs")
VARIABLE = "PROJECT_RUN"  # hands the run's folder to the processes of other ranks, which run the same command
STATUS = "status.json"


class Hold:
    """A folder that no other fit may write into; the system lets go of it however this process ends.

    Args:
        folder: Keeps its hold when it is renamed.

    Raises:
        BlockingIOError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(ImportError):
            import fcntl  # not to be had on Windows, where two fits of one run are not noticed

            self._descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise

    def release(self) -> None:
        """Lets go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def claim(name: str, fill: Callable[[Path], None], runs: Path = ROOT) -> tuple[Path, Hold]:
    """Makes the next runs/<name>/version_N, which appears with its first files in it, and points runs/latest at it.

    Args:
        name: Of the folder in `runs`.
        fill: Writes the first files into the folder that it is given.
        runs: Where runs lie.

    Returns:
        The run, held.

    Raises:
        UserError: It cannot be written.
    """
    require_name(name)
    try:
        unfinished = files.beside(runs / name / "version")
        files.sweep(unfinished.parent)
        unfinished.mkdir()
        hold = Hold(unfinished)
        fill(unfinished)
        taken = [int(n) for p in (runs / name).glob("version_*") if (n := p.name.removeprefix("version_")).isdigit()]
        number = max(taken, default=-1) + 1
        while True:
            run = runs / name / f"version_{number}"
            try:
                unfinished.rename(run)  # of two fits that start together, one gets the next number
                break
            except OSError:
                if not run.exists():
                    raise
                number += 1
        point_latest(run, runs / "latest")
    except OSError as error:
        raise UserError(
            f"Cannot write into {runs}/: {error.strerror} ({error.filename}); check its permissions."
        ) from error
    os.environ[VARIABLE] = str(run)
    return run, hold


def require_name(name: str) -> None:
    """Checks that a run can be called this.

    Raises:
        UserError: It cannot.
    """
    if (
        name in ("", ".", "..", "latest") or Path(name).name != name or {",", ":"} & set(name)
    ):  # , and : are TensorBoard's
        raise UserError(f"A run cannot be called {name!r}; give a name without / , : and other than latest by --name.")


def point_latest(run: Path, latest: Path) -> None:
    """Makes `latest` a link to the run, or a file with its path where there are no links; replaced in one step."""
    files.sweep(latest.parent)
    unfinished = files.beside(latest)
    target = str(run.relative_to(latest.parent))
    try:
        unfinished.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        unfinished.write_text(target, encoding="utf-8")
    unfinished.replace(latest)


def status(run: Path) -> dict[str, Any]:
    """How the run's last fit stands: its `state`, which is running, stopped, failed or finished, and more.

    A fit that is killed leaves it running.
    """
    try:
        content = json.loads((run / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def note(run: Path, **news: Any) -> None:
    """Changes some entries of a run's status."""
    with files.replacing(run / STATUS) as stream:
        json.dump(status(run) | news, stream, indent=2)


def unfinished(runs: Path = ROOT) -> list[Path]:
    """Runs whose fit has not come to its end, the newest first."""
    found = [file.parent for file in runs.glob(f"*/version_*/{STATUS}")]
    found = [run for run in found if status(run).get("state") not in (None, "finished")]
    return sorted(found, key=_started, reverse=True)


def folder_of(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the checkpoint's folder where it has been moved out of its run."""
    return path.parent.parent if is_inside(path) else path.parent


def is_inside(path: Path) -> bool:
    """Whether a checkpoint lies in its run."""
    return path.parent.name == "checkpoints"


def name_of(path: Path) -> str:
    """What the data of a checkpoint's run are called; of a checkpoint outside a run, or of a bundle, its own name."""
    return folder_of(path).resolve().parent.name if is_inside(path) else path.absolute().stem


def find(path: str | os.PathLike[str] | None = None, runs: Path = ROOT) -> Path:
    """The checkpoint file that is meant.

    Args:
        path: A checkpoint or a run's folder; None means the newest run that has a best.ckpt.
        runs: Where runs lie.

    Raises:
        UserError: There is none.
    """
    if path is None:
        found = sorted(runs.glob("*/version_*/checkpoints/best.ckpt"), key=lambda file: _started(folder_of(file)))
        if not found:
            raise UserError(f"No run in {runs}/ has a best.ckpt; train one first: python -m project.cli fit.")
        return found[-1]
    try:
        given = followed(Path(path))
        file = given / "checkpoints" / "best.ckpt" if given.is_dir() else given
        if file.is_file():
            return file
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"Cannot read {path}: {error.strerror}; give a .ckpt file or a run's folder.") from error
    from project import bundle

    what = f"{given} is a bundle, no checkpoint" if bundle.is_bundle(given) else f"There is no checkpoint {file}"
    raise UserError(f"{what}; give a .ckpt file or a run's folder, runs/<name>/version_N.")


def followed(path: Path) -> Path:
    """What runs/latest means where there are no links; any other path as it is."""
    if path.name == "latest" and path.is_file():  # see point_latest
        return path.parent / path.read_text(encoding="utf-8")
    return path


def _started(run: Path) -> float:
    config = run / "config.yaml"  # written when a fit starts, or goes on
    return (config if config.exists() else run).stat().st_mtime
