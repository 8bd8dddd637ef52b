"""Run folders, runs/<name>/version_N: make the next one, and find a checkpoint in them."""

import os
from pathlib import Path

from project import files
from project.errors import UserError

ROOT = Path("runs")
VARIABLE = "PROJECT_RUN"  # hands the run's folder to the processes of other ranks, which run the same command


def claim(name: str, rank_zero: bool = True, runs: Path = ROOT) -> Path:
    """Makes the next runs/<name>/version_N and points runs/latest at it.

    The first rank makes it; the others are told by an environment variable, or by Lightning's own broadcast.

    Raises:
        UserError: It cannot be written.
    """
    if (
        name in ("", ".", "..", "latest") or Path(name).name != name or {",", ":"} & set(name)
    ):  # , and : are TensorBoard's
        raise UserError(f"A run cannot be called {name!r}; give a name without / , : and other than latest by --name.")
    if not rank_zero:
        return Path(os.environ.get(VARIABLE, runs / name / "version_0"))
    try:
        (runs / name).mkdir(parents=True, exist_ok=True)
        taken = [int(n) for p in (runs / name).glob("version_*") if (n := p.name.removeprefix("version_")).isdigit()]
        number = max(taken, default=-1) + 1
        while True:
            run = runs / name / f"version_{number}"
            try:
                run.mkdir()  # of two fits that start together, one gets the next number
                break
            except FileExistsError:
                number += 1
        point_latest(run, runs / "latest")
    except OSError as error:
        raise UserError(
            f"Cannot write into {runs}/: {error.strerror} ({error.filename}); check its permissions."
        ) from error
    os.environ[VARIABLE] = str(run)
    return run


def point_latest(run: Path, latest: Path) -> None:
    """Makes `latest` a link to the run, or a file with its path where there are no links; replaced in one step."""
    unfinished = files.beside(latest)
    target = str(run.relative_to(latest.parent))
    try:
        unfinished.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        unfinished.write_text(target, encoding="utf-8")
    unfinished.replace(latest)


def folder_of(path: Path) -> Path:
    """The run that a checkpoint belongs to, or the checkpoint's folder where it has been moved out of its run."""
    return path.parent.parent if is_inside(path) else path.parent


def is_inside(path: Path) -> bool:
    """Whether a checkpoint lies in its run."""
    return path.parent.name == "checkpoints"


def find(path: str | os.PathLike[str] | None = None, runs: Path = ROOT) -> Path:
    """The checkpoint file that is meant.

    Args:
        path: A checkpoint or a run's folder; None means the newest run that has a best.ckpt.
        runs: Where runs lie.

    Raises:
        UserError: There is none.
    """
    if path is None:
        found = sorted(runs.glob("*/version_*/checkpoints/best.ckpt"), key=_started)
        if not found:
            raise UserError(f"No run in {runs}/ has a best.ckpt; train one first: python -m project.cli fit.")
        return found[-1]
    path = Path(path)
    if path.name == "latest" and path.is_file():  # where there are no links; see point_latest
        path = path.parent / path.read_text(encoding="utf-8")
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; give a .ckpt file or a run's folder, runs/<name>/version_N.")
    return path


def _started(checkpoint: Path) -> float:
    config = folder_of(checkpoint) / "config.yaml"  # written once, when the run starts
    return (config if config.exists() else checkpoint).stat().st_mtime
