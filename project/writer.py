"""How a checkpoint reaches the disk: copied in a moment, written in the background, verified, then put in its place."""

import copy
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from project import files
from project.errors import FailedRun
from project.models.weights import is_whole

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints while the fit goes on; a killed process or a full disk leaves the one from before.

    Each is copied (AlexNet with Adam, 685 MB: 0.03 s into memory that is there already), written beside its target,
    brought to the disk, read back and only then put in the target's place; of last.ckpt the one before stays beside it
    as previous.ckpt. Lightning's own blocks meanwhile, keeps a second copy in memory and, where the temporary folder is
    another file system, is not atomic.

    Attributes:
        last: Where the run's last.ckpt lies.
        longest: The longest time that a save has held the fit up, in seconds.
        took: The time that the newest last.ckpt took in the background, in seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: Path | None = None
        self.longest = self.took = 0.0
        self._thread = _thread()
        self._lock = threading.Lock()
        self._contents: dict[Path, dict[str, Any]] = {}  # to be written
        self._tasks: dict[Path, Future[None]] = {}  # the newest for each file
        self._failed: dict[Path, str] = {}
        self._room = Room()

    def busy(self, target: Path) -> bool:
        """Whether a file is still being written."""
        return target in self._tasks and not self._tasks[target].done()

    def reserve(self, size: int) -> None:
        """Gets ready for checkpoints of so many bytes, in the background."""
        self._room.reserve(size)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns when the weights are safe to change; the file is in place some seconds later."""
        start, target = time.monotonic(), Path(path)
        requeued = target.name.startswith("hpc_ckpt_") and self.last is not None  # Lightning's name under SLURM
        if requeued:
            assert self.last is not None
            target = self.last
        content = self._room.copied(checkpoint)
        with self._lock:
            waits = target in self._contents
            self._contents[target] = content  # one that is still waiting is out of date
        if not waits:
            self._tasks[target] = self._thread.submit(self._write, target)
        if requeued:  # the job is put back into the queue next, and this process killed
            self.wait()
        self.longest = max(self.longest, time.monotonic() - start)

    def _write(self, target: Path) -> None:
        with self._lock:
            content = self._contents.pop(target)
        start, unfinished = time.monotonic(), files.beside(target)
        try:
            with unfinished.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if not is_whole(unfinished):
                raise OSError(None, "the disk does not give back what was written")
            if target.name == LAST and target.exists():
                _keep(target, target.with_name(PREVIOUS))
            unfinished.replace(target)
            files.folder_to_disk(target.parent)
            self._failed.pop(target, None)
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns some of the first into the second
            self._fail(target, error)
        finally:
            self._room.release(content)
            unfinished.unlink(missing_ok=True)
            if target == self.last:
                self.took = time.monotonic() - start

    def _fail(self, target: Path, error: Exception) -> None:
        while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
            error = error.__context__
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if target not in self._failed:
            stays = "the one from before stays" if target.exists() else "there is none yet"
            print(f"{target} cannot be written: {reason}; {stays}, and the fit goes on", flush=True)
        self._failed[target] = reason

    def remove_checkpoint(self, path: Any) -> None:
        """Waits until every checkpoint is in place: one that is removed must not come back."""
        self.wait()
        super().remove_checkpoint(path)

    def wait(self) -> None:
        """Waits until every checkpoint is in place, or has failed."""
        while self._tasks:
            self._tasks.pop(next(iter(self._tasks))).result()

    def teardown(self) -> None:
        """Waits, and gives the thread and the memory back."""
        self.wait()
        self._thread.shutdown()
        self._thread, self._room = _thread(), Room()

    def require_written(self) -> None:
        """Checks that every file holds the newest that was to be saved in it.

        Raises:
            FailedRun: One does not.
        """
        self.wait()
        if self._failed:
            target, reason = next(iter(self._failed.items()))
            raise FailedRun(
                f"{target} could not be written: {reason}. What was saved before is there; make room, then: "
                f"python -m project.cli fit --resume {target.parent.parent}"
            )


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # none is started before there is something to write


def _keep(file: Path, other: Path) -> None:
    """Gives a file a second name; at no instant is the first one gone."""
    unfinished = files.beside(other)
    try:
        unfinished.hardlink_to(file)
        unfinished.replace(other)
    except OSError:  # a file system without hard links
        file.replace(other)
    finally:
        unfinished.unlink(missing_ok=True)  # a rename does nothing where both names are of one file already


class Room:
    """Memory for one copy of a checkpoint, given by the system ahead of time: most of a copy's time goes into that."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._getting: threading.Thread | None = None
        self._used_by: int | None = None

    def reserve(self, size: int) -> None:
        """Takes so many bytes from the system, in the background."""
        if not size:
            return
        self._memory = mmap.mmap(-1, size)
        pages = torch.frombuffer(self._memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
        self._getting = threading.Thread(target=pages.zero_, daemon=True)
        self._getting.start()

    def copied(self, content: dict[str, Any]) -> dict[str, Any]:
        """The same content with copies of its tensors on the CPU; in this room, where it is free and large enough."""
        if self._getting is not None:
            self._getting.join()
            self._getting = None
        place, start = self._memory if self._used_by is None else None, 0

        def copied(tensor: Tensor) -> Tensor:
            nonlocal start
            size, begin = tensor.numel() * tensor.itemsize, -(-start // 64) * 64
            dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
            if place is None or not size or not dense or begin + size > len(place):
                return tensor.detach().to("cpu", copy=True)
            start = begin + size
            new = torch.frombuffer(place, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
            return new.as_strided(tensor.size(), tensor.stride()).copy_(tensor.detach())

        made: dict[str, Any] = mapped(content, copied)
        if start:
            self._used_by = id(made)
        return made

    def release(self, content: dict[str, Any]) -> None:
        """Says that a copy is not needed any more."""
        if self._used_by == id(content):
            self._used_by = None


def mapped(content: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Plain types with each tensor changed; all else, and attributes like a state dict's versions, as they are."""
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, dict):
        new = copy.copy(content)
        for key, value in content.items():
            new[key] = mapped(value, change)
        return new
    if type(content) in (list, tuple):
        return type(content)(mapped(value, change) for value in content)
    return content
