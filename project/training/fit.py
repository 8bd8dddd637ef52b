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

from project import optim, parts, runs
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.errors import UserError, command, did_you_mean
from project.evaluation.scores import format_scores
from project.inference import metadata
from project.metrics import positive_index
from project.training.callbacks import ProgressLines, StepSeed
from project.training.checkpoint_io import BEST, LAST, PREVIOUS, AsyncCheckpointIO
from project.training.checkpointing import BestCheckpoint, ResumeCheckpoint
from project.training.diagnostics import Diagnostics
from project.training.ema import EMA
from project.training.frozen_features import FrozenFeatures
from project.training.resume import Run, rank
from project.training.tensorboard import Embeddings, FirstBatchImages, Histograms, HParams, ValidationPlots
from project.training.throughput import Throughput


def callbacks(
    options: Any, model: Classifier, run: Run, saver: ResumeCheckpoint, users: list[Callback]
) -> list[Callback]:
    """All callbacks of a fit, the user's own among them, in the order of their hooks."""
    throughput, folder, logs = Throughput(), run.checkpoints, options.trainer.logger is not False
    best: Any = dict(zip(("monitor", "mode"), model.watched, strict=True))
    _keep_apart(users, folder)
    return [
        saver,  # first: saves the state of the others between steps
        *users,
        HParams((model.run_metadata or {})["config"], **best),
        StepSeed(),
        ProgressLines(),
        FrozenFeatures(),
        *([FirstBatchImages()] if logs and not run.state.total else []),
        throughput,  # after the drawing, which is no waiting for images
        Diagnostics(throughput, options.monitor),
        *([LearningRateMonitor("step"), ValidationPlots(), Embeddings()] if logs else []),
        *([Histograms()] if logs and options.histograms else []),
        *([EMA(float(options.average))] if options.average else []),
        *([EarlyStopping(**best, patience=int(options.patience), strict=False)] if options.patience else []),
        *([BestCheckpoint(folder, **best)] if options.trainer.enable_checkpointing is not False else []),
    ]


def run_metadata(options: dict[str, Any], data: ImageData) -> dict[str, Any]:
    """What every checkpoint of a run says of it: its options, how images became square, and its provenance."""
    data.hparams.clear()  # which Lightning would save, too, with the run's own split.csv where it is resumed
    config = {name: value for name, value in options.items() if name not in ("name", "ckpt_path", "resume")}
    return {"config": config, "resize": data.resize, **metadata.provenance()}


def _keep_apart(users: list[Callback], folder: Path) -> None:
    """Renames the files of a user's ModelCheckpoint that would replace ours, as Lightning names a second file."""
    for own in (own for own in users if isinstance(own, ModelCheckpoint)):
        if own.dirpath is None or Path(own.dirpath).resolve() == folder.resolve():
            for name in ("filename", "CHECKPOINT_NAME_LAST"):
                if f"{getattr(own, name)}.ckpt" in (BEST, LAST, PREVIOUS):
                    setattr(own, name, f"{getattr(own, name)}-v1")


def watched(model: Classifier, monitor: str) -> tuple[str, str]:
    """The figure that decides, and which of its ends is the best, min or max; UserError where that is unknown."""
    figures: dict[str, Any] = {"val/loss": model.val_loss} | dict(model.val_metrics.items())
    _require_logged("--monitor is", monitor, [*figures], model, "val/")
    if monitor not in figures:  # of an edited Classifier
        return monitor, "min" if monitor.endswith(("loss", "error")) else "max"
    is_higher_better = figures[monitor].higher_is_better
    if is_higher_better is None:
        raise UserError(f"--monitor {monitor}: its metric has no higher_is_better; set it to True or False.")
    return monitor, "max" if is_higher_better else "min"


def require_usable(users: list[Callback], model: Classifier, options: Any) -> None:
    """Raises UserError where optimizer or schedule refuse their options, or a callback watches what is not logged."""
    made: Any = optim.configure(model.network, model.head, {**model.hparams, "watched": model.watched}, 1, fused=False)
    if "monitor" in made["lr_scheduler"] and options.trainer.limit_val_batches == 0:
        raise UserError("--model.scheduler plateau needs validations; --trainer.limit_val_batches is 0.")
    stops = (own.monitor for own in users if isinstance(own, EarlyStopping))
    if options.patience and options.monitor in stops:
        both = "--patience and the EarlyStopping of --trainer.callbacks both watch"
        raise UserError(f"{both} {options.monitor}; leave one out.")
    if not all(type(own).__module__.startswith("lightning.") for own in users):
        return  # one's own callback may log more
    known = ["train/loss", "train/loss_step", "train/accuracy", "val/loss", *map(str, model.val_metrics.keys())]
    for own in users:
        name = str(getattr(own, "monitor", None) or "epoch")
        if name not in ("epoch", "step") and not name.startswith("lr-"):  # of LearningRateMonitor
            _require_logged(f"{type(own).__name__} monitors", name, known, model)


def _require_logged(who: str, name: str, known: list[str], model: Classifier, prefix: str = "") -> None:
    """Raises UserError where a figure is not known, nor logged by a Classifier that is edited, or by its subclass."""
    modules = {kind.__module__ for kind in type(model).__mro__ if issubclass(kind, Classifier)}
    source = "".join(inspect.getsource(sys.modules[name]) for name in modules).replace("{split}/", "val/")
    if name not in known and not (name.startswith(prefix) and f'"{name}"' in source):
        raise UserError(f"{who} {name}, but a fit logs {', '.join(known)}.{did_you_mean(name, known)}")


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
            optimizer = parts.part(model.hparams["optimizer"])["class_path"].rpartition(".")[2]
            print(f"fine-tuning: {recipe.format(**{**model.hparams, 'optimizer': optimizer})}{epochs}")
    if model.transfer != "none" and not model.weights_note:
        print(f"--model.freeze {model.transfer} without --model.weights: the frozen layers are random")
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    size = f"{millions:.{1 if millions > 1 else 3}f} M parameters"
    print(
        f"{model.name}, {size}, {data.image_size} px ({data.resize}), batches of {data.batch_size}, "
        f"on {trainer.world_size} x {trainer.strategy.root_device.type}: {run.folder}",
        flush=True,
    )


def summarize(trainer: Any, run: Run) -> None:
    """Prints the result of a fit, where it lies and what to do next."""
    found = next((c.solution for c in trainer.callbacks if isinstance(c, FrozenFeatures)), None)
    model = trainer.lightning_module
    solved = None if model.solved or model.hparams["loss"] != "cross_entropy" else found
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.wait_count >= callback.patience:
            epoch, change = callback.stopped_epoch + 1, "lower" if callback.mode == "min" else "higher"
            print(f"stopped after epoch {epoch}: no {change} {callback.monitor} in {callback.patience} validations")
        if isinstance(callback, HParams) and callback.best:
            best = {callback.monitor: 0.0} | callback.best
            print(f"best: epoch {best.pop('epoch')}  {format_scores(best)}")
            if solved is not None and callback.monitor == "val/loss" and best["val/loss"] > solved.loss:
                print(f"the solved head alone had a lower val/loss, {solved.loss:.4f}: see configs/linear-probe.yaml")
    size = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    print(f"run: {run.folder} ({size / 1e6:,.1f} MB)")
    if (run.checkpoints / BEST).exists():
        base, is_checkout = shlex.quote(str(run.folder.parent.parent)), Path("scripts/board.sh").is_file()
        board = f"make board RUNS={base}".removesuffix(f" RUNS={runs.ROOT}")
        board = board if is_checkout else f"tensorboard --logdir {base}"
        trust = parts.trust_words([model.hparams[name] for name in ("network", "loss", "metrics")])
        trust_network = parts.trust_words(model.hparams["network"])
        own = [model.run_metadata["config"][name].get("class_path") for name in ("data", "model")]
        of_test = parts.trust_words([{"class_path": path} for path in own if path])
        test, predict = command("test", run.folder, *of_test, *trust), command("predict", *trust_network, run.folder)
        print(f"next: {board} | {test} | {predict} IMAGES...")


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
                if run.lock is not None:  # on the first rank, which removes its own
                    file.unlink()
        # Lightning kills the first rank when another one fails, which then records the reason
        elif rank() == 0 or (reason and os.environ.get(runs.VARIABLE) == str(run.folder)):
            end = {"state": state, "reason": reason, "step": trainer.global_step, "seconds": round(saver.seconds, 1)}
            with contextlib.suppress(OSError):  # a full disk
                runs.write_status(run.folder, **end)
        if run.lock is not None:
            run.lock.release()
