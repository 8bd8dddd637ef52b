"""Searches for good settings: python -m project.cli sweep configs/sweep.yaml --trials 20."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import PositiveInt

from project import files, parts, runs
from project.data.workers import usable_cores
from project.errors import FailedRun, UserError, command

if TYPE_CHECKING:
    from optuna import Study

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
    spaces, shared = _read(Path(files.shipped(space)))
    monitor = str(shared.get("monitor", "val/loss"))
    name = name or Path(space).stem
    folder = Path(str(shared.get("runs") or runs.ROOT), name)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = storage or f"sqlite:///{folder}/study.db"
    study = _study(name, storage, monitor)
    trusted = [f"--trust={path}" for path in trust]
    if workers > 1:
        _start(workers, [space, f"--trials={trials}", f"--name={name}", f"--storage={storage}", *trusted])
    else:
        from project.training import trial

        words = [f"--config={json.dumps(shared)}", *trusted]
        trial.search(study, trial.Objective(spaces, words, name, monitor), trials)
    if WORKER not in os.environ:
        _summarize(study, folder, monitor)
    return 0


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The space, as `_suggestion` has its options, and the shared options of a sweep's file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {file}: {' '.join(str(error).split())}.") from error
    entries = content if isinstance(content, dict) else {}
    is_whole = entries.get("space") and not entries.keys() - {"space", "fit"}
    if not (is_whole and all(isinstance(entry, dict | None) for entry in entries.values())):
        raise UserError(f"{file} needs the entries space and, if trials share options, fit; see configs/sweep.yaml.")
    space = {str(option): _suggestion(file, option, entry) for option, entry in content["space"].items()}
    return space, dict(content.get("fit") or {})


def _suggestion(file: Path, option: str, entry: Any) -> tuple[str, dict[str, Any]]:
    """The method of a `Trial` that suggests a value of the option, and its arguments; UserError for another entry."""
    from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(entry, list) and len(entry) > 1 and all(isinstance(each, str | int | float | None) for each in entry):
        return "suggest_categorical", {"choices": entry}
    if isinstance(entry, dict) and {"low", "high"} <= entry.keys() <= {"low", "high", "log", "step"}:
        with contextlib.suppress(ValueError, TypeError):  # YAML takes 1e-5 for a text
            limits = {key: float(value) if isinstance(value, str) else value for key, value in entry.items()}
            is_int = all(isinstance(value, int) for value in limits.values())
            distribution: Any = IntDistribution if is_int else FloatDistribution
            distribution(**limits)  # its errors
            if limits["low"] < limits["high"]:
                return "suggest_int" if is_int else "suggest_float", limits
    raise UserError(f"{file}: {option} is {entry}; give a list of values, or low and high, and log: true or step.")


def _study(name: str, url: str, monitor: str, attempts: int = 5) -> "Study":
    """The sweep so far, in its storage; machines that begin together may all try to make its tables."""
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    options: dict[str, Any] = {"heartbeat_interval": BEAT, "grace_period": GRACE}
    options["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
    try:
        storage = RDBStorage(url, {"poolclass": NullPool}, **options)  # closes each connection after its use
        return optuna.create_study(
            study_name=name,
            storage=storage,
            direction="minimize" if monitor.endswith(("loss", "error")) else "maximize",
            sampler=optuna.samplers.TPESampler(n_startup_trials=5),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        if isinstance(error, (IntegrityError, ProgrammingError)) and attempts > 1:
            time.sleep(1)
            return _study(name, url, monitor, attempts - 1)
        raise UserError(f"--storage {url} cannot be used: {str(error).strip().splitlines()[0]}") from error


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
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    from project.evaluation import html
    from project.training.trial import words

    if not (complete := [trial for trial in study.trials if trial.state.name == "COMPLETE"]):
        raise FailedRun(f"No trial of {folder.name} has finished; their messages are above.")
    complete.sort(key=lambda trial: float(trial.value or 0), reverse=study.direction.name == "MAXIMIZE")
    best, run = complete[0], Path(complete[0].user_attrs["run"])
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | {"name": None, "resume": None}
    with files.replacing(folder / "best.yaml") as stream:
        stream.write(f"# The best of {len(study.trials)} trials, {run}: {monitor} {best.value:.4f}\n")
        yaml.safe_dump(config, stream, sort_keys=False, allow_unicode=True)
    ended = [*complete, *(trial for trial in study.trials if trial.state.name in ("PRUNED", "FAIL"))]
    rows = [
        [t.number, t.state.name.lower(), "" if t.value is None else t.value, *map(t.params.get, best.params)]
        for t in ended
    ]
    files.write_csv(folder / "trials.csv", [["trial", "state", monitor, *best.params], *rows])

    def draw(plot: Any) -> Any:
        figure = plot(study, target_name=monitor).figure
        figure.set_size_inches(7, 4)
        figure.set_layout_engine("constrained")
        return figure

    page = {"history": html.drawing(draw, plots.plot_optimization_history), "importance": None}
    if len(complete) > 3:
        evaluator = partial(plots.plot_param_importances, evaluator=PedAnovaImportanceEvaluator())
        page["importance"] = html.drawing(draw, evaluator)
    with files.replacing(folder / "sweep.html") as stream:
        stream.write(html.render(TEMPLATE, name=folder.name, rows=rows, monitor=monitor, best=best, run=run, **page))
    print(f"\n{len(complete)} trials finished, {len(ended) - len(complete)} ended early or failed; the best:")
    for trial in complete[:5]:
        print(f"  {monitor} {trial.value:.4f}  trial {trial.number}: {words(trial.params)}")
    print(f"written: {folder}/best.yaml, {folder}/trials.csv, {folder}/sweep.html")
    print(
        f"next: {command('test', run, *parts.trust_words(config))} | {command('fit', '--config', folder / 'best.yaml')}"
    )
