"""Metadata: what a checkpoint or a bundle's config.json holds beside the weights; torch is not needed here."""

import importlib.metadata
import importlib.util
import math
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from project import parts
from project.data import workers
from project.data.images import RESIZE
from project.errors import UserError, command
from project.inference import calibration

MAX_SIZE = 16_384  # side of an image, in pixels: a foreign file must not decide how much memory is allocated


@dataclass(frozen=True)
class Metadata:
    """What is known of a trained network."""

    model: str  # as `models.build` takes it
    class_names: list[str]
    image_size: int  # side of the square images, in pixels
    resize: str
    mean: list[float]  # of the pixels, one per channel, on the scale of 0 to 1
    std: list[float]
    config: dict[str, Any]  # the run's options: the sections data, model and trainer, and others by name
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that trained it, by name
    machine: str = ""
    git_commit: str = ""  # of the code that trained it; with "+" where it had uncommitted changes
    metrics: dict[str, float | None] = field(default_factory=dict)  # the last values that the fit logged
    validated: bool = True  # whether the fit had measured val/loss before it saved these weights
    temperature: float = 1.0  # divisor of the logits, built into a bundle; a checkpoint's is in a file of its own
    calibrated: bool | None = None  # whether the temperature was fitted; None in a checkpoint's file
    max_logits: list[float] = field(default_factory=list)  # of validation images, as `calibration.quantiles`
    precision: str = "float32"  # or int8
    export: dict[str, Any] = field(default_factory=dict)  # versions and git_commit of the export
    compared: dict[str, Any] = field(default_factory=dict)  # differences between a bundle and its checkpoint
    int8: dict[str, Any] | None = None  # accuracy, size and speed in 32 and 8 bits, where 8 bits were tried

    @classmethod
    def parse(cls, content: Any, refusal: str) -> "Metadata":
        """Validates the content of a file, whoever wrote it: values by name, of which unknown ones are ignored.

        Where one is missing or invalid, the UserError begins with `refusal`: the file, and what it is not.
        """
        if not isinstance(content, dict):
            raise UserError(f"{refusal}: it has no metadata; give a run, its best.ckpt or a bundle.")
        known = {name: content[name] for name in RULES if content.get(name) is not None}
        for name, (expected, is_valid) in RULES.items():
            if name in (*REQUIRED, *known) and not is_valid(known.get(name)):
                raise UserError(f"{refusal}: its {name} is not {expected}.")
        return cls(**known)

    @property
    def part(self) -> dict[str, Any] | None:
        """Class path and arguments of a network that has no short name."""
        network = self.config["model"].get("network")
        return network and parts.part(network)

    @property
    def calibration(self) -> str:
        """What the probabilities are, in the word that stands wherever they or their scores are shown."""
        return "calibrated" if self.calibrated else "raw"

    def unknown_below(self, share: float) -> tuple[float, str]:
        """Chooses the maximum logit, at the temperature, below which an image may be of none of the classes.

        The text with it is the share of the validation images that are below it, at most `share`, 0 to 1; UserError
        where their maximum logits are not known.
        """
        if not (logits := sorted(self.max_logits)):
            missing = "The validation images, by which unknown images are told apart, have not been measured"
            raise UserError(f"{missing}: run {command('test')} RUN, and export a bundle again after it.")
        count, threshold = len(logits), logits[int(share * (len(logits) - 1))]
        flagged = sum(logit < threshold for logit in logits) / count
        number = count if count < calibration.QUANTILES else "the"
        return threshold / self.temperature, f"{100 * flagged:.1f} % of {number} validation images"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)  # as a folder's name


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value) > 1


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) and math.isfinite(number) for number in value)


def _is_config(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(k), dict) for k in ("data", "model", "trainer")):
        return False
    if not (value["model"].get("network") is None or parts.is_part(value["model"]["network"])):
        return False
    types: dict[str, type] = dict.fromkeys(("root", "split", "group", "exclude", "layout", "keep"), str)
    types |= dict.fromkeys(("split_seed", "folds", "fold"), int)
    types = {"root": str} if "class_path" in value["data"] else types  # those of another class may be of other types
    return all(isinstance(value["data"].get(name), kind | None) for name, kind in types.items())


REQUIRED = ("model", "class_names", "image_size", "resize", "mean", "std", "config")
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a name", _is_text),
    "class_names": ("a list of different names", _are_names),
    "image_size": (f"a number of pixels up to {MAX_SIZE}", lambda size: type(size) is int and 0 < size <= MAX_SIZE),
    "resize": ("a known way to resize", lambda resize: isinstance(resize, str) and bool(RESIZE.fullmatch(resize))),
    "mean": ("three numbers", lambda mean: _are_numbers(mean) and len(mean) == 3),
    "std": ("three numbers above 0", lambda std: _are_numbers(std) and len(std) == 3 and min(std) > 0),
    "max_logits": ("a list of numbers", _are_numbers),
    "config": ("a configuration", _is_config),
    "temperature": ("a number from 0.01 to 100", lambda number: isinstance(number, float) and 0.01 < number < 100),
    **dict.fromkeys(("validated", "calibrated"), ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(("machine", "git_commit", "precision"), ("text", _is_text)),
    **dict.fromkeys(("versions", "metrics", "export", "compared", "int8"), ("an object", lambda v: type(v) is dict)),
}


@cache
def provenance() -> dict[str, Any]:
    """Returns what `Metadata` records of this process: `versions`, `machine` and `git_commit`."""
    import torch

    packages = ["torch", "torchvision", "lightning", "torchmetrics", "pillow", "numpy"]
    packages += ["timm"] if importlib.util.find_spec("timm") else []
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    machine = f"{platform.system()}, {platform.machine()}, {workers.usable_cores()} cores"
    if torch.accelerator.is_available():
        machine += f", {torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    return {"versions": versions, "machine": machine, "git_commit": _git_commit()}


def of_plain_fit(trainer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a Trainer without a verb can tell of its fit: `config`, `resize` and the provenance.

    With data other than ImageData, the verbs are given theirs.
    """
    resize = getattr(trainer.datamodule, "resize", "")
    data = dict(trainer.datamodule.hparams) if resize else {}
    of_data = ("class_names", "image_size", "class_weights")  # no options of the model
    model = {name: value for name, value in options.items() if name not in of_data}
    names = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
    config = {"data": data, "model": model, "trainer": {name: getattr(trainer, name) for name in names}}
    config["seed_everything"] = data.pop("seed", 0)
    return {"config": config, "resize": resize or "stretch", **provenance()}


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe"]
    command += ["--always", "--abbrev=40", "--exclude=*", "--dirty=+"]  # the full hash, and no tag
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # not a git checkout, or no git
