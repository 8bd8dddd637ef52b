"""The Trainer's verbs, fit, validate and test: LightningCLI wired to ImageData and Classifier, and the run folder.

Layers of a setting, the last one wins: the signatures, the run of a checkpoint, --config files, the command line.
"""

import json
import math
import os
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project import arguments, optim, parts, runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.data.loader import LostWorker
from project.errors import FailedRun, UserError
from project.evaluation import report, scores
from project.inference.load import locate, locate_checkpoint
from project.training import distributed, fit, resume, sections, signals, trainer
from project.training.callbacks import PredictionWriter
from project.training.checkpoint_io import AsyncCheckpointIO
from project.training.checkpointing import ResumeCheckpoint
from project.training.loggers import loggers
from project.training.parser import Parser
from project.training.resume import Run, rank
from project.training.source_checkpoint import SPLIT_OPTIONS, SourceCheckpoint
from project.training.trainer import RunTrainer, listed

CHECKPOINT_VARIABLE = "PROJECT_CHECKPOINT"  # hands the checkpoint that was chosen to the other ranks
# the default of a user's callback may be an enum: --trainer.callbacks=Timer
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class Cli(LightningCLI):
    """fit, validate and test, with runs, checkpoints and their settings as the README describes them."""

    trainer: Any  # Trainer assigns most of its attributes outside its class, where mypy does not look
    datamodule: ImageData
    model: Classifier
    saver: ResumeCheckpoint  # of a fit

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb, self.argv = verb, resume.with_newest(argv)
        _, self.classes, self.trust = sections.named(self.argv)  # class paths: its own, and what a run may name
        self.source: SourceCheckpoint | None = None  # the checkpoint that the verb starts from
        self.run: Run | None = None  # the run that a fit writes into
        self.recorded: dict[str, Any] = {}  # the options as the run records them
        super().__init__(
            Classifier,
            ImageData,
            save_config_callback=None,
            trainer_class=RunTrainer,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # the command line

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the Trainer's parameters that are not options."""
        skipped = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return dict.fromkeys(("fit", "validate", "test"), skipped)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        seed = NonNegativeInt
        parser.add_argument("--seed_everything", type=seed, default=0, help="Seed of weights, order and augmentation.")
        parser.add_argument("--runs", type=str | None, default=None, help="Folder of all runs; by default runs/.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunTrainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in trainer.TRAINER_DEFAULTS.items()})
        sections.add(parser, self.classes)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; a second time, above the run's settings, where the verb starts from a checkpoint."""
        self.config = parser.parse_args([self.verb, *self.argv])
        options = self.config[self.verb]
        self.trust |= {*parts.named(options.as_dict())}  # what the user names is trusted
        if self.verb == "fit":
            if options.resume is not None and options.ckpt_path is not None:
                raise UserError("--resume continues the run itself, --ckpt_path starts a new one; leave one out.")
            self.run = self.find_run(options)
        if self.run is not None:
            try:
                self._resume(self.run)
            except BaseException:
                self.run.discard()
                raise
        elif self.verb != "fit" or options.ckpt_path is not None:
            self._start_from_checkpoint()
        else:
            self.recorded = sections.plain(self.parser, self.config, self.verb)
        # LightningCLI would put the model settings of a ckpt_path above those of the command line
        self.config[self.verb].ckpt_path = None
        self.ckpt_path = str(self.source.path) if self.source else None  # which the Trainer loads

    def find_run(self, options: Any) -> Run | None:
        """The unfinished run that a fit resumes; None for a new one."""
        return resume.find(options.resume, self.runs_root, options)

    def new_run(self) -> Run:
        """Makes the run of a fit, whose options are complete now."""
        return Run.new(self.runs_root, self.config.fit.name, self.datamodule, self.recorded, self.source)

    @property
    def runs_root(self) -> Path:
        """The folder of all runs: --runs, or runs/, in --trainer.default_root_dir where it is given."""
        options = self.config[self.verb]
        return Path(options.runs or Path(options.trainer.default_root_dir or "", runs.ROOT)).expanduser()

    def _resume(self, run: Run) -> None:
        """The options of the run, changed by the command line where that is allowed, and its own split."""
        file = run.folder / "config.yaml"
        config = resume.settings(file, self.config.fit)
        self._adopt(config, file)
        self.config = self.parser.parse_args([self.verb, f"--config={json.dumps(config, default=str)}", *self.argv])
        parts.require_trusted_names(self.config.fit.as_dict(), self.trust, file)
        self.recorded, options = sections.plain(self.parser, self.config, self.verb), self.config.fit
        os.environ[runs.VARIABLE] = str(run.folder)
        changes = run.changes(self.recorded)
        if not sections.is_foreign(self.classes) and (split := run.folder / "split.csv").is_file():
            options.data.split = str(split)
            for option in SPLIT_OPTIONS:
                options.data[option] = None
        self.source = run.source
        if self.source is None and options.ckpt_path is not None:  # it has not saved a checkpoint of its own yet
            self.source = SourceCheckpoint(locate_checkpoint(options.ckpt_path))
        if self.source is not None:
            self.source.require_root(options.data.get("root"))
            options.model.weights = str(self.source.path)
            # a run that is not finished may have been killed after its last save
            is_finished = runs.read_status(run.folder).get("state") == "finished"
            self.source.require_more_to_do(options.trainer, is_finished)
        for line in changes:
            print(f"resume: {line}", flush=True)

    def _start_from_checkpoint(self) -> None:
        """Parses once more, with the settings of the checkpoint's run below the command line."""
        chosen = self.config[self.verb]
        given = chosen.ckpt_path or os.environ.get(CHECKPOINT_VARIABLE)
        path = locate_checkpoint(given or runs.newest_checkpoint(self.runs_root))
        os.environ[CHECKPOINT_VARIABLE] = str(path)
        self.source = SourceCheckpoint(path)
        run_root = self.source.metadata.config["data"].get("root", "")
        known = self._adopt(self.source.settings(self.verb, False, self.trust), path)
        for with_split in (not sections.is_foreign(self.classes), False):
            settings = self.source.settings(self.verb, with_split, self.trust)
            settings["data"] = {key: value for key, value in settings["data"].items() if f"--data.{key}" in known}
            self.config = self.parser.parse_args([self.verb, f"--config={json.dumps(settings)}", *self.argv])
            options = self.config[self.verb]
            parts.require_trusted_names(options.as_dict(), self.trust, path)
            root = options.data.get("root", run_root)
            if chosen.data.get("split") is not None or Path(root).resolve() == Path(run_root).resolve():
                break
        else:
            if options.data.get("split", "") is None and (self.source.run / "split.csv").is_file():
                print(f"{root} is not the run's {run_root}, so the run's split.csv is not used; --data.split uses it")
        self.source.require_root(options.data.get("root"))
        if (given := options.model.weights) != str(path):
            raise UserError(f"--model.weights {given} and {path} are two sources of weights; leave one out.")
        self.recorded = sections.plain(self.parser, self.config, self.verb) | {"ckpt_path": str(path)}
        if self.verb == "fit":
            self.source.require_more_to_do(options.trainer)
            self.source.require_same_training(self.recorded["model"])
        else:
            print(f"checkpoint: {path}", flush=True)

    def _adopt(self, config: Any, source: Path) -> set[str]:
        """Gives the parser the options of classes that a run names, if their arguments are trusted; returns all."""
        parts.require_trusted_options(config, self.trust, source)
        paths = {key: str(config[key]["class_path"]) for key in sections.SECTIONS if "class_path" in config[key]}
        if (paths := paths | self.classes) != self.classes:
            self.classes = paths
            self.setup_parser(True, dict(self.parser_kwargs), {})
        known = sections.known(self.parser)
        for name in paths:
            given = {key: value for key, value in config[name].items() if f"--{name}.{key}" in known}
            parts.require_trusted_arguments(sections.kind(name, paths), given, self.trust, source)
        return known

    # objects

    def instantiate_classes(self) -> None:
        """Makes data and model, checks them, claims the run's folder and makes the Trainer."""
        try:
            self.config_init, self.datamodule, self.model = sections.make(self.parser, self.config, self.classes)
            self.datamodule.setup(self.verb)
            if self.source is not None:
                self.source.require_same(self.model.name, self.model.hparams["network"], self.datamodule)
            self.trainer = self.instantiate_trainer()
            self.datamodule.require_enough_for(self.trainer.world_size, self.verb)
            trainer.require_batches(self.trainer, self.datamodule, self.verb)
        except BaseException as error:
            if self.run is not None:
                self.run.discard()
            if isinstance(error, ValueError) and "Given value" in str(error):  # a class refuses its arguments
                raise arguments.explain(str(error), []) from error
            raise
        if self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where --trainer.precision asks for no less

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Claims the run's folder, then makes the Trainer with callbacks and loggers that write there."""
        options = self.config_init[self.verb].trainer.as_dict()
        users = {name: listed(options[name]) for name in ("callbacks", "logger", "plugins")}
        if options["barebones"]:
            raise UserError("--trainer.barebones leaves neither metrics nor checkpoints; bench measures the speed.")
        options |= distributed.launched(options["num_nodes"], options["devices"])
        if self.verb == "fit":
            options |= self._fit_options(options, users)
        else:
            results = [PredictionWriter(self.source.path)] if self.verb == "test" and self.source else []
            options |= {"callbacks": [*results, *users["callbacks"]], "logger": users["logger"]}
        options["callbacks"].insert(0, distributed.SameOnAllRanks(self.recorded, self.source))
        return trainer.make(options)

    def _fit_options(self, options: dict[str, Any], users: dict[str, list[Any]]) -> dict[str, Any]:
        """The Trainer's arguments for a fit: a default length, the run's loggers, callbacks and checkpoints."""
        chosen = self.config.fit
        if [options[limit] for limit in ("max_epochs", "max_steps", "max_time")] == [None, -1, None]:
            most = optim.FINE_TUNING_EPOCHS if self.model.fine_tunes else math.inf
            options["max_epochs"] = chosen.trainer.max_epochs = int(min(self.datamodule.epochs, most))
        if none := [name for name in ("max_epochs", "max_steps", "limit_train_batches") if options[name] == 0]:
            raise UserError(f"There is nothing to train: --trainer.{none[0]} is 0.")
        if chosen.patience and options["limit_val_batches"] == 0:
            raise UserError("--patience needs validations; --trainer.limit_val_batches is 0.")
        self.model.watched = fit.watched(self.model, chosen.monitor)
        fit.require_usable(users["callbacks"], self.model, chosen)
        self.recorded["trainer"]["max_epochs"] = chosen.trainer.max_epochs
        if self.run is None:  # their defaults depend on where the weights come from
            resolved = ("lr", "backbone_lr", "label_smoothing", "freeze_bn", "warmup")
            self.recorded["model"] |= {name: self.model.hparams[name] for name in resolved}
            self.run = self.new_run()
        self.model.run_metadata = fit.run_metadata(self.recorded, self.datamodule)
        io = AsyncCheckpointIO(self.run.checkpoints) if options["enable_checkpointing"] is not False else None
        begin = partial(self.run.begin, self.recorded, self.runs_root)
        self.saver = ResumeCheckpoint(io, self.run, float(chosen.save_every), begin)
        return {
            "max_epochs": options["max_epochs"],
            "logger": [*(loggers(self.run) if options["logger"] is not False else []), *users["logger"]],
            "callbacks": fit.callbacks(chosen, self.model, self.run, self.saver, users["callbacks"]),
            "plugins": [*users["plugins"], *listed(io)],
        }

    # the run

    def fit(self, **_: Any) -> None:
        """Trains, records in the run how the fit ended, and prints the result."""
        trainer.keep_freed_memory()
        assert self.run is not None
        shows = self.trainer.is_global_zero and not self.trainer.fast_dev_run
        if shows:
            fit.introduce(self.datamodule, self.model, self.trainer, self.run)
        with fit.recorded(self.run, self.trainer, self.saver):
            try:
                with distributed.lost_ranks():
                    self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                if str(error).startswith("Early stopping conditioned on"):
                    raise UserError(" ".join(str(error).split())) from error
                if not (self.saver.restoring and self.ckpt_path):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"Cannot resume from {self.ckpt_path}: {reason}") from error
        if shows:
            fit.summarize(self.trainer, self.run)

    def validate(self, **_: Any) -> None:
        """Measures the metrics on the validation images."""
        self.trainer.validate(self.model, self.datamodule, self.ckpt_path, verbose=False, weights_only=True)
        self.model.print(f"raw probabilities: {scores.format_scores(self.trainer.callback_metrics)}")

    def test(self, **_: Any) -> None:
        """Measures the metrics on the test images and writes them, and the report, into the checkpoint's run."""
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, verbose=False)
        if self.config.test.report and self.trainer.is_global_zero:
            print(f"report: {report.write(locate(self.ckpt_path, self.trust))}", flush=True)


def run(verb: str, argv: list[str], cli: type[Cli] = Cli) -> int:
    """Runs fit, validate or test with the words after it; the exit code is 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises UserError for a mistake in options, data or checkpoint; FailedRun where a disk is full or fails, or a worker.
    """
    trainer.quieten()
    if rank() == 0:
        for variable in (CHECKPOINT_VARIABLE, runs.VARIABLE):
            os.environ.pop(variable, None)
    try:
        with signals.restored(), distributed.lost_ranks():
            cli(verb, argv)
        return 0
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise UserError(" ".join(str(error).split())) from error
    except SIGTERMException:
        code = 143
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):  # else Lightning has cleaned up
            raise
        code = 130
    except LostWorker as error:
        raise FailedRun(f"{error} {_how_to_resume()}".rstrip()) from error
    except OSError as error:
        if error.errno not in trainer.DISK_ERRORS:
            raise
        reason = f"{error.strerror or error}: {error.filename or 'a log of the run'}"
        raise FailedRun(f"{reason}. {_how_to_resume()}".rstrip()) from error
    if rank() != 0:
        return 0  # Lightning kills the first rank at once when another one fails
    print(f"\nstopped. {_how_to_resume()}".rstrip())
    return code


def _how_to_resume() -> str:
    folder = os.environ.get(runs.VARIABLE)
    return f"Resume with: {resume.how_to_resume(Path(folder))}" if folder and Path(folder).is_dir() else ""
