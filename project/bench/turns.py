"""Contestants that take turns: each a process of its own that runs one epoch when it is called, and waits."""

import contextlib
import io
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback


class Turn:
    """One contestant, as the comparison sees it.

    Args:
        run: A function of a module: runs epoch after epoch; calls `begin` of the `Course` it is given before each and
            `end` after it.
        arguments: What it is given before the `Course`.
    """

    def __init__(self, run: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_run, args=(run, arguments, other))
        self._process.start()
        other.close()

    def epoch(self) -> float:
        """Lets it run one epoch; returns the seconds from its first batch to its end.

        Raises:
            RuntimeError: It has failed.
        """
        self._pipe.send(True)
        return float(self._answer())

    def close(self) -> Any:
        """Ends it, and returns what it has left in `Course.result`."""
        self._pipe.send(False)
        result = self._answer()
        self._process.join()
        return result

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            kind, content = "failed", f"exit code {self._process.exitcode}"
        if kind == "failed":
            raise RuntimeError(f"A contestant has failed: {content}")
        return content


class Course:
    """The same, as the contestant sees it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._start = 0.0
        self.result: Any = None

    def begin(self) -> None:
        """Waits until it is this one's turn."""
        if not self._pipe.recv():
            raise Over

    def start(self) -> None:
        """Starts the clock: the first batch is there. A long epoch hardly notices that it waits for it."""
        self._start = time.perf_counter()

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of an epoch; the clock starts with the first."""
        for number, batch in enumerate(loader):
            if number == 0:
                self.start()
            yield batch

    def end(self) -> None:
        """Hands over."""
        self._pipe.send(("seconds", time.perf_counter() - self._start))


class Over(Exception):
    """No more turns."""


def _run(run: Callable[..., None], arguments: tuple[Any, ...], pipe: Any) -> None:
    from project.training import quieten

    quieten()
    course = Course(pipe)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run(*arguments, course)
        except Over:
            pipe.send(("result", course.result))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


class Begins(Callback):
    """Makes a Lightning Trainer wait for its turn; the first of its callbacks, so that the others count."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Waits."""
        self.course.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        if batch_idx == 0:
            self.course.start()


class Ends(Callback):
    """Makes it hand over; the last of its callbacks."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Hands over."""
        self.course.end()
