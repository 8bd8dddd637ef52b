"""What surrounds one fit: its loggers and callbacks, what it prints, and how its end is recorded."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project import runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import UserError
from project.metrics import positive_index
from project.training.callbacks import ProgressLines, StepSeed, Unreadable
from project.training.checkpoint_io import BEST, AsyncCheckpointIO
from project.training.checkpointing import BestCheckpoint, ResumeCheckpoint
from project.training.diagnostics import Diagnostics
from project.training.ema import EMA
from project.training.frozen_features import FrozenFeatures
from project.training.loggers import MetricsFile, tensorboard_logger, truncate
from project.training.resume import Run, rank
from project.training.tensorboard import Embeddings, FirstBatchImages, Histograms, HParams, ValidationPlots
from project.training.throughput import Throughput


def require_possible(options: Mapping[str, Any], patience: int | None) -> None:
    """Raises UserError where the Trainer's options leave nothing to train, or --patience nothing to look at."""
    if 0 in (options["max_epochs"], options["max_steps"]):
        raise UserError("There is nothing to train: --trainer.max_epochs or --trainer.max_steps is 0.")
    if patience and options["limit_val_batches"] == 0:
        raise UserError("--patience needs validations; --trainer.limit_val_batches is 0.")


def loggers(run: Run | None) -> list[Logger]:
    """TensorBoard's files and metrics.csv; those of a resumed run end at the position of its checkpoint."""
    if run is None:
        return []
    if run.resumed and rank() == 0:
        truncate(run.folder, run.state.rows)
    # a validation comes next, and no fit has gone beyond: the training points of its step stay
    purge = run.state.step + run.state.validate if run.resumed else None
    return [tensorboard_logger(run.folder, purge), MetricsFile(run.folder)]


def settings(options: Any, data: ImageData, model: Mapping[str, Any]) -> dict[str, Any]:
    """What TensorBoard's HPARAMS tab compares, by name.

    Args:
        options: The options of `fit`.
        data: The images.
        model: The options of the model.
    """
    return {
        "seed_everything": options.seed_everything,
        "max_epochs": options.trainer.max_epochs,
        "batch_size": data.batch_size,
        "image_size": data.image_size,
        "resize": data.resize,
        "augment": data.augment,
        **{f"model/{key}": value for key, value in model.items() if value is not None},
    }


def callbacks(
    options: Any, shown: dict[str, Any], run: Run | None, io: AsyncCheckpointIO | None, users: list[Callback]
) -> list[Callback]:
    """All callbacks of a fit, in the order of their hooks.

    Args:
        options: The options of `fit`.
        shown: See `settings`.
        run: The run that the fit writes into; None with --trainer.fast_dev_run.
        io: Writes the checkpoints; None where none are saved.
        users: The callbacks of --trainer.callbacks.
    """
    throughput = Throughput()
    logs = run is not None and options.trainer.logger is not False
    has_begun = run is not None and run.state.total > 0
    folder = run.checkpoints if run else None
    return [
        ResumeCheckpoint(io, folder, float(options.save_every)),  # first: saves the state of the others between steps
        *users,
        Unreadable(),
        StepSeed(),
        ProgressLines(),
        FrozenFeatures(),
        throughput,
        Diagnostics(throughput),
        *([FirstBatchImages()] if logs and not has_begun else []),
        HParams(shown),
        *([LearningRateMonitor("step"), ValidationPlots(), Embeddings()] if logs else []),
        *([Histograms()] if logs and options.histograms else []),
        *([EMA(float(options.average))] if options.average else []),
        *([EarlyStopping("val/loss", patience=int(options.patience))] if options.patience else []),
        *([BestCheckpoint(folder)] if folder and io else []),
    ]


def introduce(data: ImageData, model: Classifier, trainer: Trainer, run: Run) -> None:
    """Prints what is trained on which images, and where the run is."""
    print(data.manifest.summary())
    for notice in (*data.manifest.notices, data.image_cache(data.augment)[1]):
        if notice:
            print(notice)
    if (positive := positive_index(data.class_names, model.hparams["positive"])) is not None:
        print(f"positive class: {data.class_names[positive]} (--model.positive chooses the other)")
    if model.weights_note and run.source is None:
        print(model.weights_note)
    if model.transfer != "none" and not model.weights_note:
        print(f"--model.freeze {model.transfer} without --model.weights: the frozen layers are random")
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    print(
        f"{model.name}, {millions:.1f} M parameters, {data.image_size} px, batches of {data.batch_size}, "
        f"on {trainer.world_size} x {trainer.strategy.root_device.type}: {run.folder}",
        flush=True,
    )


def summarize(trainer: Trainer, run: Run) -> None:
    """Prints the result of a fit, where it lies and what to do next."""
    listed: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in listed:
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            epoch, patience = callback.stopped_epoch + 1, callback.patience
            print(f"stopped after epoch {epoch}: no lower val/loss in {patience} epochs")
        if isinstance(callback, HParams) and callback.best:
            values = "  ".join(f"{key} {value:.4f}" for key, value in callback.best.items() if key != "epoch")
            print(f"best: epoch {callback.best['epoch']}  {values}")
    size = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    print(f"run: {run.folder} ({size / 1e6:,.0f} MB)")
    if (run.checkpoints / BEST).exists():
        verbs = f"python -m project.cli test | python -m project.cli predict {run.folder} IMAGES..."
        print(f"next: make board | {verbs}")


def require_written(trainer: Trainer) -> None:
    """Raises FailedRun where a checkpoint or the last rows of metrics.csv could not be written."""
    if isinstance(io := trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        io.finish()
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.require_written()


@contextlib.contextmanager
def recorded(run: Run | None, trainer: Trainer) -> Iterator[None]:
    """Writes the end of a fit into the run's status, and releases its lock."""
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
        if run is not None:
            if rank() == 0 or (state == "failed" and os.environ.get(runs.VARIABLE) == str(run.folder)):
                listed: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
                seconds = next(one.seconds for one in listed if isinstance(one, ResumeCheckpoint))
                entries = {"state": state, "reason": reason, "step": trainer.global_step, "seconds": round(seconds, 1)}
                if isinstance(io := trainer.strategy.checkpoint_io, AsyncCheckpointIO):
                    entries["longest_save"] = round(io.longest, 3)
                with contextlib.suppress(OSError):  # a full disk
                    runs.write_status(run.folder, **entries)
            if run.lock is not None:
                run.lock.release()
