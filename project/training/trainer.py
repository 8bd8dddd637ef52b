"""Lightning's Trainer as this project uses it: the verbs' own options, defaults, and messages that are left out."""

import ctypes
import errno
import logging
import sys
import threading
import warnings
from typing import Any

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from project.data.datamodule import STAGE_SPLITS, ImageData
from project.errors import UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h
SAVE_EVERY = PositiveFloat(5.0)  # minutes
TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # ImageData.setup has read a validation image; starts a second sooner
    "use_distributed_sampler": False,  # BatchSampler shares the rows out, without repeats
    "enable_model_summary": False,
}
HARMLESS = (
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*resuming from a checkpoint that ended before the epoch ended.*",  # the loader starts at the batch
    r'.*following callbacks: \["ModelCheckpoint[^"]*"\]\.',  # a plain Trainer's, which starts anew
    ".*The dirpath has changed from.*",
    r".*ModelCheckpoint\(monitor='val/.*'\)` could not find.*",  # BestCheckpoint says that there is no validation
    r'.*callbacks used to create the checkpoint.*\[("(BestC|EarlyS)[^"]*"(, )?)+\].*',  # with another --monitor
    ".*smaller than the logging interval.*",  # a small folder; every epoch is logged all the same
    ".*module.s. in eval mode at the start of training.*",  # frozen layers
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
)


class RunTrainer(Trainer):
    """Lightning's Trainer; LightningCLI reads the verbs' own options from these signatures."""

    def fit(
        self,
        *args: Any,
        name: str | None = None,
        average: OpenUnitInterval | None = None,
        resume: str | None = None,
        save_every: PositiveFloat = SAVE_EVERY,
        patience: PositiveInt | None = None,
        monitor: str = "val/loss",
        histograms: bool = False,
        seeds: PositiveInt | None = None,
        folds: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        """Trains the network.

        Args:
            name: Folder in runs/; by default the data folder's name, with the fold.
            average: Validate and save a moving average of the weights with this decay, e.g. 0.99.
            resume: Continue an unfinished run: its folder; no value for the newest; auto starts one if there is none.
            save_every: Minutes of training that a killed process may lose.
            patience: Stop after this number of validations without a better `monitor`.
            monitor: The figure of a validation that decides what best.ckpt holds, e.g. val/f1; see metrics.csv.
            histograms: Show in TensorBoard how the weights and gradients of each layer are distributed.
            seeds: Fit and test with this number of seeds, from seed_everything on, and print mean and deviation.
            folds: Cross-validate: fit and test each of this number of folds, and print mean and deviation.
        """
        super().fit(*args, **kwargs, weights_only=True)  # type: ignore[misc]

    def test(self, *args: Any, report: bool = True, **kwargs: Any) -> Any:
        """Measures the metrics on the test images and writes them into the checkpoint's run.

        Args:
            report: Write report.html into the run, too.
        """
        return super().test(*args, **kwargs, weights_only=True)  # type: ignore[misc]


def make(options: dict[str, Any]) -> RunTrainer:
    """Makes the Trainer; cuDNN searches, as all images have one size, and a terminal has a progress bar."""
    shows_progress = any(isinstance(callback, ProgressBar) for callback in options["callbacks"])
    if options["benchmark"] is None:
        options["benchmark"] = not options["deterministic"]
    if options["enable_progress_bar"] is None:
        options["enable_progress_bar"] = shows_progress or sys.stderr.isatty()
    if options["enable_progress_bar"] and not shows_progress:
        options["callbacks"].append(TQDMProgressBar(refresh_rate=5))
    try:
        return RunTrainer(**options)
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Lightning's Trainer does not accept these options: {reason}") from error


def require_batches(trainer: Any, data: ImageData, stage: str) -> None:
    """Raises UserError where a share of the batches, like --trainer.limit_val_batches 0.1, is less than one."""
    for split in STAGE_SPLITS[stage]:
        rows, option = len(data.dataset(split)), f"limit_{split}_batches"
        count = rows // data.batch_size if split == "train" else -(-rows // data.batch_size)
        share = getattr(trainer, option)
        if isinstance(share, float) and 0 < share * count < 1:
            option = "overfit_batches" if trainer.overfit_batches else option
            raise UserError(f"--trainer.{option} {share} is less than one of {count} {split} batches; give 1.")


def quieten() -> None:
    """Silences Lightning's messages that do not help here."""
    threading.excepthook = _leave_disk_errors_to_the_main_thread
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # --trainer.profiler prints its table
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, where it would give large blocks back to the system and fetch them anew.

    A step of AlexNet frees and allocates some 2 GB of activations and gradients, and the kernel clears every new page:
    keeping them makes a step 9 % faster on two cores. Other C libraries are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _leave_disk_errors_to_the_main_thread(arguments: threading.ExceptHookArgs) -> None:
    """Prints no traceback for a full disk in TensorBoard's writer: its next call raises in the main thread."""
    if getattr(arguments.exc_value, "errno", None) not in DISK_ERRORS:
        threading.__excepthook__(arguments)


def listed(value: Any) -> list[Any]:
    """An option that takes one object, a list of them, a bool or nothing, as the list of its objects."""
    return [one for one in (value if isinstance(value, list) else [value]) if one not in (None, True, False)]
