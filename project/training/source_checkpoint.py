"""A checkpoint that a verb starts from; the settings of its run are the lowest layer of the verb's own."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from project import runs
from project.errors import UserError
from project.inference import checkpoint
from project.training.loop_state import LoopState, epochs_done

# What a checkpoint may set of the Trainer: neither the machine's share (accelerator, devices, workers) nor the name of
# a class, because whoever writes a checkpoint must not choose what code runs.
TRAINER_SETTINGS = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "precision", "accumulate_grad_batches", "deterministic"),
    *("gradient_clip_val", "gradient_clip_algorithm", "check_val_every_n_epoch", "val_check_interval"),
    "log_every_n_steps",
)
SPLIT_OPTIONS = ("folds", "fold", "group", "exclude")  # replaced by their result, split.csv


class SourceCheckpoint:
    """A checkpoint that a verb starts from, and its run.

    Raises:
        UserError: The file is damaged, holds code, or is not a checkpoint of this project.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, runs.folder_of(path)
        self.content, self.metadata = checkpoint.read(path)

    def loop_state(self) -> LoopState | None:
        """The position of its fit; None for a checkpoint of another callback. A damaged one raises UserError."""
        try:
            return LoopState.saved_in(self.content)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: the position of its fit is missing.") from error

    def settings(self, with_split: bool, verb: str) -> dict[str, Any]:
        """The part of the run's configuration that holds on another machine, with the checkpoint's own weights.

        Args:
            with_split: Use the run's split.csv, where there is one, instead of the options it came from.
            verb: The verb that takes the settings.
        """
        config: dict[str, Any] = self.metadata.config
        data, model, trainer = (
            {key: value for key, value in config[section].items() if isinstance(value, str | int | float | None)}
            for section in ("data", "model", "trainer")
        )
        if model.get("backbone_lr") is None:  # its default depends on the weights, which change now
            model["backbone_lr"] = 1.0 if model.get("weights", "none") == "none" else 0.1
        model["weights"] = str(self.path)
        left_out = {"workers", "cache"}
        if with_split and runs.is_inside(self.path) and (split := self.run / "split.csv").is_file():
            data["split"] = str(split)
            left_out.update(SPLIT_OPTIONS)
        options = ("average", "patience") if verb == "fit" else ()
        return {
            "data": {key: value for key, value in data.items() if key not in left_out},
            "model": model,
            "trainer": {key: value for key, value in trainer.items() if key in TRAINER_SETTINGS},
            "seed_everything": config.get("seed_everything", 0),
            **{option: config.get(option) for option in options},
        }

    def require_own_weights(self, weights: str) -> None:
        """Raises UserError where --model.weights names other weights than the checkpoint."""
        if weights != str(self.path):
            raise UserError(f"--model.weights {weights} and {self.path} are two sources of weights; leave one out.")

    def require_more_to_do(self, epochs: int | None) -> None:
        """Raises UserError where the checkpoint has no training state, or has completed this number of epochs."""
        if "optimizer_states" not in self.content:
            raise UserError(f"{self.path} holds weights only; continue from the run's last.ckpt.")
        try:
            done = epochs_done(self.content)
        except ValueError as error:
            raise UserError(f"Cannot resume from {self.path}: {error}.") from error
        if epochs not in (None, -1) and done >= epochs:
            raise UserError(f"{self.path} has completed its {done} epochs; give more by --trainer.max_epochs.")

    def require_same(self, model: str, class_names: list[str], root: Path) -> None:
        """Raises UserError where the weights belong to another network or other classes."""
        if (name := self.metadata.model) != model:
            raise UserError(f"{self.path} holds the weights of {name}, not of {model}; leave --model.name out.")
        if (trained := self.metadata.class_names) != class_names:
            raise UserError(
                f"{self.path} and {root} have different classes: the checkpoint has {', '.join(trained)}; "
                f"the data has {', '.join(class_names)}. Give its own data by --data.root."
            )

    def require_writable(self, names: Iterable[str]) -> None:
        """Raises UserError where the run cannot be written, or files of these names outside a run may be the user's."""
        if not os.access(self.run, os.W_OK):
            raise UserError(f"The test's results go into {self.run}, which cannot be written; change its permissions.")
        present = [name for name in names if (self.run / name).exists()]
        if present and not runs.is_inside(self.path):  # in a run they are those of an earlier test
            raise UserError(f"{self.run}/{present[0]} exists and may be your own; move it, or the checkpoint, away.")
