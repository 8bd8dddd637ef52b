"""A trial of a sweep: an ordinary fit that reports its validations, and ends early where others were better."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from project.errors import UserError
from project.training import cli
from project.training.trainer import listed


class Pruning(Callback):
    """Reports a figure of each validation to a trial of Optuna, and ends the fit where Optuna says so."""

    def __init__(self, trial: Any, monitor: str) -> None:
        self._trial, self._monitor, self.is_pruned = trial, monitor, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor in trainer.callback_metrics:
            self._trial.report(float(trainer.callback_metrics[self._monitor]), trainer.current_epoch)
            is_last = trainer.current_epoch + 1 == trainer.max_epochs
            if not is_last and self._trial.should_prune():
                self.is_pruned = trainer.should_stop = True


class TrialCli(cli.Cli):
    """The fit of a trial, which is set before."""

    trial: Any
    finished: "TrialCli"  # the newest

    def instantiate_trainer(self, **_: Any) -> Trainer:
        options = self.config_init.fit
        if options.seeds or options.folds:
            raise UserError("A sweep takes one run for each trial; leave --seeds and --folds out.")
        self.pruning = Pruning(self.trial, self.config.fit.monitor)
        options.trainer.callbacks = [*listed(options.trainer.callbacks), self.pruning]
        made = super().instantiate_trainer()
        if made.world_size > 1:
            raise UserError("A trial of a sweep is one process; give --trainer.devices 1, and more --workers.")
        type(self).finished = self
        return made
