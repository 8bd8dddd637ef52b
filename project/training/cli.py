"""The Trainer's verbs, fit, validate and test: LightningCLI wired to ImageData and Classifier, and the run folder.

Layers of a setting, the last one wins: the signatures, the run of a checkpoint, --config files, the command line.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project import runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import FailedRun, UserError
from project.inference import metadata
from project.inference.load import locate, locate_checkpoint
from project.training import allocator, fit, resume, trainer
from project.training.callbacks import PredictionWriter, Unreadable
from project.training.checkpoint_io import LAST, AsyncCheckpointIO
from project.training.checkpointing import ResumeCheckpoint
from project.training.parser import Parser
from project.training.resume import Run, rank
from project.training.source_checkpoint import SPLIT_OPTIONS, SourceCheckpoint
from project.training.trainer import RunTrainer, listed

CHECKPOINT_VARIABLE = "PROJECT_CHECKPOINT"  # hands the checkpoint that was chosen to the other ranks


class Cli(LightningCLI):
    """fit, validate and test, with runs, checkpoints and their settings as the README describes them."""

    trainer: Any  # Trainer assigns most of its attributes outside its class, where mypy does not look
    datamodule: ImageData
    model: Classifier

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb, self.argv = verb, argv
        self.source: SourceCheckpoint | None = None  # the checkpoint that the verb starts from
        self.run: Run | None = None  # the run that a fit writes into
        self.recorded: dict[str, Any] = {}  # a fit's options, as its run records them
        super().__init__(
            Classifier,
            ImageData,
            save_config_callback=None,
            trainer_class=RunTrainer,
            trainer_defaults=trainer.TRAINER_DEFAULTS,
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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.class_weights", "model.class_weights", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; a second time, above the run's settings, where the verb starts from a checkpoint."""
        self.argv = resume.with_newest(self.argv)
        self.config = parser.parse_args([self.verb, *self.argv])
        options = self.config[self.verb]
        if self.verb == "fit" and (choice := options.resume or resume.requeued()):
            if options.ckpt_path is not None:
                raise UserError("--resume continues the run itself, --ckpt_path starts a new one; leave one out.")
            self.run = resume.find(choice)
        if self.run is not None:
            self._resume(parser, self.run)
        elif self.verb != "fit" or options.ckpt_path is not None:
            self._start_from_checkpoint(parser)
        # LightningCLI would put the model settings of a ckpt_path above those of the command line
        self.config[self.verb].ckpt_path = None

    def _resume(self, parser: LightningArgumentParser, run: Run) -> None:
        """The options of the run, changed by the command line where that is allowed, and its own split."""
        base = f"--config={run.folder / 'config.yaml'}"
        before, self.config = (parser.parse_args([self.verb, base, *words]) for words in ([], self.argv))
        self.recorded = self._plain_options()
        for line in run.changes(self._plain_options(before), self.recorded):
            print(f"resume: {line}", flush=True)
        options = self.config.fit
        if (split := run.folder / "split.csv").is_file():
            options.data.split = str(split)
            for option in SPLIT_OPTIONS:
                options.data[option] = None
        self.source = run.source or (SourceCheckpoint(Path(options.ckpt_path)) if options.ckpt_path else None)
        if self.source is not None:
            options.model.weights = str(self.source.path)
            # a run that is not finished may have been killed after its last save
            is_finished = runs.read_status(run.folder).get("state") == "finished"
            self.source.require_more_to_do(options.trainer.max_epochs if is_finished else None)

    def _start_from_checkpoint(self, parser: LightningArgumentParser) -> None:
        """Parses once more, with the settings of the checkpoint's run below the command line."""
        given, chosen_split = self.config[self.verb].ckpt_path, self.config[self.verb].data.split
        path = locate_checkpoint(given or os.environ.get(CHECKPOINT_VARIABLE))
        os.environ[CHECKPOINT_VARIABLE] = str(path)
        self.source = SourceCheckpoint(path)
        run_root = self.source.metadata.config["data"].get("root", "")
        for with_split in (True, False):
            settings = self.source.settings(with_split, self.verb)
            self.config = parser.parse_args([self.verb, f"--config={json.dumps(settings)}", *self.argv])
            root = self.config[self.verb].data.root
            if chosen_split is not None or Path(root).resolve() == Path(run_root).resolve():
                break
        else:
            if self.config[self.verb].data.split is None:
                print(f"{root} is not the run's {run_root}: its split.csv is not used (--data.split would)")
        self.source.require_own_weights(self.config[self.verb].model.weights)
        if self.verb == "fit":
            self.source.require_more_to_do(self.config.fit.trainer.max_epochs)
            self.recorded = self._plain_options() | {"ckpt_path": str(path)}
        else:
            print(f"checkpoint: {path}", flush=True)

    def _plain_options(self, config: Any = None) -> dict[str, Any]:
        """The verb's options as plain types."""
        options = yaml.safe_load(self.parser.dump(config or self.config, skip_none=False))[self.verb]
        return dict(options) | {"resume": None}

    # objects

    def instantiate_classes(self) -> None:
        """Makes data and model, checks them, claims the run's folder and makes the Trainer."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self.config_init[self.verb].data, self.config_init[self.verb].model
        self.datamodule.setup(self.verb)
        if self.source is not None:
            self.source.require_same(self.model.name, self.datamodule.class_names, self.datamodule.root)
            if self.verb == "test":
                self.source.require_writable(PredictionWriter.FILES)
        try:
            self.trainer = self.instantiate_trainer()
            self.datamodule.require_enough_for(self.trainer.world_size, self.verb)
        except BaseException:
            if self.run is not None:
                self.run.discard()
            raise
        if self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where --trainer.precision asks for no less

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Claims the run's folder, then makes the Trainer with callbacks and loggers that write there.

        Args:
            **kwargs: Arguments for the Trainer that take precedence over the command line.
        """
        options = self.config_init[self.verb].trainer.as_dict() | kwargs
        if self.verb == "fit":
            options |= self._fit_options(options)
        else:
            own: list[Callback] = [Unreadable()]
            if self.verb == "test":
                assert self.source is not None
                own.append(PredictionWriter(self.source.run, self.source.path))
            options |= {"callbacks": [*own, *listed(options["callbacks"])], "logger": listed(options["logger"])}
        if options["benchmark"] is None and not options["deterministic"]:
            options["benchmark"] = True  # all images have one size: cuDNN's search pays
        if options["enable_progress_bar"] is None:
            options["enable_progress_bar"] = sys.stderr.isatty()
        if options["enable_progress_bar"]:
            options["callbacks"].append(TQDMProgressBar(refresh_rate=5))
        try:
            return RunTrainer(**options)
        except (TypeError, ValueError) as error:  # how Lightning refuses some of its options
            raise UserError(f"The Trainer refuses its options: {' '.join(str(error).split())}") from error

    def _fit_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The Trainer's arguments for a fit: a default length, the run's loggers, callbacks and checkpoints."""
        if [options[limit] for limit in ("max_epochs", "max_steps", "max_time")] == [None, -1, None]:
            options["max_epochs"] = self.config.fit.trainer.max_epochs = self.datamodule.epochs
        fit.require_possible(options, self.config.fit.patience)
        if not options["fast_dev_run"]:
            self.run = self._claim_run()
        saves = self.run is not None and options["enable_checkpointing"] is not False
        io = AsyncCheckpointIO(self.run.checkpoints) if self.run is not None and saves else None
        loggers = fit.loggers(self.run) if options["logger"] is not False else []
        return options | {
            "callbacks": self.fit_callbacks(io, listed(options["callbacks"])),
            "logger": [*loggers, *listed(options["logger"])],
            "plugins": [*listed(options["plugins"]), *listed(io)],
        }

    def fit_callbacks(self, io: AsyncCheckpointIO | None, users: list[Callback]) -> list[Callback]:
        """All callbacks of a fit, in the order of their hooks."""
        settings = fit.settings(self.config.fit, self.datamodule, self.recorded.get("model", {}))
        return fit.callbacks(self.config.fit, settings, self.run, io, users)

    # the run

    def _claim_run(self) -> Run:
        """The folder of the run, with its configuration and status, before anything that writes into it is made."""
        options = self.recorded = self.recorded or self._plain_options()
        options["trainer"]["max_epochs"] = self.config.fit.trainer.max_epochs
        if self.run is None:  # the default depends on where the weights come from
            options["model"]["backbone_lr"] = self.model.backbone_lr
        settings = {key: value for key, value in options.items() if key not in ("name", "ckpt_path", "resume")}
        self.model.metadata = {"config": settings, "resize": self.datamodule.resize, **metadata.provenance()}
        if self.run is None:
            return Run.new(self.config.fit.name, self.datamodule, options, self.source)
        self.run.take_over(options)
        return self.run

    def before_fit(self) -> None:
        """Points runs/latest at the run, and describes the data and the network."""
        if self.run is not None and self.trainer.is_global_zero:
            runs.point_latest(self.run.folder, runs.ROOT / "latest")
            runs.write_status(self.run.folder, state="running", reason="", job=resume.job())
            fit.introduce(self.datamodule, self.model, self.trainer, self.run)

    def fit(self, **_: Any) -> None:
        """Trains, and records in the run how it ended."""
        allocator.keep_freed_memory()
        source = str(self.source.path) if self.source else None
        with fit.recorded(self.run, self.trainer):
            try:
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=source)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                if not any(c.restoring for c in self.trainer.callbacks if isinstance(c, ResumeCheckpoint)):
                    raise
                raise UserError(f"Cannot resume from {source}: {' '.join(str(error).split())[:200]}") from error
            fit.require_written(self.trainer)

    def validate(self, **_: Any) -> None:
        """Measures the metrics on the validation images."""
        assert self.source is not None
        path = str(self.source.path)
        self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def test(self, **_: Any) -> None:
        """Measures the metrics on the test images; writes into the checkpoint's run."""
        assert self.source is not None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(self.source.path))

    def after_test(self) -> None:
        """Writes the report."""
        if self.config.test.report and self.trainer.is_global_zero:
            from project.evaluation import report  # matplotlib: not for those who do without

            assert self.source is not None
            print(f"report: {report.write(locate(self.source.path))}", flush=True)

    def after_fit(self) -> None:
        """Prints the result, where it lies and what to do next."""
        if self.run is not None and self.trainer.is_global_zero:
            fit.summarize(self.trainer, self.run)


def run(verb: str, argv: list[str], cli: type[Cli] = Cli) -> int:
    """Runs one of the Trainer's verbs.

    Args:
        verb: fit, validate or test.
        argv: The words after the verb.
        cli: Makes data, model and Trainer, and runs them.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: A mistake in the options, the data or the checkpoint.
        FailedRun: The disk is full or fails.
    """
    trainer.quieten()
    if rank() == 0:
        for variable in (CHECKPOINT_VARIABLE, runs.VARIABLE):
            os.environ.pop(variable, None)
    try:
        with trainer.disk_errors_in_threads_left_to_main():
            cli(verb, argv)
    except MisconfigurationException as error:
        text = " ".join(str(error).split())
        if "backend found" in text:  # Lightning names neither the option nor the way out
            text = f"{text} Leave --trainer.accelerator out to use what this machine has, or give cpu."
        raise UserError(text) from error
    except SIGTERMException:
        return _stopped(verb, 143)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has cleaned up
            return _stopped(verb, 130)
        raise
    except OSError as error:
        if verb != "fit" or error.errno not in trainer.DISK_ERRORS:
            raise
        raise FailedRun(
            f"{error.strerror or error}: {error.filename or 'a log of the run'}. {_how_to_resume()}"
        ) from error
    return 0


def _stopped(verb: str, code: int) -> int:
    if rank() != 0:
        return 0  # Lightning kills the first rank at once when another one fails
    print(f"\nstopped. {_how_to_resume()}" if verb == "fit" and _how_to_resume() else "\nstopped")
    return code


def _how_to_resume() -> str:
    run = Path(os.environ.get(runs.VARIABLE, ""))
    exists = (run / "checkpoints" / LAST).exists()
    return f"Resume with: python -m project.cli fit --resume {run}" if exists else ""
