"""The Trainer's verbs, fit, validate and test: LightningCLI wired to ImageData and Classifier, and the run folder.

Layers of a setting, the last one wins: the signatures, the run of a checkpoint, --config files, the command line.
"""

import contextlib
import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only

from project import allocator, average, board, callbacks, checkpoint, files, logs, resuming, runs, saving, usage
from project.answers import Answers
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import FailedRun, UserError
from project.features import FrozenFeatures
from project.metrics import positive_index
from project.origin import SPLIT_OPTIONS, Origin
from project.pace import Pace
from project.projector import Projector
from project.watcher import Watcher
from project.writer import LAST, CheckpointWriter

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
CHECKPOINT_VARIABLE = "PROJECT_CHECKPOINT"  # tells the other ranks which one was found
TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # ImageData.setup has read a validation picture; starts a second sooner
    "use_distributed_sampler": False,  # BatchSampler shares the rows out, without repeats
    "enable_model_summary": False,
}
HARMLESS = (
    ".*does not have many workers.*",  # ImageData has chosen them, from the usable cores
    ".*Checkpoint directory .* exists and is not empty.*",  # a run that goes on
    ".*resuming from a checkpoint that ended before the epoch ended.*",  # the loader goes on at the batch
    ".*dirpath has changed.*",  # a continued fit has a folder of its own, and its own best
    ".*smaller than the logging interval.*",  # a small folder; every epoch is logged all the same
    ".*module.s. in eval mode at the start of training.*",  # frozen layers
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
)


class Parser(usage.Parser, LightningArgumentParser):
    """Lightning's parser, with errors in one sentence."""


class Cli(LightningCLI):
    """fit, validate and test, with runs, checkpoints and their settings as the README describes them."""

    trainer: Any  # most of Lightning's Trainer is set from outside its class, where mypy does not look
    datamodule: ImageData
    model: Classifier

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb, self.argv = verb, argv
        self.origin: Origin | None = None
        self.resumption: resuming.Resumption | None = None
        self.run: Path | None = None
        self.hold: runs.Hold | None = None
        self.writer = CheckpointWriter()
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
        """The seed."""
        seed = NonNegativeInt
        parser.add_argument("--seed_everything", type=seed, default=0, help="Seed of weights, order and augmentation.")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--name", type=str | None, help="Folder in runs/; by default the data folder's name.")
            average = "Validate and save a moving average of the weights that keeps this share at each step, e.g. 0.99."
            parser.add_argument("--average", type=OpenUnitInterval | None, help=average)
            resume = (
                "Go on with an unfinished run: its folder; nothing for the newest; auto starts one if there is none."
            )
            parser.add_argument("--resume", type=str | None, nargs="?", const=resuming.NEWEST, help=resume)
            minutes = "Minutes of training that are lost at most when the process is killed."
            parser.add_argument("--save_every", type=PositiveFloat, default=5.0, help=minutes)
            patience = "Stop after so many validations without a lower val/loss."
            parser.add_argument("--patience", type=PositiveInt | None, help=patience)
            histograms = "Show in TensorBoard how the weights and gradients of each layer are distributed."
            parser.add_argument("--histograms", type=bool, default=False, help=histograms)
        if subcommand == "test":
            parser.add_argument("--report", type=bool, default=True, help="Write report.html into the run too.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the data tells the model."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.class_weights", "model.class_weights", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; a second time, above the run's settings, where it starts from a checkpoint."""
        self.config = parser.parse_args([self.verb, *self.argv])
        if self.verb == "fit" and (choice := self.config.fit.resume or resuming.requeued()):
            if self.config.fit.ckpt_path is not None:
                raise UserError("--resume goes on in the run, --ckpt_path in a new one; leave one out.")
            self.resumption = resuming.find(choice, first_rank=_rank() == 0)
        if self.resumption is not None:
            self._take_up(parser, self.resumption)
        elif self.verb != "fit" or self.config.fit.ckpt_path is not None:
            self._start_from_checkpoint(parser)

    def _take_up(self, parser: LightningArgumentParser, resumption: resuming.Resumption) -> None:
        """The run's own options, and its own split."""
        run, self.hold = resumption.run, resumption.hold
        base = f"--config={run / 'config.yaml'}"
        then, self.config = (parser.parse_args([self.verb, base, *words]) for words in ([], self.argv))
        for line in resumption.differences(self._options(then), self._options(self.config)):
            print(f"resume: {line}", flush=True)
        self.recorded = self._options(self.config)
        options = self.config.fit
        if (split := run / "split.csv").is_file():
            options.data.split = str(split)
            for option in SPLIT_OPTIONS:
                options.data[option] = None
        self.origin = resumption.origin or (Origin(Path(options.ckpt_path)) if options.ckpt_path else None)
        if self.origin is not None:
            options.ckpt_path = options.model.weights = str(self.origin.path)
            # one that is not may have been killed after its last save
            is_finished = runs.status(run).get("state") == "finished"
            self.origin.require_more_to_do(options.trainer.max_epochs if is_finished else None)

    def _options(self, config: Any) -> dict[str, Any]:
        """A fit's options as plain types, as a run records them."""
        options: dict[str, Any] = yaml.safe_load(self._parser("fit").dump(config.fit, skip_none=False))
        return options | {"resume": None}

    def _start_from_checkpoint(self, parser: LightningArgumentParser) -> None:
        """Settings of a checkpoint's run below those of the command line."""
        given, chosen_split = self.config[self.verb].ckpt_path, self.config[self.verb].data.split
        path = runs.find(given or os.environ.get(CHECKPOINT_VARIABLE))
        os.environ[CHECKPOINT_VARIABLE] = str(path)
        self.origin = Origin(path)
        run_root = self.origin.metadata["config"]["data"].get("root", "")
        for with_split in (True, False):
            settings = self.origin.settings(with_split, self.verb)
            self.config = parser.parse_args([self.verb, f"--config={json.dumps(settings)}", *self.argv])
            root = self.config[self.verb].data.root
            if chosen_split is not None or Path(root).resolve() == Path(run_root).resolve():
                break
        else:
            if self.config[self.verb].data.split is None:
                print(f"{root} is not the run's {run_root}: its split.csv is not used (--data.split would)")
        self.origin.require_own_weights(self.config[self.verb].model.weights)
        self.config[self.verb].ckpt_path = str(path)
        if self.verb == "fit":
            self.origin.require_more_to_do(self.config.fit.trainer.max_epochs)
        else:
            print(f"checkpoint: {path}", flush=True)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's model settings over the command line's."""

    def instantiate_classes(self) -> None:
        """Makes data, model and Trainer, and checks all of them before anything is written."""
        super().instantiate_classes()
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, saving.Last))  # it comes first
        if self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where there is no --trainer.precision for less
        self.datamodule.setup(self.verb)
        self.datamodule.require_enough_for(self.trainer.world_size, self.verb)
        if self.origin is not None:
            self.origin.require_same(self.model.name, self.datamodule.class_names, self.datamodule.root)
            if self.verb == "test":
                self.origin.require_place_for(callbacks.TestResults.FILES)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the callbacks that every run has; its loggers follow in `before_fit`."""
        trainer = self._get(self.config_init, "trainer")
        given = trainer["logger"]
        self.log = given is not False and self.verb == "fit"
        loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else []
        always: list[Callback] = [callbacks.Unreadable(), callbacks.EveryRow()]
        if self.verb == "fit":
            if 0 in (trainer["max_epochs"], trainer["max_steps"]):
                raise UserError("There is nothing to train: --trainer.max_epochs or --trainer.max_steps is 0.")
            if [trainer[limit] for limit in ("max_epochs", "max_steps", "max_time")] == [None, -1, None]:
                kwargs["max_epochs"] = self.config.fit.trainer.max_epochs = self.datamodule.epochs
            config = self.config_init["fit"]
            self.figures = board.Figures(self._flat_settings())
            self.last = saving.Last(self.writer, float(config["save_every"]))
            self.first_batch, pace = board.FirstBatch(), Pace()
            always += [callbacks.StepSeed(), callbacks.Narrator(), FrozenFeatures(), pace, Watcher(pace)]
            always += [self.first_batch, self.figures, self.last]
            if config["patience"] and trainer["limit_val_batches"] == 0:
                raise UserError("--patience needs validations; --trainer.limit_val_batches is 0.")
            always += [average.Average(float(config["average"]))] if config["average"] else []
            always += [EarlyStopping("val/loss", patience=int(config["patience"]))] if config["patience"] else []
        if trainer["benchmark"] is None and not trainer["deterministic"]:
            kwargs["benchmark"] = True  # all pictures are of one size: cuDNN's search pays
        if trainer["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if kwargs.get("enable_progress_bar", trainer["enable_progress_bar"]):
            always.append(TQDMProgressBar(refresh_rate=5))
        if self.verb == "fit" and trainer["enable_checkpointing"] is not False:
            always.append(saving.Best())
        plugins = trainer["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config = {**trainer, **kwargs, "logger": loggers or False, "plugins": [*plugins, self.writer]}
        try:
            return self._instantiate_trainer(config, always)
        except (TypeError, ValueError) as error:  # Lightning's way to refuse some of its options
            raise UserError(f"The Trainer refuses its options: {' '.join(str(error).split())}") from error

    def before_fit(self) -> None:
        """Makes the run's folder, or takes up that of the run that goes on, and points everything that writes at it."""
        if self.trainer.fast_dev_run:
            return
        if self.resumption is None:
            self.config.fit.model.backbone_lr = (
                self.model.backbone_lr
            )  # its default depends on where the weights are from
            self.recorded = self._options(self.config)
        settings = {key: value for key, value in self.recorded.items() if key not in ("name", "ckpt_path", "resume")}
        self.model.metadata = {"config": settings, "resize": self.datamodule.resize, **checkpoint.provenance()}
        self.run = run = self._folder()
        shown = self._log_into(run)
        listed = self.trainer.callbacks
        # the average, which takes the place of the weights at the end, comes after what saves these
        place = next((n for n, callback in enumerate(listed) if isinstance(callback, average.Average)), len(listed))
        listed[place:place] = [*shown, saving.End(self.last)]
        for saver in self.trainer.checkpoint_callbacks:
            saver.dirpath = saver.dirpath or str(run / "checkpoints")
        if self.config.fit.trainer.enable_checkpointing is not False:
            self.last.file = self.writer.last = run / "checkpoints" / LAST
        if self.trainer.is_global_zero:
            self._introduce()

    def _folder(self) -> Path:
        """The run's folder; on ranks other than the first, what they have been told of it, if they have."""
        if self.resumption is not None:
            run = self.resumption.run
            if _rank() == 0:
                os.environ[runs.VARIABLE] = str(run)
                for folder in (run, run / "checkpoints"):
                    files.sweep(folder, mine=folder.name == "checkpoints")
                self._write_config(run)
                runs.point_latest(run, runs.ROOT / "latest")
                runs.note(run, state="running", reason="", job=resuming.job())
            return run
        root = self.datamodule.root.resolve()
        own = root.stem if root.is_file() else root.name
        name = self.config.fit.name or own.translate({ord(","): "-", ord(":"): "-"})
        runs.require_name(name)
        if _rank() != 0:
            return Path(os.environ.get(runs.VARIABLE, runs.ROOT / name / "version_0"))

        def fill(folder: Path) -> None:
            self._write_config(folder)
            self.datamodule.manifest.write_split(folder / "split.csv")
            runs.note(folder, state="running", reason="", job=resuming.job())

        run, self.hold = runs.claim(name, fill)
        return run

    def _write_config(self, folder: Path) -> None:
        with files.replacing(folder / "config.yaml") as stream:
            stream.write("# python -m project.cli fit --config THIS_FILE\n")
            yaml.safe_dump(self.recorded, stream, sort_keys=False, allow_unicode=True)

    def _log_into(self, run: Path) -> list[Callback]:
        """TensorBoard's files and metrics.csv; those of a run that goes on end where it does.

        Returns:
            What writes into them.
        """
        if not self.log:
            return []
        after = None
        if self.resumption is not None:
            at = self.resumption.place
            if self.trainer.is_global_zero:
                logs.rewind(run, at.rows, at.step, at.time)
            after = at.step
            self.first_batch.done = at.total > 0
        shown = logs.Board(run, after)
        shown.log_hyperparams(self.figures.settings)
        self.trainer.loggers = [shown, logs.MetricsFile(run), *self.trainer.loggers]
        histograms: list[Callback] = [board.Histograms()] if self.config.fit.histograms else []
        return [LearningRateMonitor("step"), Answers(), Projector(run), *histograms]

    def fit(self, **kwargs: Any) -> None:
        """Trains."""
        allocator.keep_freed_memory()
        with self._accounted():
            try:
                self.trainer.fit(**kwargs, weights_only=True)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                frames = traceback.extract_tb(error.__traceback__)
                if self.last.begun or not any("checkpoint_connector" in frame.filename for frame in frames):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{self.config.fit.ckpt_path} cannot be gone on from: {reason}") from error
            self.writer.require_written()
            for logger in self.trainer.loggers:
                if trouble := getattr(logger, "trouble", ""):
                    raise FailedRun(f"What was logged last could not be written into {self.run}: {trouble}.")

    @contextlib.contextmanager
    def _accounted(self) -> Iterator[None]:
        """Notes in the run how its fit has ended, and lets go of it."""
        state, reason = "failed", ""
        try:
            yield
            state = "finished"
        except (KeyboardInterrupt, SystemExit, SIGTERMException):
            state = "stopped"
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise
        finally:
            told = os.environ.get(runs.VARIABLE)
            if self.run is not None and (_rank() == 0 or (state == "failed" and told == str(self.run))):
                with contextlib.suppress(OSError):  # a full disk
                    runs.note(
                        self.run,
                        state=state,
                        reason=reason,
                        step=self.trainer.global_step,
                        seconds=round(self.last.seconds, 1),
                        longest_save=round(self.writer.longest, 3),
                    )
            if self.hold is not None:
                self.hold.release()

    def validate(self, **kwargs: Any) -> None:
        """Measures on the validation pictures."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Measures on the test pictures; writes into the checkpoint's run."""
        assert self.origin is not None
        self.trainer.callbacks.append(callbacks.TestResults(self.origin.run, self.origin.path))
        self.trainer.test(**kwargs, weights_only=True)
        if self.config.test.report and self.trainer.is_global_zero:
            from project import report  # matplotlib: not for those who do without

            print(f"report: {report.write(self.origin.path)}", flush=True)

    def after_fit(self) -> None:
        """Says what came out, where it lies and what to do next."""
        if self.run is None or not self.trainer.is_global_zero:
            return
        early = [callback for callback in self.trainer.callbacks if isinstance(callback, EarlyStopping)]
        if early and early[0].stopped_epoch:
            print(f"stopped after epoch {early[0].stopped_epoch + 1}: no lower val/loss in {early[0].patience} epochs")
        if best := self.figures.best:
            values = "  ".join(f"{key} {value:.4f}" for key, value in best.items() if key != "epoch")
            print(f"best: epoch {best['epoch']}  {values}")
        size = sum(file.stat().st_size for file in self.run.rglob("*") if file.is_file())
        print(f"run: {self.run} ({size / 1e6:,.0f} MB)")
        if (self.run / "checkpoints" / "best.ckpt").exists():
            verbs = f"python -m project.cli test | python -m project.cli predict {self.run} PICTURES..."
            print(f"next: make board | {verbs}")

    def _flat_settings(self) -> dict[str, Any]:
        data = self.datamodule
        model = self.recorded["model"] if self.resumption else self.config.fit.model.as_dict()
        return {
            "seed_everything": self.config.fit.seed_everything,
            "max_epochs": self.config.fit.trainer.max_epochs,
            "batch_size": data.batch_size,
            "image_size": data.image_size,
            "resize": data.resize,
            "augment": data.augment,
            **{f"model/{key}": value for key, value in model.items() if value is not None},
        }

    def _introduce(self) -> None:
        data = self.datamodule
        print(data.manifest.summary())
        for notice in (*data.manifest.notices, data.kept(data.augment)[1]):
            if notice:
                print(notice)
        if (positive := positive_index(data.class_names, self.model.hparams["positive"])) is not None:
            print(f"positive class: {data.class_names[positive]} (--model.positive chooses the other)")
        millions = sum(p.numel() for p in self.model.network.parameters()) / 1e6
        device = self.trainer.strategy.root_device.type
        if self.model.weights_note and self.origin is None:
            print(self.model.weights_note)
        if self.model.transfer != "none" and not self.model.weights_note:
            print(f"--model.freeze {self.model.transfer} without --model.weights: the frozen layers know nothing yet")
        print(
            f"{self.model.name}, {millions:.1f} M parameters, {data.image_size} px, batches of {data.batch_size}, "
            f"on {self.trainer.world_size} x {device}: {self.run}",
            flush=True,
        )


def run(verb: str, argv: list[str], cli: type[Cli] = Cli) -> int:
    """Runs one of the Trainer's verbs.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: What the user gave cannot be used.
    """
    quieten()
    if _rank() == 0:
        for variable in (CHECKPOINT_VARIABLE, runs.VARIABLE):
            os.environ.pop(variable, None)
    try:
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
        if verb != "fit" or error.errno not in DISK_ERRORS:
            raise
        raise FailedRun(f"{error.strerror or error}: {error.filename or 'a log of the run'}. {_way_on()}") from error
    return 0


def quieten() -> None:
    """Leaves out what Lightning says that is no help here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)


def _stopped(verb: str, code: int) -> int:
    if _rank() != 0:
        return 0  # Lightning ends the first rank at once, whatever it does, when another one fails
    print(f"\nstopped. {_way_on()}" if verb == "fit" and _way_on() else "\nstopped")
    return code


def _way_on() -> str:
    run = Path(os.environ.get(runs.VARIABLE, ""))
    there = (run / "checkpoints" / LAST).exists()
    return f"Go on with: python -m project.cli fit --resume {run}" if there else ""


def _rank() -> int:
    rank: int = getattr(rank_zero_only, "rank", 0)  # Lightning reads it from the launcher's variables
    return rank
