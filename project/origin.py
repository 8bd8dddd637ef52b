"""The checkpoint that a verb starts from: its settings are the lowest layer, and some things must agree with it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from project import checkpoint, runs
from project.errors import UserError
from project.place import Place

# What a checkpoint may set of the Trainer. Not the machine's share (accelerator, devices, workers), and nothing that
# names a class: whoever writes a checkpoint must not choose what code runs.
TRAINER_SETTINGS = frozenset(
    {"max_epochs", "min_epochs", "max_steps", "min_steps", "precision", "accumulate_grad_batches", "deterministic"}
    | {"gradient_clip_val", "gradient_clip_algorithm"}
    | {"check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"}
)

SPLIT_OPTIONS = ("folds", "fold", "group", "exclude")  # whose outcome a split.csv is


class Origin:
    """A checkpoint and its run.

    Args:
        path: The file; its run is found beside it.

    Raises:
        UserError: It is damaged, holds code, or is not one of this project's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, runs.folder_of(path)
        self.content = checkpoint.read(path)
        self.metadata = self.content[checkpoint.METADATA]

    @property
    def place(self) -> Place | None:
        """Where its fit stood; None where it does not say, as in a user's own checkpoint.

        Raises:
            UserError: What it says is no place.
        """
        try:
            return Place.saved_in(self.content)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: it does not say where its fit stood.") from error

    def settings(self, with_split: bool, verb: str) -> dict[str, Any]:
        """The run's configuration, as far as it holds on another machine; the weights are the checkpoint's own.

        Args:
            with_split: Its split.csv, where there is one, instead of the options that it came from.
            verb: The one that takes them.
        """
        config: dict[str, dict[str, Any]] = self.metadata["config"]
        settings: dict[str, Any] = {
            section: {k: v for k, v in config[section].items() if _plain(v)} for section in ("data", "model")
        }
        for option in ("workers", "cache"):
            settings["data"].pop(option, None)
        if settings["model"].get("backbone_lr") is None:  # its default depends on the weights, which are others now
            from_scratch = settings["model"].get("weights", "none") == "none"
            settings["model"]["backbone_lr"] = 1.0 if from_scratch else 0.1
        settings["model"]["weights"] = str(self.path)
        settings["trainer"] = {k: v for k, v in config["trainer"].items() if k in TRAINER_SETTINGS and _plain(v)}
        split = self.run / "split.csv"
        if with_split and runs.is_inside(self.path) and split.is_file():
            settings["data"]["split"] = str(split)
            for option in SPLIT_OPTIONS:
                settings["data"].pop(option, None)
        if verb == "fit":
            settings |= {option: config.get(option) for option in ("average", "patience")}
        return settings | {"seed_everything": config.get("seed_everything", 0)}

    def require_own_weights(self, weights: str) -> None:
        """Checks that no other weights are asked for.

        Raises:
            UserError: They are.
        """
        if weights != str(self.path):
            raise UserError(f"--model.weights {weights} and {self.path} are two sources of weights; leave one out.")

    def require_more_to_do(self, epochs: int | None) -> None:
        """Checks that a fit of so many epochs can go on from here.

        Raises:
            UserError: The checkpoint holds weights only, or has done its epochs.
        """
        if "optimizer_states" not in self.content:
            raise UserError(f"{self.path} holds weights only; continue from the run's last.ckpt.")
        if (place := self.place) is not None:
            done = place.epoch
        else:  # a user's own
            batches = self.content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            done = self.content["epoch"] + bool(batches["is_last_batch"])
        if epochs not in (None, -1) and done >= epochs:
            raise UserError(f"{self.path} has done its {done} epochs; give more by --trainer.max_epochs.")

    def require_same(self, model: str, class_names: list[str], root: Path) -> None:
        """Checks that the network and the data are those that the weights are of.

        Raises:
            UserError: Another network, or other classes.
        """
        if (name := self.metadata["model"]) != model:
            raise UserError(f"{self.path} holds the weights of {name}, not of {model}; leave --model.name out.")
        if (trained := self.metadata["class_names"]) != class_names:
            raise UserError(
                f"{self.path} and {root} have different classes: the checkpoint has {', '.join(trained)}; "
                f"the data has {', '.join(class_names)}. Give its own data by --data.root."
            )

    def require_place_for(self, names: Iterable[str]) -> None:
        """Checks that results can be written into the run.

        Raises:
            UserError: They cannot, or outside a run files of these names are there already.
        """
        if not os.access(self.run, os.W_OK):
            raise UserError(
                f"The results of a test go into {self.run}, which cannot be written; change its permissions."
            )
        mine = [name for name in names if (self.run / name).exists()]
        if mine and not runs.is_inside(self.path):  # in a run they are an earlier test's
            raise UserError(f"{self.run}/{mine[0]} exists and may be your own; move it, or the checkpoint, away.")


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
