"""The verb fit as a function, and what it leaves; with Classifier and ImageData for a Trainer of one's own."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from project import parts, runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.data.inputs import gather
from project.errors import UserError
from project.inference import checkpoint
from project.inference.load import load
from project.inference.predictions import Prediction

__all__ = ["Classifier", "ImageData", "Run", "fit"]
File = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """What a fit leaves."""

    folder: Path  # runs/<name>/version_N
    best: Path  # the checkpoint with the lowest val/loss
    last: Path  # the one from which `fit(resume=folder)` continues
    trust: frozenset[str] = frozenset()  # the class paths of its parts

    @property
    def figures(self) -> dict[str, float | None]:
        """What the validation of `best` measured: val/loss, val/accuracy and so on."""
        metrics = checkpoint.read(self.best)[1].metrics
        return {name: value for name, value in metrics.items() if name.startswith("val/")}

    def test(self, **options: Any) -> dict[str, Any]:
        """Does what the verb test does, with its options; returns the content of test_metrics.json."""
        _run("test", {"ckpt_path": self.best} | options, self.trust)
        return dict(json.loads((self.folder / runs.TEST_METRICS).read_text(encoding="utf-8")))

    def predict(self, images: File | Iterable[File], **options: Any) -> list[Prediction]:
        """Labels one or several files, folders, patterns or CSV files, with the options of `Predictor.predict`."""
        words = [images] if isinstance(images, str | os.PathLike) else images
        paths, true = zip(*gather([os.fspath(word) for word in words]), strict=True)
        found = load(self.best, trust=self.trust).predict(paths, **options)
        return [prediction._replace(true=label) for prediction, label in zip(found, true, strict=True)]


def fit(root: File | None = None, *, trust: Collection[str] = (), **options: Any) -> Run:
    """Trains on a folder of images, by default the bundled digits, as the verb fit does, and prints what it prints.

    UserError is raised for a mistake in the options or the data.

    Args:
        root: The images, as --data.root.
        trust: Class paths that a checkpoint or run which the fit starts from may name.
        **options: Those of the verb, as in its configuration files, such as `name="first", trainer={"max_epochs": 3}`,
            or by their names on the command line, `**{"model.lr": 1e-3}`; `config` is such a file, or a list of them.
    """
    if several := {"seeds", "folds"} & options.keys():
        raise UserError(f"{several.pop()} makes several runs and fit() one; use the command line: fit --seeds 5.")
    _run("fit", options | ({} if root is None else {"data.root": root}), trust)
    folder = Path(os.environ[runs.VARIABLE])
    if not folder.is_dir():
        raise UserError("trainer.fast_dev_run has passed, and leaves no run to return; train without it.")
    own = frozenset(parts.named(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
    return Run(folder, folder / "checkpoints" / "best.ckpt", folder / "checkpoints" / "last.ckpt", own)


def _run(verb: str, options: dict[str, Any], trust: Collection[str]) -> None:
    from project.training import cli  # which Classifier and ImageData do without

    files = options.pop("config", [])
    files = [files] if isinstance(files, str | os.PathLike) else files
    trusted = [f"--trust={path}" for path in trust]
    code = cli.run(verb, [*(f"--config={os.fspath(file)}" for file in files), *_words(options), *trusted])
    if code:
        raise KeyboardInterrupt if code == 130 else SystemExit(code)


def _words(options: Mapping[str, Any], group: str = "") -> list[str]:
    """The options as words of a command line; a UserError for a value that these cannot hold."""
    words: list[str] = []
    for name, value in options.items():
        is_group = name in parts.SECTIONS or (name == "init_args" and group in ("data.", "model."))
        if is_group and isinstance(value, Mapping):
            words += _words(value, f"{group}{name}.")
            continue
        try:
            text = os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)
        except TypeError as error:
            found = f"{group}{name} is {value!r}, which a configuration file cannot hold"
            raise UserError(f"{found}; a class is given as {{'class_path': 'package.module.Class'}}.") from error
        words.append(f"--{group}{name}={text}")
    return words
