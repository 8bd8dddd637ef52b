"""A checkpoint that a verb starts from; the settings of its run are the lowest layer of the verb's own."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from project import optim, parts, runs
from project.data import digits, shards
from project.data.datamodule import ImageData
from project.errors import UserError, look_alike, some
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
    """A checkpoint that a verb starts from, and its run; see `checkpoint.read` for the errors."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, runs.folder_of(path)
        if path.is_dir():
            whole = f"make one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
            raise UserError(
                f"{path} is a sharded checkpoint, of which predict, explain and export take the weights; {whole}"
            )
        self.content, self.metadata = checkpoint.read(path)

    def settings(self, verb: str, with_split: bool, trust: Collection[str]) -> dict[str, Any]:
        """The part of the run's options that holds on another machine, with the checkpoint's weights.

        With `with_split`, the run's split.csv, where there is one, replaces the options it came from. Raises UserError
        where the checkpoint names code that is not trusted, as parts.py says.
        """
        config: dict[str, Any] = self.metadata.config
        data, model, trainer = (
            {
                key: value
                for key, value in config[section].items()
                if isinstance(value, str | int | float | None)
                or (section != "trainer" and (key in parts.PARTS or "class_path" in config[section]))
            }
            for section in parts.SECTIONS
        )
        if verb != "fit":
            model = {key: value for key, value in model.items() if key not in ("optimizer", "scheduler")}
            data["transforms"] = None
        if model.get("backbone_lr") is None:  # its default depends on the weights, which change now
            model["backbone_lr"] = 1.0 if model.get("weights", "none") == "none" else 0.1
        if with_split and runs.is_inside(self.path) and (split := self.run / "split.csv").is_file():
            data |= dict.fromkeys(SPLIT_OPTIONS) | {"split": str(split)}
        parts.require_trusted_options({"data": data, "model": model, "trainer": {}}, trust, self.path)
        return {
            "data": {key: value for key, value in data.items() if key not in ("workers", "cache")},
            "model": model | {"weights": str(self.path)},
            "trainer": {key: value for key, value in trainer.items() if key in TRAINER_SETTINGS},
            "seed_everything": config.get("seed_everything", 0),
            **{key: config[key] for key in ("average", "patience", "monitor") if verb == "fit" and key in config},
        }

    def require_root(self, root: str | None) -> None:
        """Raises UserError where the images' path is the run's, and relative to the folder where that was begun."""
        path, is_own = Path(root or ""), root == self.metadata.config["data"].get("root")
        if is_own and not (path.is_absolute() or path.exists() or path == digits.ROOT or shards.is_remote(str(root))):
            begun = (self.run.resolve() / "../../..").resolve()
            there = shlex.quote(str(begun)) if (begun / path).exists() else "there"
            raise UserError(
                f"{root} is relative to the folder where the run was begun: cd {there}, or give --data.root."
            )

    def require_more_to_do(self, limits: Any, is_finished: bool = True) -> None:
        """Raises UserError beyond the limits max_epochs and max_steps; of a finished fit, also where one is reached."""
        done = epochs_done(self.content)
        if done is None:
            raise UserError(f"{self.path} holds no training state to continue from; give the run's last.ckpt.")
        state, steps = LoopState.saved_in(self.content), int(self.content.get("global_step", 0))
        begun = done + (state is not None and state.batch > 0)
        for unit, completed, reached in (("epochs", done, begun), ("steps", steps, steps)):
            limit = getattr(limits, f"max_{unit}")
            if limit not in (None, -1) and (reached > limit or (is_finished and completed >= limit)):
                raise UserError(f"{self.path} has completed its {completed} {unit}; give more by --trainer.max_{unit}.")

    def require_same_training(self, model: dict[str, Any]) -> None:
        """Raises UserError where the state of optimizer and schedule would be continued with other options."""
        run = {**optim.BEFORE, **self.metadata.config["model"]}
        of_step = {str(run["scheduler"]), str(model["scheduler"])} <= optim.WARMUPS.keys()
        names = ["optimizer", "weight_decay", *([] if of_step else ["scheduler", "lr", "backbone_lr"])]
        if changed := [f"--model.{name}" for name in names if run.get(name, model[name]) != model[name]]:
            rest = f"leave it out, or start a new fit by --model.weights {self.path}."
            raise UserError(f"{self.path} holds the training state of another {' and '.join(changed)}; {rest}")

    def require_same(self, model: str, part: dict[str, Any] | None, data: ImageData) -> None:
        """Raises UserError where the weights belong to another network or other classes."""
        class_names, root = data.class_names, data.root
        if (name := self.metadata.model) != model:
            option = "name" if part is None else "network"
            raise UserError(f"{self.path} holds the weights of {name}, not of {model}; leave --model.{option} out.")
        if (known := self.metadata.part) != part:
            raise UserError(
                f"{self.path} holds the weights of {known}, not of {part}; leave the network's options out."
            )
        if (trained := self.metadata.class_names) != class_names:
            raise UserError(
                f"{self.path} and {root} have different classes: the checkpoint has {some(trained)}; the data has "
                f"{some(class_names)}. Give its own data by --data.root.{look_alike(trained, class_names)}"
            )
        if root == shards.place(self.metadata.config["data"].get("root") or "") and shards.are_other(self.run, root):
            raise UserError(
                f"The shards in {root} are not those of {self.run} any more; put these back, or start anew."
            )
