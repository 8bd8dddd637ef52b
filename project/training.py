"""The Trainer's verbs, fit, validate and test: LightningCLI wired to ImageData and Classifier, and the run folder.

Layers of a setting, the last one wins: the signatures, the run of a checkpoint, --config files, the command line.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only

from project import callbacks, checkpoint, runs, usage
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import UserError
from project.metrics import positive_index

CHECKPOINT_VARIABLE = "PROJECT_CHECKPOINT"  # tells the other ranks which one was found
TRAINER_DEFAULTS = {
    "max_epochs": 6,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # ImageData.setup has read a validation picture; starts a second sooner
    "use_distributed_sampler": False,  # BatchSampler shares the rows out, without repeats
    "enable_model_summary": False,
}
HARMLESS = (
    ".*does not have many workers.*",  # ImageData has chosen them, from the usable cores
    ".*exists and is not empty. Previous log files.*",  # the run's folder is new; config.yaml is all that is in it
    ".*dirpath has changed.*",  # a continued fit has a folder of its own, and its own best
    ".*smaller than the logging interval.*",  # a small folder; every epoch is logged all the same
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
)
HARDWARE = ("accelerator", "devices", "num_nodes", "strategy")  # of the machine, not of the run


class Parser(usage.Parser, LightningArgumentParser):
    """Lightning's parser, with errors in one sentence."""


class Cli(LightningCLI):
    """fit, validate and test, with runs, checkpoints and their settings as the README describes them."""

    trainer: Any  # most of Lightning's Trainer is set from outside its class, where mypy does not look
    datamodule: ImageData
    model: Classifier

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb, self.argv = verb, argv
        super().__init__(
            Classifier,
            ImageData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which of the Trainer's parameters are not options."""
        skipped = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return dict.fromkeys(("fit", "validate", "test"), skipped)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, and the run's name."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order and augmentation.")
        parser.add_argument("--name", type=str | None, help="Folder in runs/; by default the data folder's name.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the data tells the model."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; a second time, above the run's settings, where it starts from a checkpoint."""
        self.config = parser.parse_args([self.verb, *self.argv])
        given = self.config[self.verb].ckpt_path
        self.checkpoint: Path | None = None
        if self.verb == "fit" and given is None:
            return
        self.checkpoint = runs.find(given or os.environ.get(CHECKPOINT_VARIABLE))
        os.environ[CHECKPOINT_VARIABLE] = str(self.checkpoint)
        content = checkpoint.read(self.checkpoint)
        if self.verb == "fit" and "optimizer_states" not in content:
            raise UserError(f"{self.checkpoint} holds weights only; continue from the run's last.ckpt.")
        self.metadata = content[checkpoint.METADATA]
        settings = self._settings_of_run()
        self.config = parser.parse_args([self.verb, f"--config={json.dumps(settings)}", *self.argv])
        self.config[self.verb].ckpt_path = str(self.checkpoint)
        data = self.config[self.verb].data
        if data.split == settings["data"]["split"] and data.root != settings["data"]["root"]:
            data.split = None  # the run's split lists other pictures

    def _settings_of_run(self) -> dict[str, Any]:
        assert self.checkpoint is not None
        settings: dict[str, Any] = json.loads(json.dumps(self.metadata["config"]))
        split = runs.folder_of(self.checkpoint) / "split.csv"
        if split.is_file():
            settings["data"]["split"] = str(split)
        if self.verb != "fit":
            settings["trainer"] = {k: v for k, v in settings["trainer"].items() if k not in HARDWARE}
        return settings

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's model settings over the command line's."""

    def instantiate_classes(self) -> None:
        """Makes data, model and Trainer, and checks all of them before anything is written."""
        super().instantiate_classes()
        self.datamodule.setup(self.verb)
        if self.checkpoint is not None:
            self._require_same_classes()

    def _require_same_classes(self) -> None:
        trained, found = self.metadata["class_names"], self.datamodule.class_names
        if trained != found:
            raise UserError(
                f"{self.checkpoint} and {self.datamodule.root} have different classes: the checkpoint has "
                f"{', '.join(trained)}; the data has {', '.join(found)}. Give its own data by --data.root."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the callbacks that every run has; its loggers follow in `before_fit`."""
        trainer = self._get(self.config_init, "trainer")
        given = trainer["logger"]
        self.log = given is not False and self.verb == "fit"
        loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else []
        always: list[Callback] = [callbacks.Unreadable()]
        if self.verb == "fit":
            always += [callbacks.Narrator(), callbacks.FirstBatch()]
        if trainer["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if kwargs.get("enable_progress_bar", trainer["enable_progress_bar"]):
            always.append(TQDMProgressBar(refresh_rate=5))
        if self.verb == "fit" and trainer["enable_checkpointing"] is not False:
            always += callbacks.checkpoints()
        plugins = trainer["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config = {**trainer, **kwargs, "logger": loggers or False, "plugins": [*plugins, callbacks.CheckpointWriter()]}
        return self._instantiate_trainer(config, always)

    def before_fit(self) -> None:
        """Makes the run's folder and points loggers and checkpoints at it."""
        if self.trainer.fast_dev_run:
            return
        name = self.config.fit.name or self.datamodule.root.resolve().name
        self.run = runs.claim(name, rank_zero=_rank() == 0)
        if self.log:
            place: Any = {"save_dir": self.run.parent.parent, "name": name, "version": self.run.name}
            board, settings = TensorBoardLogger(**place, default_hp_metric=False), self._flat_settings()
            board.log_hyperparams(settings)
            self.trainer.loggers = [board, CSVLogger(**place), *self.trainer.loggers]
            self.trainer.callbacks += [LearningRateMonitor("step"), callbacks.Figures(settings)]
        for saver in self.trainer.checkpoint_callbacks:
            saver.dirpath = saver.dirpath or str(self.run / "checkpoints")
        self.model.metadata = {"config": self._settings(), "resize": self.datamodule.resize, **checkpoint.provenance()}
        if self.trainer.is_global_zero:
            (self.run / "config.yaml").write_text(self._config_yaml(), encoding="utf-8")
            self.datamodule.manifest.write_split(self.run / "split.csv")
            self._introduce()

    def fit(self, **kwargs: Any) -> None:
        """Trains."""
        self.trainer.fit(**kwargs, weights_only=True)

    def validate(self, **kwargs: Any) -> None:
        """Measures on the validation pictures."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Measures on the test pictures; writes into the checkpoint's run."""
        assert self.checkpoint is not None
        run = runs.folder_of(self.checkpoint)
        self.trainer.callbacks.append(callbacks.TestResults(run, self.checkpoint))
        self.trainer.test(**kwargs, weights_only=True)

    def after_fit(self) -> None:
        """Says what came out, where it lies and what to do next."""
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        figures = next((c for c in self.trainer.callbacks if isinstance(c, callbacks.Figures)), None)
        if figures is not None and figures.best:
            values = "  ".join(f"{key} {value:.4f}" for key, value in figures.best.items() if key != "epoch")
            print(f"best: epoch {figures.best['epoch']}  {values}")
        size = sum(file.stat().st_size for file in self.run.rglob("*") if file.is_file())
        print(f"run: {self.run} ({size / 1e6:,.0f} MB)")
        print(f"next: make board | python -m project.cli test | python -m project.cli predict {self.run} PICTURES...")

    def _settings(self) -> dict[str, Any]:
        """The run's configuration as plain types, without what names the run."""
        settings: dict[str, Any] = yaml.safe_load(self._config_yaml())
        return {key: settings[key] for key in ("seed_everything", "trainer", "model", "data")}

    def _config_yaml(self) -> str:
        text: str = self._parser("fit").dump(self.config.fit, skip_none=False)
        return f"# python -m project.cli fit --config THIS_FILE\n{text}"

    def _flat_settings(self) -> dict[str, Any]:
        data = self.datamodule
        return {
            "seed_everything": self.config.fit.seed_everything,
            "max_epochs": self.trainer.max_epochs,
            "batch_size": data.batch_size,
            "image_size": data.image_size,
            "resize": data.resize,
            "augment": data.augment,
            **{f"model/{key}": value for key, value in self.config.fit.model.as_dict().items() if value is not None},
        }

    def _introduce(self) -> None:
        data = self.datamodule
        print(data.manifest.summary())
        for notice in data.manifest.notices:
            print(notice)
        if (positive := positive_index(data.class_names, self.model.hparams["positive"])) is not None:
            print(f"positive class: {data.class_names[positive]} (--model.positive chooses the other)")
        millions = sum(p.numel() for p in self.model.network.parameters()) / 1e6
        device = self.trainer.strategy.root_device.type
        print(
            f"{self.model.name}, {millions:.1f} M parameters, {data.image_size} px, batches of {data.batch_size}, "
            f"on {self.trainer.world_size} x {device}: {self.run}",
            flush=True,
        )


def _rank() -> int:
    rank: int = getattr(rank_zero_only, "rank", 0)  # Lightning reads it from the launcher's variables
    return rank


def run(verb: str, argv: list[str]) -> int:
    """Runs one of the Trainer's verbs.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: What the user gave cannot be used.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    os.environ.pop(CHECKPOINT_VARIABLE, None) if _rank() == 0 else None
    try:
        Cli(verb, argv)
    except MisconfigurationException as error:
        text = " ".join(str(error).split())
        if "backend found" in text:  # Lightning names neither the option nor the way out
            text = f"{text} Leave --trainer.accelerator out to use what this machine has, or give cpu."
        raise UserError(text) from error
    except SIGTERMException:
        return 143
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has saved and cleaned up
            last = Path(os.environ.get(runs.VARIABLE, "")) / "checkpoints" / "last.ckpt"
            print(
                f"\nstopped; continue with: python -m project.cli fit --ckpt_path {last}"
                if last.exists()
                else "\nstopped before the first checkpoint"
            )
            return 130
        raise
    return 0
