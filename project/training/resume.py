"""The run that a fit writes into: a new one, or an unfinished one that it resumes (fit --resume)."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from project import files, runs
from project.data.datamodule import ImageData
from project.errors import UserError
from project.runs import RunLock
from project.training.checkpoint_io import LAST, PREVIOUS
from project.training.loop_state import LoopState
from project.training.source_checkpoint import SourceCheckpoint

NEWEST, AUTO = "newest", "auto"  # values of --resume beside a run's folder
# Options that may change when a fit is resumed: its end, machine, reading and logging. All others change the result.
FREE = frozenset(
    {f"trainer.{limit}" for limit in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")}
    | {f"trainer.{machine}" for machine in ("accelerator", "devices", "num_nodes", "strategy")}
    | {f"trainer.{logs}" for logs in ("logger", "log_every_n_steps", "profiler", "enable_progress_bar")}
    | {"trainer.enable_model_summary", "trainer.default_root_dir", "data.workers", "data.cache", "save_every"}
    | {"histograms"}
)


@dataclass(frozen=True)
class Run:
    """The run folder that a fit writes into.

    Attributes:
        folder: runs/<name>/version_N.
        lock: Keeps other fits out; None on ranks other than the first.
        source: The checkpoint that the fit starts from, if any.
        state: The position that it starts from.
        resumed: Whether an earlier fit has begun the run.
    """

    folder: Path
    lock: RunLock | None
    source: SourceCheckpoint | None = None
    state: LoopState = field(default_factory=LoopState)
    resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @classmethod
    def new(
        cls, name: str | None, data: ImageData, options: Mapping[str, Any], source: SourceCheckpoint | None
    ) -> "Run":
        """Makes and locks the next folder runs/<name>/version_N, with config.yaml, split.csv and status.json.

        Args:
            name: Its name; None for that of the data's folder or file.
            data: The images.
            options: The fit's options as plain types.
            source: The checkpoint that the fit starts from.

        Raises:
            UserError: The name cannot be used, or the folder cannot be written.
        """
        root = data.root.resolve()
        own = root.stem if root.is_file() else root.name
        name = name or own.translate({ord(","): "-", ord(":"): "-"})
        runs.require_name(name)
        if rank() != 0:
            return cls(Path(os.environ.get(runs.VARIABLE, runs.ROOT / name / "version_0")), None, source)

        def fill(folder: Path) -> None:
            write_config(folder, options)
            data.manifest.write_split(folder / "split.csv")
            runs.write_status(folder, state="running", reason="", job=job())

        return cls(*runs.create_run(name, fill), source)

    def take_over(self, options: Mapping[str, Any]) -> None:
        """Removes what a killed fit has left unfinished in a run that is resumed, and records the options.

        Args:
            options: The fit's options as plain types.
        """
        if rank() == 0:
            files.sweep(self.checkpoints, mine=True)
            write_config(self.folder, options)
            os.environ[runs.VARIABLE] = str(self.folder)

    def discard(self) -> None:
        """Removes a new run whose fit cannot begin: nothing but its configuration, split and status."""
        if self.lock is not None and not self.resumed:
            shutil.rmtree(self.folder)
            self.lock.release()
            with contextlib.suppress(OSError):  # other runs are there
                self.folder.parent.rmdir()
                self.folder.parent.parent.rmdir()

    @classmethod
    def resume(cls, folder: Path, lock: RunLock | None) -> "Run":
        """A run at the position of its newest usable checkpoint; at the start, if it was killed before its first.

        Raises:
            UserError: No checkpoint can be used.
        """
        refused = []
        for file in (folder / "checkpoints" / name for name in (LAST, PREVIOUS)):
            if not file.exists():
                continue
            try:
                source = SourceCheckpoint(file)
                state = source.loop_state()
            except UserError as error:
                refused.append(str(error))
                if lock is not None:
                    print(f"resume: {error}", flush=True)
                continue
            if state is None:
                raise UserError(
                    f"{file} does not hold the position of its fit (an older version saved it, or another callback); "
                    f"fit --ckpt_path {file} starts a new run."
                )
            return cls(folder, lock, source, state, resumed=True)
        if refused:
            raise UserError(
                f"No checkpoint of {folder} can be used: {' '.join(refused)} "
                f"Start a new run with --model.weights {folder}/checkpoints/best.ckpt."
            )
        return cls(folder, lock, resumed=True)

    def changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Compares the options of the run with those of the fit that resumes it.

        Returns:
            A line for each changed option, such as `--trainer.max_epochs 3 -> 5`.

        Raises:
            UserError: A change would affect the result.
        """
        old, new = _flat(before), _flat(now)
        changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key != "ckpt_path"]
        lines = {key: f"--{key} {_yaml(old.get(key))} -> {_yaml(new.get(key))}" for key in changed}
        if refused := [lines[key] for key in changed if key not in FREE]:
            weights = self.source.path if self.source else f"{self.checkpoints}/best.ckpt"
            raise UserError(
                f"{self.folder} cannot be resumed with {', '.join(refused)}: that changes the result. Leave it out, or "
                f"start a new run with --model.weights {weights} instead of --resume."
            )
        return list(lines.values())


def find(choice: str, runs_root: Path = runs.ROOT) -> Run | None:
    """The run that --resume names.

    Args:
        choice: A run's folder; `newest`, the newest unfinished run; `auto`, the same, or None if there is none.
        runs_root: The folder of all runs.

    Raises:
        UserError: There is no such run, or another process is training it.
    """
    if rank() != 0 and (chosen := os.environ.get(runs.VARIABLE)):  # the first rank's choice
        return Run.resume(Path(chosen), None)
    if choice not in (NEWEST, AUTO):
        folder = runs.resolve_latest(Path(choice))
        if not (folder / "config.yaml").is_file():
            raise UserError(f"There is no run {folder}; give its folder, runs/<name>/version_N, or --resume alone.")
        candidates = [folder]
    else:
        candidates = runs.unfinished(runs_root)
    busy = ""
    for folder in candidates:
        try:
            return Run.resume(folder, RunLock(folder) if rank() == 0 else None)
        except BlockingIOError:
            busy = f"; {folder} is being trained by another process"
    if choice == AUTO:
        return None
    if choice != NEWEST:
        raise UserError(f"{candidates[0]} is being trained by another process; wait for it, or stop it.")
    raise UserError(f"There is no unfinished run in {runs_root}/{busy}; start one: python -m project.cli fit.")


def with_newest(argv: list[str]) -> list[str]:
    """The words of a command line, with the value `newest` for a bare --resume."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        words += [word, NEWEST] if word == "--resume" and following.startswith("--") else [word]
    return words


def write_config(folder: Path, options: Mapping[str, Any]) -> None:
    """Writes a fit's options into config.yaml."""
    with files.replacing(folder / "config.yaml") as stream:
        stream.write("# python -m project.cli fit --config THIS_FILE\n")
        yaml.safe_dump(dict(options), stream, sort_keys=False, allow_unicode=True)


def rank() -> int:
    """The number of this process among those of a distributed fit; Lightning reads it from the launcher's variables."""
    number: int = getattr(rank_zero_only, "rank", 0)
    return number


def requeued() -> str | None:
    """The run that this SLURM job began before it was requeued."""
    if not os.environ.get("SLURM_RESTART_COUNT", "0").strip("0"):
        return None
    own = [run for run in runs.unfinished() if runs.read_status(run).get("job") == job()]
    return str(own[0]) if own else None


def job() -> str | None:
    """SLURM's name of this job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        nested = isinstance(value, Mapping) and f"{prefix}{key}" in ("data", "model", "trainer")
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)
