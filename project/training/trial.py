"""Trials of a sweep: ordinary fits that report their validations, and end early where others were better."""

import json
import math
import time
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials

from project import runs
from project.errors import FailedRun, UserError
from project.inference import checkpoint
from project.training import cli
from project.training.resume import Run
from project.training.trainer import listed


class Pruning(Callback):
    """Reports a figure of each validation to a trial of Optuna, and ends the fit where Optuna says so."""

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self._monitor, self.is_pruned = trial, monitor, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor in trainer.callback_metrics:
            self.trial.report(float(trainer.callback_metrics[self._monitor]), trainer.current_epoch)
            is_last = trainer.current_epoch + 1 == trainer.max_epochs
            if not is_last and self.trial.should_prune():
                self.is_pruned = trainer.should_stop = True


class TrialCli(cli.Cli):
    """The fit of a trial."""

    pruning: Pruning  # is set before

    def find_run(self, options: Any) -> Run | None:  # a requeued SLURM job has unfinished runs of other trials
        return super().find_run(options) if options.resume else None

    def new_run(self) -> Run:
        monitor, best = self.model.watched
        if not self.pruning.trial.study.direction.name.lower().startswith(best):
            raise UserError(f"A sweep cannot look for the {best}imum of {monitor}; monitor val/loss or another figure.")
        run = super().new_run()
        self.pruning.trial.set_user_attr("run", str(run.folder))
        return run

    def instantiate_trainer(self, **_: Any) -> Trainer:
        options = self.config_init.fit
        if options.seeds or options.folds:
            raise UserError("A sweep takes one run for each trial; leave --seeds and --folds out.")
        options.trainer.callbacks = [*listed(options.trainer.callbacks), self.pruning]
        made = super().instantiate_trainer()
        if made.world_size > 1:
            raise UserError("A trial of a sweep is one process; give --trainer.devices 1, and more --workers.")
        return made


class Objective:
    """Runs the fit of a trial; returns its best figure."""

    def __init__(self, space: dict[str, Any], words: list[str], name: str, monitor: str) -> None:
        self._space, self._words, self._name, self._monitor = space, words, name, monitor
        self.number = 0  # of the newest trial

    def __call__(self, trial: optuna.Trial) -> float:
        self.number = trial.number
        values = {option: getattr(trial, method)(option, **given) for option, (method, given) in self._space.items()}
        begun = trial.user_attrs.get("run")  # by a process that was stopped or killed
        state = begun and runs.read_status(Path(begun)).get("state")
        print(f"\ntrial {self.number}: {words(values)}", flush=True)
        if state != "finished":
            tried = [
                f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
            ]
            TrialCli.pruning = Pruning(trial, self._monitor)
            where = f"--resume={begun}" if state else f"--name={self._name}-{self.number}"
            if cli.run("fit", [*self._words, *tried, where], TrialCli):
                raise KeyboardInterrupt
            if TrialCli.pruning.is_pruned:
                raise optuna.TrialPruned
        run = Path(trial.user_attrs["run"])
        value = checkpoint.read(run / "checkpoints" / "best.ckpt")[1].metrics.get(self._monitor)
        if value is None or math.isnan(value):
            raise FailedRun(f"{self._monitor} of {run} is {value}.")
        return value


def words(values: dict[str, Any]) -> str:
    """Options as a user types them."""
    texts = {option: f"{value:.4g}" if isinstance(value, float) else value for option, value in values.items()}
    return " ".join(f"--{option} {text}" for option, text in texts.items())


def search(study: optuna.Study, objective: Objective, trials: int) -> None:
    """Runs trials until enough have ended; one that fails is tried once more, one that is stopped goes on later."""
    while (counts := _counts(study))[0] < trials:
        if sum(counts) >= trials:  # others are at the last ones, if they have not been lost
            time.sleep(1)
            fail_stale_trials(study)
            continue
        try:
            study.optimize(objective, n_trials=1)
        except KeyboardInterrupt:
            RetryHeartbeatStaleTrialCallback()(study, study.trials[objective.number])
            raise
        except (FailedRun, UserError) as error:
            if isinstance(error, UserError) and not any(trial.state.name == "COMPLETE" for trial in study.trials):
                raise
            print(f"trial {objective.number} has failed: {error}", flush=True)
            RetryHeartbeatStaleTrialCallback(max_retry=1)(study, study.trials[objective.number])
        except ValueError as error:
            if "dynamic value space" in str(error) or "not compatible" in str(error):
                raise UserError("The space is not that of the trials so far; give the sweep another --name.") from error
            raise


def _counts(study: optuna.Study) -> tuple[int, int]:
    """How many trials have ended, those apart that are tried again, and how many others have begun."""
    trials = study.trials
    replaced = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    left = [trial for trial in trials if trial.number not in replaced]
    ended = [t for t in left if t.state.is_finished() and (t.state.name != "FAIL" or "retry_history" in t.system_attrs)]
    return len(ended), sum(trial.state.name == "RUNNING" for trial in left)
