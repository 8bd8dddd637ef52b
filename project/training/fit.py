"""What surrounds one fit: its loggers and callbacks, what it prints, and how its end is recorded."""

import contextlib
import inspect
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project import optim, runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import UserError, command
from project.evaluation.scores import format_scores
from project.metrics import positive_index
from project.training.callbacks import ProgressLines, RunMetadata, StepSeed, Unreadable
from project.training.checkpoint_io import BEST, LAST, PREVIOUS, AsyncCheckpointIO
from project.training.checkpointing import BestCheckpoint, ResumeCheckpoint
from project.training.diagnostics import Diagnostics
from project.training.ema import EMA
from project.training.frozen_features import FrozenFeatures
from project.training.resume import Run, rank
from project.training.tensorboard import Embeddings, FirstBatchImages, Histograms, HParams, ValidationPlots
from project.training.throughput import Throughput


def callbacks(
    options: Any, run: Run, metadata: dict[str, Any], saver: ResumeCheckpoint, users: list[Callback]
) -> list[Callback]:
    """All callbacks of a fit, the user's own among them, in the order of their hooks."""
    throughput, folder, logs = Throughput(), run.checkpoints, options.trainer.logger is not False
    _keep_apart(users, folder)
    return [
        saver,  # first: saves the state of the others between steps
        *users,
        RunMetadata(metadata),
        HParams(metadata["config"]["model"]),
        Unreadable(),
        StepSeed(),
        ProgressLines(),
        FrozenFeatures(),
        *([FirstBatchImages()] if logs and not run.state.total else []),
        throughput,  # after the drawing, which is no waiting for images
        Diagnostics(throughput),
        *([LearningRateMonitor("step"), ValidationPlots(), Embeddings()] if logs else []),
        *([Histograms()] if logs and options.histograms else []),
        *([EMA(float(options.average))] if options.average else []),
        *([EarlyStopping("val/loss", patience=int(options.patience), strict=False)] if options.patience else []),
        *([BestCheckpoint(folder)] if options.trainer.enable_checkpointing is not False else []),
    ]


def _keep_apart(users: list[Callback], folder: Path) -> None:
    """Renames the files of a user's ModelCheckpoint that would replace ours, as Lightning names a second file."""
    for own in (own for own in users if isinstance(own, ModelCheckpoint)):
        if own.dirpath is None or Path(own.dirpath).resolve() == folder.resolve():
            for name in ("filename", "CHECKPOINT_NAME_LAST"):
                if f"{getattr(own, name)}.ckpt" in (BEST, LAST, PREVIOUS):
                    setattr(own, name, f"{getattr(own, name)}-v1")


def require_usable(users: list[Callback], model: Classifier, options: Any) -> None:
    """Raises UserError where a callback of Lightning's monitors what is not logged, or does the same as --patience."""
    stops = (own.monitor for own in users if isinstance(own, EarlyStopping))
    if options.patience and "val/loss" in stops:
        raise UserError("--patience and the EarlyStopping of --trainer.callbacks both watch val/loss; leave one out.")
    if not all(type(own).__module__.startswith("lightning.") for own in users):
        return  # one's own callback may log more
    optimizer: Any = optim.configure(model.network, model.head, model.hparams, total_steps=1, fused=False)["optimizer"]
    rates = [f"lr-{type(optimizer).__name__}{'/' * ('name' in g)}{g.get('name', '')}" for g in optimizer.param_groups]
    known = ["train/loss", "train/loss_step", "train/accuracy", "val/loss", *map(str, model.val_metrics.keys())]
    known += rates if options.trainer.logger is not False else []  # by LearningRateMonitor
    source = inspect.getsource(sys.modules[Classifier.__module__]).replace("{split}/", "val/")  # where one may log more
    for own in users:
        name = str(getattr(own, "monitor", None) or "epoch")
        if name not in ("epoch", "step", *known) and f'"{name}"' not in source:
            raise UserError(f"{type(own).__name__} monitors {name}, but a fit logs {', '.join(known)}.")


def introduce(data: ImageData, model: Classifier, trainer: Any, run: Run) -> None:
    """Prints what is trained on which images, and where the run is."""
    print(data.manifest.summary())
    for notice in filter(None, (*data.manifest.notices, data.image_cache(data.augment)[1])):
        print(notice)
    if (positive := positive_index(data.class_names, model.hparams["positive"])) is not None:
        print(f"positive class: {data.class_names[positive]} (--model.positive chooses the other)")
    if model.weights_note and run.source is None:
        print(model.weights_note)
        if model.transfer != "backbone":
            recipe = "{optimizer}, lr {lr:g}, below the head {backbone_lr:g} of it, label smoothing {label_smoothing:g}"
            count = trainer.max_epochs or -1  # -1 where another limit ends the fit
            epochs = f", {count} epoch{'s' * (count > 1)}" if count > 0 else ""
            print(f"fine-tuning: {recipe.format(**model.hparams)}{epochs}")
    if model.transfer != "none" and not model.weights_note:
        print(f"--model.freeze {model.transfer} without --model.weights: the frozen layers are random")
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    print(
        f"{model.name}, {millions:.1f} M parameters, {data.image_size} px ({data.resize}), batches of "
        f"{data.batch_size}, on {trainer.world_size} x {trainer.strategy.root_device.type}: {run.folder}",
        flush=True,
    )


def summarize(trainer: Any, run: Run) -> None:
    """Prints the result of a fit, where it lies and what to do next."""
    found = next((c.solution for c in trainer.callbacks if isinstance(c, FrozenFeatures)), None)
    solved = None if trainer.lightning_module.solved else found
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            epoch, change = callback.stopped_epoch + 1, "lower" if callback.mode == "min" else "higher"
            print(f"stopped after epoch {epoch}: no {change} {callback.monitor} in {callback.patience} epochs")
        if isinstance(callback, HParams) and callback.best:
            best = dict(callback.best)
            start = f"best: epoch {best.pop('epoch')}  val/loss {best.pop('val/loss'):.4f}"
            print(f"{start}  {format_scores(best)}")
            if solved is not None and callback.best["val/loss"] > solved.loss:
                print(f"the solved head alone had a lower val/loss, {solved.loss:.4f}: see configs/linear-probe.yaml")
    size = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    print(f"run: {run.folder} ({size / 1e6:,.0f} MB)")
    if (run.checkpoints / BEST).exists():
        base, is_checkout = shlex.quote(str(run.folder.parent.parent)), Path("scripts/board.sh").is_file()
        board = f"make board RUNS={base}".removesuffix(f" RUNS={runs.ROOT}")
        board = board if is_checkout else f"tensorboard --logdir {base}"
        print(f"next: {board} | {command('test', run.folder)} | {command('predict', run.folder)} IMAGES...")


@contextlib.contextmanager
def recorded(run: Run, trainer: Any, saver: ResumeCheckpoint) -> Iterator[None]:
    """Checks that the end of a fit is on the disk, writes it into the run's status, and releases the run's lock."""
    state, reason, io, events = "failed", "", trainer.strategy.checkpoint_io, {*run.folder.glob("events.*")}
    try:
        yield
        if isinstance(io, AsyncCheckpointIO):
            io.finish()
        state = "finished"
    except (KeyboardInterrupt, SystemExit, SIGTERMException):
        state = "stopped"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise
    finally:
        if trainer.fast_dev_run or saver.restoring:  # nothing is recorded of a fit that has not begun
            run.discard()
            for file in {*run.folder.glob("events.*")} - events:  # Lightning opens it before it loads a checkpoint
                file.unlink()
        # Lightning kills the first rank when another one fails, which then records the reason
        elif rank() == 0 or (reason and os.environ.get(runs.VARIABLE) == str(run.folder)):
            end = {"state": state, "reason": reason, "step": trainer.global_step, "seconds": round(saver.seconds, 1)}
            with contextlib.suppress(OSError):  # a full disk
                runs.write_status(run.folder, **end)
        if run.lock is not None:
            run.lock.release()
