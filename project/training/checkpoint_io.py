"""How a checkpoint reaches the disk: copied in a moment, written in the background, put in place when complete."""

import contextlib
import copy
import os
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from project import files
from project.errors import FailedRun, command

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
# What only a resumed fit needs. Lightning's save_weights_only would leave out the averaged weights as well.
TRAINING_STATE = frozenset(
    {"loops", "callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"}
    | {"MixedPrecision"}  # the scaler of --trainer.precision 16-mixed
)


class AsyncCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints in the background; a killed process or a full disk leaves the previous file.

    A checkpoint is copied in memory (AlexNet with Adam, 685 MB: some tenths of a second). best.ckpt stays there until
    last.ckpt is written, and holds weights and metadata only; the last.ckpt before stays as previous.ckpt. `folder` is
    the run's checkpoints/. (Lightning's AsyncCheckpointIO is not atomic across file systems.)
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._best, self._last = folder / BEST, folder / LAST
        self._held: dict[str, Any] | None = None  # the newest best.ckpt, not yet written
        self._thread: threading.Thread | None = None
        self._failed: dict[Path, str] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns as soon as the weights may change; the file appears later."""
        target = Path(path)
        if target.resolve() == self._best.resolve():  # ModelCheckpoint makes paths absolute
            self._held = None  # its memory is used again
            self._held = on_cpu({key: value for key, value in checkpoint.items() if key not in TRAINING_STATE})
            return
        with contextlib.suppress(OSError):  # which the thread reports
            target.parent.mkdir(parents=True, exist_ok=True)  # for ModelCheckpoint's links into it
        self.wait()
        is_requeued = target.name.startswith("hpc_ckpt_")  # Lightning's name under SLURM
        target = self._last if is_requeued else target
        contents = {target: on_cpu(checkpoint)}
        if target == self._last and self._held is not None:  # best.ckpt first: the state in last.ckpt refers to it
            contents = {self._best: self._held} | contents
            self._held = None
        self._thread = threading.Thread(target=self._write, args=(contents,), name="checkpoint")
        self._thread.start()
        if is_requeued:  # next Lightning has the job requeued
            self.wait()

    def _write(self, contents: dict[Path, dict[str, Any]]) -> None:
        for target, content in contents.items():
            try:
                with files.replacing(target, "wb") as stream:
                    torch.save(content, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                    if hasattr(os, "posix_fadvise"):  # else the file would displace images in the system's page cache
                        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if target == self._last and target.exists():
                        target.replace(target.with_name(PREVIOUS))
                self._failed.pop(target, None)
            except Exception as error:  # also where a callback's state cannot be pickled
                self._fail(target, error)

    def _fail(self, target: Path, error: Exception) -> None:
        while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
            error = error.__context__
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        if target not in self._failed:
            previous = "the previous file stays" if target.exists() else "there is no previous one"
            print(f"{target} cannot be written: {reason}; {previous}, and training continues", flush=True)
        self._failed[target] = reason

    def remove_checkpoint(self, path: Any) -> None:
        self.wait()  # a removed file must not appear afterwards
        super().remove_checkpoint(path)

    def wait(self) -> None:
        """Waits until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def teardown(self) -> None:
        """Writes what is still held in memory, and waits; Lightning calls it at the end of a fit, a failed one too."""
        self.wait()
        if self._held is not None:
            self._write({self._best: self._held})
            self._held = None

    def finish(self) -> None:
        """Waits, then removes previous.ckpt, which a finished run does not need; FailedRun if a file is not written."""
        self.teardown()
        if self._failed:
            target, reason = next(iter(self._failed.items()))
            raise FailedRun(
                f"{target} could not be written: {reason}. The checkpoints saved before are intact; make room, then: "
                f"{command('fit', '--resume', target.parent.parent)}"
            )
        self._last.with_name(PREVIOUS).unlink(missing_ok=True)


def on_cpu(content: Any) -> Any:
    """A copy of dicts (attributes are kept), lists, tuples and tensors, these on the CPU."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        new = copy.copy(content)
        for key, value in content.items():
            new[key] = on_cpu(value)
        return new
    if type(content) in (list, tuple):
        return type(content)(on_cpu(value) for value in content)
    return content
