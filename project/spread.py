"""Pictures shared out over processes or accelerators: Lightning's Trainer around a predictor's network."""

import contextlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from project import predictions
from project.bundle import is_bundle
from project.checkpoint import Network
from project.data.rows import Texts
from project.data.workers import usable_cores
from project.errors import FailedRun, UserError
from project.predictions import Prediction
from project.predictor import Batch, load

for name in ("lightning.pytorch", "lightning.fabric"):  # here, so that it holds in the processes that are started, too
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch


class Share(LightningModule):
    """What one process labels: of N processes, every Nth batch. It loads the checkpoint where it runs.

    Args:
        file: A checkpoint, a run's folder or a bundle.
        calibrated: As for `predictor.load`.
        paths: All pictures.
        batch_size: Pictures at a time.
        workers: Threads that read them.
        tta: As for `Predictor.predict`.
        folder: Where the predictions of each batch are written, under its number.
    """

    def __init__(
        self, file: str, calibrated: bool, paths: Texts, batch_size: int, workers: int, tta: bool, folder: Path
    ) -> None:
        super().__init__()
        self.file, self.calibrated, self.tta = file, calibrated, tta
        self.paths, self.batch_size, self.workers, self.folder = paths, batch_size, workers, folder

    def setup(self, stage: str) -> None:
        """Loads the predictor; a network of PyTorch is then brought to this process's device by Lightning."""
        self.predictor = load(self.file, self.calibrated, "cpu")
        self.network = self.predictor.network if isinstance(self.predictor, Network) else None

    def predict_dataloader(self) -> Iterator[Batch]:
        """The batches of this process."""
        size = self.batch_size
        starts = range(self.trainer.global_rank * size, len(self.paths), self.trainer.world_size * size)
        mine = (path for start in starts for path in self.paths[start : start + size])
        return self.predictor.batches(mine, size, self.workers)

    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        """Writes the predictions of a batch."""
        number = batch_idx * self.trainer.world_size + self.trainer.global_rank
        with _part(self.folder, number).open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            predictions.write_into(stream, self.predictor.answers(batch, self.tta), self.predictor.class_names)
        return len(batch.names)


def predict(
    file: str, paths: Texts, devices: int, calibrated: bool, tta: bool, batch_size: int, workers: int | None
) -> tuple[list[str], Generator[Prediction, None, None]]:
    """Labels pictures in several processes, which this one starts and waits for.

    Args:
        file: A checkpoint, a run's folder or a bundle.
        paths: The pictures.
        devices: Processes; each has an accelerator, where there are any and it is no bundle, which needs none.
        calibrated: As for `predictor.load`.
        tta: As for `Predictor.predict`.
        batch_size: Pictures at a time and process.
        workers: Threads of each that read; by default they share the cores.

    Returns:
        The class names, and the predictions in the order of the pictures.

    Raises:
        UserError: The checkpoint cannot be used, or there are fewer devices.
        FailedRun: A process has been killed.
    """
    names = load(file, calibrated, "cpu").class_names
    readers = workers or max(1, usable_cores() // devices)
    folder = tempfile.TemporaryDirectory(prefix="predict-")
    share = Share(file, calibrated, paths, batch_size, readers, tta, Path(folder.name))
    try:
        _run(share, devices)
    except BaseException:
        folder.cleanup()
        raise
    return names, _merged(folder)


def _run(share: Share, devices: int) -> None:
    launcher: Any = None
    try:
        trainer = Trainer(
            accelerator="cpu" if is_bundle(share.file) else "auto",
            devices=devices,
            strategy=DDPStrategy(start_method="spawn"),  # the processes get this module, not the command line
            plugins=[LightningEnvironment()],  # processes of this machine, in a job of SLURM's, too
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            callbacks=[TQDMProgressBar()] if sys.stderr.isatty() else [],
        )
        launcher = trainer.strategy.launcher
        trainer.predict(share, return_predictions=False)
    except MisconfigurationException as error:
        raise UserError(f"--devices {devices} are not to be had: {' '.join(str(error).split())}") from error
    except ProcessExitedException as error:
        raise FailedRun(f"One of the {devices} processes has ended: {error}.") from error
    except ProcessRaisedException as error:  # its text is the traceback
        reason = str(error).strip().splitlines()[-1]
        raise FailedRun(f"One of the {devices} processes has failed: {reason}") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has cleaned up
            raise KeyboardInterrupt from error
        raise
    finally:
        for process in getattr(launcher, "procs", []):
            with contextlib.suppress(ValueError):  # closed
                process.terminate()


def _merged(folder: "tempfile.TemporaryDirectory[str]") -> Generator[Prediction, None, None]:
    with folder:
        for number in count():
            part = _part(Path(folder.name), number)
            if not part.exists():
                return
            yield from predictions.read(part)
            part.unlink()


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number}.csv"
