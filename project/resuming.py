"""fit --resume: which run goes on, from which checkpoint, and what may be different now."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project import runs
from project.errors import UserError
from project.origin import Origin
from project.place import Place
from project.runs import Hold
from project.writer import LAST, PREVIOUS

NEWEST, AUTO = "newest", "auto"
# What may change: when the fit ends, on what it computes, how it reads, what it tells of itself. The rest decides what
# comes out.
FREE = frozenset(
    {f"trainer.{limit}" for limit in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")}
    | {f"trainer.{machine}" for machine in ("accelerator", "devices", "num_nodes", "strategy")}
    | {f"trainer.{logs}" for logs in ("logger", "log_every_n_steps", "profiler", "enable_progress_bar")}
    | {"trainer.enable_model_summary", "trainer.default_root_dir", "data.workers", "data.cache", "save_every"}
    | {"histograms"}
)


class Resumption:
    """A run that goes on in its own folder.

    Args:
        run: Its folder.
        hold: Keeps other fits out; None on ranks other than the first.

    Attributes:
        origin: The checkpoint it goes on from; None where it was killed before its first, and starts again.
        place: Where it goes on.
    """

    def __init__(self, run: Path, hold: Hold | None) -> None:
        self.run, self.hold = run, hold
        self.origin: Origin | None = None
        self.place = Place()
        refused = []
        for file in (run / "checkpoints" / name for name in (LAST, PREVIOUS)):
            if file.exists():
                try:
                    origin = Origin(file)
                    place = origin.place
                except UserError as error:
                    refused.append(str(error))
                    if hold is not None:
                        print(f"resume: {error}", flush=True)
                    continue
                if place is None:
                    raise UserError(
                        f"{file} does not say where its fit stood; fit --ckpt_path {file} starts a new run."
                    )
                self.origin, self.place = origin, place
                break
        if self.origin is None and refused:
            raise UserError(
                f"No checkpoint of {run} can be used: {' '.join(refused)} "
                f"Start a new run with --model.weights {run}/checkpoints/best.ckpt."
            )

    def differences(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Which options are others than when the run began.

        Args:
            then: All options of the run.
            now: All options of this fit.

        Returns:
            A line for each, like `--trainer.max_epochs 3 -> 5`.

        Raises:
            UserError: One of them changes the result.
        """
        old, new = _flat(then), _flat(now)
        changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key != "ckpt_path"]
        lines = {key: f"--{key} {_said(old.get(key))} -> {_said(new.get(key))}" for key in changed}
        if refused := [lines[key] for key in changed if key not in FREE]:
            source = self.origin.path if self.origin else f"{self.run}/checkpoints/best.ckpt"
            raise UserError(
                f"{self.run} cannot go on with {', '.join(refused)}: that changes the result. Leave it out, or start a "
                f"new run with --model.weights {source} instead of --resume."
            )
        return list(lines.values())


def find(choice: str, first_rank: bool, runs_root: Path = runs.ROOT) -> Resumption | None:
    """The run that is meant.

    Args:
        choice: A run's folder; `newest`, the newest that is unfinished; `auto`, the same, but where there is none a new
            run starts.
        first_rank: Whether this process is the one that writes; the others are told its choice, where they can be.
        runs_root: Where runs lie.

    Raises:
        UserError: There is none, or it is being trained.
    """
    if not first_rank and (told := os.environ.get(runs.VARIABLE)):
        return Resumption(Path(told), None)
    if choice not in (NEWEST, AUTO):
        run = runs.followed(Path(choice))
        if not (run / "config.yaml").is_file():
            raise UserError(f"There is no run {run}; give its folder, runs/<name>/version_N, or --resume alone.")
        candidates = [run]
    else:
        candidates = runs.unfinished(runs_root)
    busy = ""
    for run in candidates:
        try:
            return Resumption(run, Hold(run) if first_rank else None)
        except BlockingIOError:
            busy = f"; {run} is being trained by another process"
    if choice == AUTO:
        return None
    if choice != NEWEST:
        raise UserError(f"{candidates[0]} is being trained by another process; wait for it, or stop it.")
    raise UserError(f"No run in {runs_root}/ waits to go on{busy}; start one: python -m project.cli fit.")


def requeued() -> str | None:
    """The run that this SLURM job has begun before it was put back into the queue."""
    if not os.environ.get("SLURM_RESTART_COUNT", "0").strip("0"):
        return None
    own = [run for run in runs.unfinished() if runs.status(run).get("job") == job()]
    return str(own[0]) if own else None


def job() -> str | None:
    """What SLURM calls this job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        inner = isinstance(value, Mapping) and f"{prefix}{key}" in ("data", "model", "trainer")
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _said(value: Any) -> str:
    return "null" if value is None else str(value)
