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

from project import files, optim, parts, runs
from project.data import digits, shards
from project.data.datamodule import ImageData
from project.data.splits import SPLITS
from project.errors import UserError, command
from project.evaluation import run_split
from project.runs import RunLock
from project.training.checkpoint_io import LAST, PREVIOUS
from project.training.loop_state import LoopState
from project.training.source_checkpoint import SourceCheckpoint

# Options that += adds to.
LISTS = ("data.transforms", "model.metrics", "trainer.callbacks", "trainer.logger", "trainer.plugins")
NEWEST, AUTO = "newest", "auto"  # values of --resume beside a run's folder
# Options that may change when a fit is resumed: its end, machine, reading and logging. All others change the result.
LENGTH = {f"trainer.{limit}" for limit in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")}
FREE = frozenset(
    LENGTH
    | {f"trainer.{machine}" for machine in ("accelerator", "devices", "num_nodes", "strategy")}
    | {f"trainer.{logs}" for logs in ("logger", "log_every_n_steps", "profiler", "enable_progress_bar")}
    | {"trainer.enable_model_summary", "trainer.default_root_dir", "data.workers", "data.cache", "save_every"}
    | {"histograms", "ckpt_path", "trust", "runs"}
)


@dataclass(frozen=True)
class Run:
    """The run folder that a fit writes into."""

    folder: Path  # runs/<name>/version_N
    lock: RunLock | None  # keeps other fits out; None on ranks other than the first
    source: SourceCheckpoint | None = None  # the checkpoint that the fit starts from, if any
    state: LoopState = field(default_factory=LoopState)  # the position that it starts from
    resumed: bool = False  # whether an earlier fit has begun the run

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @classmethod
    def new(
        cls, base: Path, name: str | None, data: ImageData, options: Mapping[str, Any], source: SourceCheckpoint | None
    ) -> "Run":
        """Makes and locks the next base/<name>/version_N; the default name is `data.run_name`."""
        name = name or data.run_name
        if rank() != 0:
            return cls(Path(os.environ.get(runs.VARIABLE, base / name / "version_0")), None, source)

        def fill(folder: Path) -> None:
            write_config(folder, options)
            if data.manifest.is_stored:
                shutil.copy(data.root / shards.ABOUT, folder)
            else:
                data.manifest.write_split(folder / "split.csv")
            runs.write_status(folder, state="running", reason="", job=job())  # a fit killed from here on is resumed

        return cls(*runs.create_run(name, fill, base), source)

    def begin(self, options: Mapping[str, Any], runs_root: Path) -> None:
        """Makes a resumed run end at the position of its checkpoint, with these options; `latest` names the run."""
        if self.resumed:
            columns, rows = runs.read_metrics(metrics := self.folder / runs.METRICS)
            if columns:
                runs.write_metrics(metrics, columns, rows[: self.state.rows])
            for unfinished in self.checkpoints.glob(".*.tmp"):
                unfinished.unlink()
            write_config(self.folder, options)
            runs.write_status(self.folder, state="running", reason="", job=job())
            if runs_root.resolve() not in self.folder.resolve().parents:  # its own file must not choose another folder
                runs_root = Path(runs.ROOT)
        runs.point_latest(self.folder, runs_root / "latest")

    def discard(self) -> None:
        """Releases a run whose fit cannot begin; removes a new one: its configuration, split and status."""
        if self.lock is None:
            return
        if not self.resumed:
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):  # other runs are there
                for folder in self.folder.parents[:2]:
                    folder.rmdir()
        self.lock.release()

    @classmethod
    def resume(cls, folder: Path, lock: RunLock | None) -> "Run":
        """A run at the position of its newest usable checkpoint; at the start, if it was killed before its first."""
        refused = []
        for file in filter(Path.exists, (folder / "checkpoints" / name for name in (LAST, PREVIOUS))):
            try:
                source = SourceCheckpoint(file)
                if (state := LoopState.saved_in(source.content)) is not None:
                    return cls(folder, lock, source, state, resumed=True)
                raise UserError(f"{file} does not hold the position of its fit: another version or callback saved it.")
            except UserError as error:
                refused.append(str(error))
                if lock is not None:
                    print(f"resume: {error}", flush=True)
        if refused:
            raise UserError(
                f"No checkpoint of {folder} can be used: {' '.join(refused)} "
                f"Start a new run with --model.weights {folder}/checkpoints/best.ckpt."
            )
        if runs.read_status(folder).get("state") == "finished":
            rest = f"start a new run with --model.weights {folder}/checkpoints/best.ckpt"
            raise UserError(
                f"{folder} has finished, and its last.ckpt, which would be continued from, is gone; {rest}."
            )
        return cls(folder, lock, resumed=True)

    def changes(self, options: Mapping[str, Any]) -> list[str]:
        """A line for each option that differs from the run's, `--trainer.max_epochs 3 -> 5`, if all of them may."""
        old = flat_options(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))
        new = flat_options(options)
        lines = {}
        for key in sorted(old | new):
            if old.get(key) != new.get(key):
                before, now = ("null" if flat.get(key) is None else flat[key] for flat in (old, new))
                lines[key] = f"--{key} {before} -> {now}"
        moved = {"data.root"} if not Path(old.get("data.root") or "").exists() else set()
        if refused := [line for key, line in lines.items() if key not in FREE | moved]:
            weights = self.source.path if self.source else f"{self.checkpoints}/best.ckpt"
            raise UserError(
                f"{self.folder} cannot be resumed with {', '.join(refused)}: that changes the result. Leave it out, or "
                f"start a new run with --model.weights {weights} instead of --resume."
            )
        return list(lines.values())


def find(choice: str | None, runs_root: Path, options: Any) -> Run | None:
    """The run that --resume names, or that this SLURM job began before it was requeued; None for a new one.

    The choice is a run's folder; `newest`, the newest unfinished run in `runs_root`; or `auto`, the newest of the same
    name and images as far as the options of the command line have them, or None if there is none.
    """
    if choice is None and os.environ.get("SLURM_RESTART_COUNT", "0").strip("0"):
        own = [run for run in runs.unfinished(runs_root) if runs.read_status(run).get("job") == job()]
        choice = str(own[0]) if own else None
    if choice is None:
        return None
    if rank() != 0 and (chosen := os.environ.get(runs.VARIABLE)):  # the first rank's choice
        return Run.resume(Path(chosen), None)
    path = runs.resolve(Path(choice))
    named = [] if choice in (NEWEST, AUTO) else [runs.folder_of(path) if path.suffix == ".ckpt" else path]
    if named and not (named[0] / "config.yaml").is_file():
        raise UserError(f"There is no run {choice}; give its folder, runs/<name>/version_N, or --resume alone.")
    reason = f"There is no unfinished run in {runs_root}/; start one: python -m project.cli fit."
    for folder in named or runs.unfinished(runs_root):
        if choice == AUTO:
            old = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            same = [(options.name, old["name"])]
            same += [(options.data.get(name), old["data"].get(name)) for name in ("root", "class_path")]
            if any(new not in (None, str(digits.ROOT), recorded) for new, recorded in same):
                continue
        try:
            return Run.resume(folder, RunLock(folder) if rank() == 0 else None)
        except BlockingIOError:
            reason = f"{folder} is being trained by another process; wait for it, or stop it."
    if choice == AUTO:
        return None
    raise UserError(reason)


def same(folder: Path, options: Mapping[str, Any], data: ImageData) -> Path | None:
    """The run in a folder of runs that had these options, as far as they change the result, and this split.

    If there are several, it is a finished one.
    """
    new, found = flat_options(options), list[Path]()
    split = dict(zip(data.manifest.paths, (SPLITS[index] for index in data.manifest.splits.tolist()), strict=True))
    for file in sorted(folder.glob("version_*/config.yaml")):
        old = flat_options(yaml.safe_load(file.read_text(encoding="utf-8")))
        changed = {key for key in old | new if old.get(key) != new.get(key)}
        if changed <= FREE - LENGTH - {"ckpt_path"} | {"name", "resume", "seeds", "folds"}:
            found += [file.parent] * ({row.path: row.split for row in run_split.rows(file.parent)} == split)
    return min(found, key=lambda run: runs.read_status(run).get("state") != "finished", default=None)


def with_newest(argv: list[str]) -> list[str]:
    """The words of a command line, with the value `newest` for a bare --resume."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        words += [word, NEWEST] if word == "--resume" and following.startswith("--") else [word]
    return words


def settings(file: Path, typed: Any) -> Any:
    """A run's options, without the lists that are typed, too, to which += would add these again."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for section, option in (name.split(".") for name in LISTS if typed.get(name)):
        if isinstance(config, dict) and isinstance(config.get(section), dict):
            config[section][option] = None
    return config


def how_to_resume(folder: Path) -> str:
    """The command that resumes a run."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return command("fit", "--resume", folder, *parts.trust_words(config))


def write_config(folder: Path, options: Mapping[str, Any]) -> None:
    """Writes a fit's options into config.yaml."""
    with files.replacing(folder / "config.yaml") as stream:
        stream.write("# python -m project.cli fit --config THIS_FILE\n")
        yaml.safe_dump(dict(options), stream, sort_keys=False, allow_unicode=True)


def rank() -> int:
    """The number of this process among those of a distributed fit; Lightning reads it from the launcher's variables."""
    return int(getattr(rank_zero_only, "rank", 0))


def job() -> str | None:
    """SLURM's name of this job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their names on the command line."""
    flat = {"monitor": "val/loss"} | {f"model.{name}": value for name, value in optim.BEFORE.items()}
    for name, value in options.items():
        is_section = name in ("data", "model", "trainer")
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if is_section else {name: value}
    return flat
