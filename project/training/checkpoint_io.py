"""How a checkpoint reaches the disk: copied in a moment, written in the background, put in place when complete."""

import copy
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from project import files
from project.errors import FailedRun

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
# What only a resumed fit needs. Lightning's save_weights_only would leave out the averaged weights as well.
TRAINING_STATE = frozenset(
    {"loops", "callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"}
    | {"MixedPrecision"}  # the scaler of --trainer.precision 16-mixed
)


class AsyncCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints in the background; a killed process or a full disk leaves the previous file.

    A checkpoint is copied in memory (AlexNet with Adam, 685 MB: some tenths of a second), written beside its target and
    renamed. best.ckpt stays in memory until last.ckpt is written, and holds weights and metadata only. The last.ckpt
    before the newest stays beside it as previous.ckpt. (Lightning's AsyncCheckpointIO is not atomic where the temporary
    folder is on another file system.)

    Args:
        folder: The run's checkpoints/, for best.ckpt and last.ckpt; other files may be anywhere.

    Attributes:
        longest: The longest time that a save has held up the fit, in seconds.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._best, self._last = folder / BEST, folder / LAST
        self._held: dict[str, Any] | None = None  # the newest best.ckpt, not yet written
        self._thread: threading.Thread | None = None
        self._failed: dict[Path, str] = {}
        self.longest = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns as soon as the weights may change; the file appears later."""
        start, target = time.monotonic(), Path(path)
        if target.resolve() == self._best.resolve():  # ModelCheckpoint makes paths absolute
            self._held = copied({key: value for key, value in checkpoint.items() if key not in TRAINING_STATE})
        else:
            self.wait()
            requeued = target.name.startswith("hpc_ckpt_")  # Lightning's name under SLURM
            self._write_in_background(self._last if requeued else target, copied(checkpoint))
            if requeued:  # the job is requeued next, and this process is killed
                self.wait()
        self.longest = max(self.longest, time.monotonic() - start)

    def _write_in_background(self, target: Path, content: dict[str, Any] | None) -> None:
        contents = {target: content}
        if target == self._last:  # best.ckpt first: the state in last.ckpt refers to it
            contents = {self._best: self._held} | contents
            self._held = None
        self._thread = threading.Thread(target=self._write, args=(contents,), name="checkpoint")
        self._thread.start()

    def _write(self, contents: dict[Path, dict[str, Any] | None]) -> None:
        for target, content in contents.items():
            if content is None:
                continue
            unfinished = files.beside(target)
            try:
                with unfinished.open("wb") as stream:
                    torch.save(content, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                if target == self._last and target.exists():
                    target.replace(target.with_name(PREVIOUS))
                unfinished.replace(target)
                files.folder_to_disk(target.parent)
                self._failed.pop(target, None)
            except (OSError, RuntimeError) as error:  # torch.save turns some OSErrors into RuntimeErrors
                self._fail(target, error)
            finally:
                unfinished.unlink(missing_ok=True)

    def _fail(self, target: Path, error: Exception) -> None:
        while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
            error = error.__context__
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
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
            self._write_in_background(self._last, None)
            self.wait()

    def finish(self) -> None:
        """Checks that everything is on the disk, and removes previous.ckpt, which a finished run does not need.

        Raises:
            FailedRun: A file could not be written.
        """
        self.teardown()
        if self._failed:
            target, reason = next(iter(self._failed.items()))
            raise FailedRun(
                f"{target} could not be written: {reason}. The checkpoints saved before are intact; make room, then: "
                f"python -m project.cli fit --resume {target.parent.parent}"
            )
        self._last.with_name(PREVIOUS).unlink(missing_ok=True)


def copied(content: Any) -> Any:
    """Copies nested dicts, lists and tuples with each tensor on the CPU; attributes such as `_metadata` are kept."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        new = copy.copy(content)
        for key, value in content.items():
            new[key] = copied(value)
        return new
    if type(content) in (list, tuple):
        return type(content)(map(copied, content))
    return content
