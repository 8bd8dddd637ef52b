"""Searches for good settings: python -m project.cli sweep configs/sweep.yaml --trials 20."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import PositiveInt

from project import files, runs
from project.data.workers import usable_cores
from project.errors import FailedRun, UserError, command
from project.inference import checkpoint

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

TEMPLATE = Path(__file__).parents[1] / "evaluation" / "templates" / "sweep.html"
TRIALS, ONE = PositiveInt(20), PositiveInt(1)
WORKER = "PROJECT_SWEEP_WORKER"  # says that another process writes the summary
BEAT, GRACE = 10, 60  # seconds; a worker that has not been heard of for longer is lost, and its trial goes to another


def sweep(
    space: str,
    /,
    trials: PositiveInt = TRIALS,
    storage: str | None = None,
    name: str | None = None,
    workers: PositiveInt = ONE,
    trust: tuple[str, ...] = (),
) -> int:
    """Tries settings, each in an ordinary run, and leaves the best as a configuration for `fit`.

    The next settings are chosen by Optuna (TPE) from the results so far, and a fit whose validations are worse than the
    median of the others' at the same epoch is ended early. The same command goes on where it was stopped or killed: an
    unfinished run is resumed. With a storage that several machines reach, the same command on each shares the trials.

    Args:
        space: A YAML file: `space`, options of fit with a list of values, or low and high, and log or step; and `fit`,
            the options that all trials share.
        trials: Finished trials after which the sweep ends.
        storage: Where the results are kept, such as postgresql+psycopg2://user@host/db; by default an SQLite file.
        name: Of the sweep, its folder in runs/ and its runs; by default the file's.
        workers: Processes on this machine, each with one trial at a time.
        trust: Class path of a part that the trials' own files may name; repeatable.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("sweep needs the library optuna; install it: pip install -e .[sweep]") from error
    spaces, shared = _read(Path(space))
    monitor = str(shared.get("monitor", "val/loss"))
    name = name or Path(space).stem
    folder = Path(str(shared.get("runs") or runs.ROOT), name)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = _study(name, storage or f"sqlite:///{folder}/study.db", monitor)
    if workers > 1:
        words = [space, f"--trials={trials}", f"--name={name}", *(f"--trust={path}" for path in trust)]
        _start(workers, [*words, *([] if storage is None else [f"--storage={storage}"])])
    else:
        _search(study, Objective(spaces, shared, name, monitor, trust), trials)
    if WORKER not in os.environ:
        _summarize(study, folder, monitor)
    return 0


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The space and the shared options of a sweep's file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {file}: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping) or not content.get("space") or content.keys() - {"space", "fit"}:
        raise UserError(f"{file} needs the entries space and, if trials share options, fit; see configs/sweep.yaml.")
    space = {str(option): _entry(entry) for option, entry in content["space"].items()}
    if wrong := [option for option, entry in space.items() if entry is None]:
        given = f"{wrong[0]} is {content['space'][wrong[0]]}"
        raise UserError(f"{file}: {given}; give a list of values, or low and high, and log: true or step.")
    return space, dict(content.get("fit") or {})


def _entry(entry: Any) -> list[Any] | dict[str, Any] | None:
    """The values of an option, or the arguments of `suggest_float` and `suggest_int`; None for something else."""
    if isinstance(entry, list) and len(entry) > 1:
        return entry if all(isinstance(value, str | int | float | None) for value in entry) else None
    if not (isinstance(entry, dict) and {"low", "high"} <= entry.keys() <= {"low", "high", "log", "step"}):
        return None
    with contextlib.suppress(ValueError):  # YAML takes 1e-5 for a text
        entry = {key: float(value) if isinstance(value, str) else value for key, value in entry.items()}
        if entry["low"] < entry["high"]:
            return dict(entry)
    return None


def _study(name: str, url: str, monitor: str) -> "Study":
    """The sweep so far, in its storage."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    try:
        storage = optuna.storages.RDBStorage(
            url, heartbeat_interval=BEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry
        )
        return optuna.create_study(
            study_name=name,
            storage=storage,
            direction="minimize" if monitor.endswith(("loss", "error")) else "maximize",
            sampler=optuna.samplers.TPESampler(n_startup_trials=5),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(f"--storage {url} cannot be used: {str(error).strip().splitlines()[0]}") from error


class Objective:
    """Runs the fit of a trial; returns its best figure."""

    def __init__(self, spaces: dict[str, Any], shared: dict[str, Any], name: str, monitor: str, trust: Any) -> None:
        self._spaces, self._name, self._monitor = spaces, name, monitor
        self._runs = Path(str(shared.get("runs") or runs.ROOT))
        self._words = [f"--config={json.dumps(shared)}", *(f"--trust={path}" for path in trust)]
        self.number = 0  # of the newest trial

    def __call__(self, trial: "Trial") -> float:
        import optuna

        from project.training import cli as trainer_cli
        from project.training.trial import TrialCli

        self.number = trial.number
        retried = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number(_all(trial.study)[self.number])
        values = {option: _suggest(trial, option, entry) for option, entry in self._spaces.items()}
        run = self._runs / f"{self._name}-{self.number if retried is None else retried}" / "version_0"
        trial.set_user_attr("run", str(run))
        print(f"\ntrial {self.number}: {_words(values)}", flush=True)
        if runs.read_status(run).get("state") != "finished":
            texts = {option: value if isinstance(value, str) else json.dumps(value) for option, value in values.items()}
            words = [f"--{option}={text}" for option, text in texts.items()]
            TrialCli.trial = trial
            if trainer_cli.run("fit", [*self._words, *words, f"--name={run.parent.name}", "--resume=auto"], TrialCli):
                raise KeyboardInterrupt
            if TrialCli.finished.pruning.is_pruned:
                raise optuna.TrialPruned
        value = checkpoint.read(run / "checkpoints" / "best.ckpt")[1].metrics.get(self._monitor)
        if value is None:
            raise FailedRun(f"{run} has no {self._monitor}; its fit had no validation.")
        return value


def _words(values: dict[str, Any]) -> str:
    """Options as a user types them."""
    return " ".join(
        f"--{option} {value:.4g}" if isinstance(value, float) else f"--{option} {value}"
        for option, value in values.items()
    )


def _suggest(trial: "Trial", option: str, entry: Any) -> Any:
    if isinstance(entry, list):
        return trial.suggest_categorical(option, entry)
    return (trial.suggest_int if isinstance(entry["low"], int) else trial.suggest_float)(option, **entry)


def _all(study: "Study") -> list["FrozenTrial"]:
    return study.get_trials(deepcopy=False)


def _counts(study: "Study") -> tuple[int, int]:
    """How many trials have ended, those apart that are tried again, and how many others have begun."""
    replaced = {number for trial in _all(study) for number in trial.system_attrs.get("retry_history", ())}
    left = [trial for trial in _all(study) if trial.number not in replaced]
    ended = [t for t in left if t.state.is_finished() and (t.state.name != "FAIL" or "retry_history" in t.system_attrs)]
    return len(ended), sum(trial.state.name == "RUNNING" for trial in left)


def _search(study: "Study", objective: Objective, trials: int) -> None:
    """Runs trials until enough have ended; one that fails is tried once more, one that is stopped goes on later."""
    import optuna

    retry = optuna.storages.RetryHeartbeatStaleTrialCallback
    while (counts := _counts(study))[0] < trials:
        if sum(counts) >= trials:  # others are at the last ones, if they have not been lost
            time.sleep(1)
            optuna.storages.fail_stale_trials(study)
            continue
        try:
            study.optimize(objective, n_trials=1)
        except KeyboardInterrupt:
            retry()(study, _all(study)[objective.number])
            raise
        except (FailedRun, UserError) as error:
            if isinstance(error, UserError) and not any(trial.state.name == "COMPLETE" for trial in _all(study)):
                raise
            print(f"trial {objective.number} has failed: {error}", flush=True)
            retry(max_retry=1)(study, _all(study)[objective.number])
        except ValueError as error:
            if "dynamic value space" in str(error) or "not compatible" in str(error):
                raise UserError("The space is not that of the trials so far; give the sweep another --name.") from error
            raise


def _start(workers: int, words: list[str]) -> None:
    """Runs the sweep in several processes, and ends them if this one is ended."""
    environment = os.environ | {WORKER: "1", "OMP_NUM_THREADS": str(max(1, usable_cores() // workers))}
    worker = [sys.executable, "-m", "project.cli", "sweep", *words]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = [subprocess.Popen(worker, env=environment) for _ in range(workers)]
    try:
        for each in started:
            each.wait()
    finally:
        for each in started:
            each.terminate()
            each.wait()


def _summarize(study: "Study", folder: Path, monitor: str) -> None:
    """Prints the trials, the best first, and writes them, the best one's configuration and a page with plots."""
    import optuna
    from matplotlib.figure import Figure
    from optuna.visualization import matplotlib as plots

    from project.evaluation import html

    if not (complete := [trial for trial in _all(study) if trial.state.name == "COMPLETE"]):
        raise FailedRun(f"No trial of {folder.name} has finished; their messages are above.")
    complete.sort(key=lambda trial: float(trial.value or 0), reverse=study.direction.name == "MAXIMIZE")
    best, run = complete[0], Path(complete[0].user_attrs["run"])
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | {"name": None, "resume": None}
    with files.replacing(folder / "best.yaml") as stream:
        stream.write(f"# The best of {len(_all(study))} trials, {run}: {monitor} {best.value:.4f}\n")
        yaml.safe_dump(config, stream, sort_keys=False, allow_unicode=True)
    ended = [*complete, *(trial for trial in _all(study) if trial.state.name in ("PRUNED", "FAIL"))]
    options = [*best.params]
    rows = [
        [t.number, t.state.name.lower(), "" if t.value is None else t.value, *(t.params.get(name) for name in options)]
        for t in ended
    ]
    files.write_csv(folder / "trials.csv", [["trial", "state", monitor, *options], *rows])

    def draw(plot: Any, **options: Any) -> Figure:
        figure: Figure = plot(study, target_name=monitor, **options).figure
        figure.set_size_inches(7, 4)
        figure.set_layout_engine("constrained")
        return figure

    page = {"history": html.drawing(draw, plots.plot_optimization_history), "importance": None}
    if len(complete) > 3:
        evaluator = partial(plots.plot_param_importances, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
        page["importance"] = html.drawing(draw, evaluator)
    text = html.render(
        TEMPLATE, name=folder.name, rows=rows, options=options, monitor=monitor, best=best, run=run, **page
    )
    with files.replacing(folder / "sweep.html") as stream:
        stream.write(text)
    print(f"\n{len(complete)} trials finished, {len(ended) - len(complete)} ended early or failed; the best:")
    for trial in complete[:5]:
        print(f"  {monitor} {trial.value:.4f}  trial {trial.number}: {_words(trial.params)}")
    print(f"written: {folder}/best.yaml, {folder}/trials.csv, {folder}/sweep.html")
    print(f"next: {command('test', run)} | {command('fit', '--config', folder / 'best.yaml')}")
