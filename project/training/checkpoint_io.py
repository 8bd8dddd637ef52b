"""How a checkpoint reaches the disk: copied in a moment, written in the background, put in place when complete."""

import contextlib
import copy
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

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

    A checkpoint is copied in memory (AlexNet with Adam, 685 MB: some tenths of a second), written beside its target and
    renamed. best.ckpt stays in memory until last.ckpt is written, and holds weights and metadata only. The last.ckpt
    before the newest stays beside it as previous.ckpt. They are in `folder`, the run's checkpoints/; other files may be
    anywhere. (Lightning's AsyncCheckpointIO is not atomic where the temporary folder is on another file system.)
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._best, self._last = folder / BEST, folder / LAST
        self._held: dict[str, Any] | None = None  # the newest best.ckpt, not yet written
        self._thread: threading.Thread | None = None
        self._failed: dict[Path, str] = {}
        self._at_rest = False

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    @contextlib.contextmanager
    def weights_at_rest(self) -> Iterator[None]:
        """Makes saves copy nothing and return when they are done; within this block the weights must not change."""
        self._at_rest = True
        try:
            yield
        finally:
            self._at_rest = False

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
        target = self._last if target.name.startswith("hpc_ckpt_") else target  # Lightning's name under SLURM
        contents = {target: on_cpu(checkpoint, copies=not self._at_rest)}
        if target == self._last and self._held is not None:  # best.ckpt first: the state in last.ckpt refers to it
            contents = {self._best: self._held} | contents
            self._held = None
        self._thread = threading.Thread(target=self._write, args=(contents,), name="checkpoint")
        self._thread.start()
        if self._at_rest:
            self.wait()

    def _write(self, contents: dict[Path, dict[str, Any]]) -> None:
        for target, content in contents.items():
            unfinished = files.beside(target)
            try:
                with contextlib.closing(DirectFile(unfinished)) as stream:
                    torch.save(content, cast(Any, stream))
                    stream.finish()
                if target == self._last and target.exists():
                    target.replace(target.with_name(PREVIOUS))
                unfinished.replace(target)
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


def on_cpu(content: Any, copies: bool = True) -> Any:
    """New nested dicts, lists and tuples with each tensor on the CPU, one that is there already as a copy if `copies`.

    Attributes such as `_metadata` are kept.
    """
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=copies)
    if isinstance(content, dict):
        new = copy.copy(content)
        for key, value in content.items():
            new[key] = on_cpu(value, copies)
        return new
    if type(content) in (list, tuple):
        return type(content)(on_cpu(value, copies) for value in content)
    return content


class DirectFile:
    """A new file written past the system's page cache, or through it where the file system cannot do otherwise.

    Filling that cache takes a checkpoint of 685 MB up to 1.8 s of processor time, past it 0.3 s (2 cores, ext4), and
    would drop the images that each epoch reads from it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.open("wb", buffering=0)
        self._buffer = memoryview(mmap.mmap(-1, 2048 * mmap.PAGESIZE))  # direct writes need aligned memory
        self._filled = self._size = 0
        if hasattr(os, "O_DIRECT"):
            import fcntl  # Linux only, as O_DIRECT

            with contextlib.suppress(OSError):
                fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_DIRECT)
                try:
                    self._file.write(self._buffer[: mmap.PAGESIZE])
                except OSError:
                    fcntl.fcntl(self._file, fcntl.F_SETFL, 0)
                self._file.seek(0)

    def write(self, content: memoryview) -> int:
        done = 0
        while done < len(content):
            part = content[done : done + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled, done = self._filled + len(part), done + len(part)
            if self._filled == len(self._buffer):
                self._write_pages()
        self._size += done
        return done

    def _write_pages(self) -> None:
        """Writes the buffer up to a whole page."""
        end, done = -(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE, 0
        while done < end:
            done += self._file.write(self._buffer[done:end]) or 0
        self._filled = 0

    def flush(self) -> None:
        """Nothing: `finish` writes what is left; torch.save calls this."""

    def finish(self) -> None:
        """Returns when the content is on the disk."""
        self._write_pages()
        self._file.truncate(self._size)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
