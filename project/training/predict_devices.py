"""predict --devices: Lightning's Trainer around one Predictor per process."""

import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessException

from project.data.strings import StringArray
from project.data.workers import usable_cores
from project.errors import FailedRun, UserError
from project.inference import predictions
from project.inference.checkpoint import TorchPredictor
from project.inference.load import Source
from project.inference.predictions import Prediction
from project.inference.predictor import Batch, Predictor
from project.training.trainer import quieten

quieten()  # at import, so that it holds in the spawned processes, too


class PredictModule(LightningModule):
    """Labels, in each of N processes, every Nth batch, and writes it into a CSV file with the batch's number."""

    def __init__(
        self, load: Callable[[], Predictor], paths: StringArray, batch_size: int, workers: int, tta: bool, folder: Path
    ) -> None:
        super().__init__()
        self.load, self.paths, self.folder = load, paths, folder
        self.batch_size, self.workers, self.tta = batch_size, workers, tta

    def setup(self, stage: str) -> None:
        self.predictor = self.load()
        if isinstance(self.predictor, TorchPredictor):
            self.network = self.predictor.network  # a submodule, which Lightning moves to the process's device

    def predict_dataloader(self) -> Iterator[Batch]:
        size = self.batch_size
        starts = range(self.trainer.global_rank * size, len(self.paths), self.trainer.world_size * size)
        own = (path for start in starts for path in self.paths[start : start + size])
        return self.predictor.batches(own, size, self.workers)

    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        part = self.folder / f"{batch_idx * self.trainer.world_size + self.trainer.global_rank}.csv"
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = self.predictor.predict_batch(batch, self.tta)
            predictions.write_into(stream, rows, self.predictor.class_names)
        return len(batch.names)  # Lightning warns of None


def predict(
    source: Source, paths: StringArray, devices: int, calibrated: bool, tta: bool, batch_size: int, workers: int | None
) -> tuple[list[str], Generator[Prediction, None, None]]:
    """Labels images in several processes: one per accelerator, or, without one and for bundles, several on the CPU.

    Returns:
        The class names, and the predictions in the order of the images.

    Raises:
        UserError: The checkpoint cannot be used, or there are fewer devices.
        FailedRun: A process failed or was killed.
    """
    load = partial(source.load, calibrated, "cpu")
    class_names = load().class_names
    folder, readers = tempfile.TemporaryDirectory(prefix="predict-"), workers or max(1, usable_cores() // devices)
    try:
        trainer = Trainer(
            accelerator="cpu" if source.is_bundle else "auto",
            devices=devices,
            strategy=DDPStrategy(start_method="spawn"),  # the processes get the module, not the command line
            plugins=[LightningEnvironment()],  # processes of this machine, in a SLURM job, too
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            callbacks=[TQDMProgressBar()] if sys.stderr.isatty() else [],
        )
        module = PredictModule(load, paths, batch_size, readers, tta, Path(folder.name))
        trainer.predict(module, return_predictions=False)
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        folder.cleanup()
        if isinstance(error, SystemExit):  # raised by Lightning on Ctrl-C
            raise KeyboardInterrupt from error
        if isinstance(error, MisconfigurationException):
            raise UserError(f"--devices {devices} cannot be used: {' '.join(str(error).split())}") from error
        if isinstance(error, ProcessException):  # its text may be a traceback
            reason = str(error).strip().splitlines()[-1]
            raise FailedRun(f"One of the {devices} processes has failed: {reason}") from error
        raise
    return class_names, _merge(folder, math.ceil(len(paths) / batch_size))


def _merge(folder: "tempfile.TemporaryDirectory[str]", parts: int) -> Generator[Prediction, None, None]:
    with folder:
        for number in range(parts):
            yield from predictions.read(Path(folder.name, f"{number}.csv"))
