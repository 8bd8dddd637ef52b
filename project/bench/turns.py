"""Contestants that take turns: each a thread that trains one epoch when it is called, and waits."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback


class Turn:
    """One contestant.

    Args:
        run: Trains epoch after epoch; calls `begin` before each and `end` after it, until `begin` raises.
    """

    def __init__(self, run: Callable[["Turn"], None]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._failed: BaseException | None = None
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def _run(self, run: Callable[["Turn"], None]) -> None:
        try:
            run(self)
        except Over:
            pass
        except BaseException as error:
            self._failed = error
        self._done.release()

    def epoch(self) -> float:
        """Lets it train one epoch; returns the seconds that this took."""
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._failed is not None:
            raise self._failed
        return self._seconds

    def close(self) -> None:
        """Ends it."""
        self._over = True
        self._go.release()
        self._thread.join()

    def begin(self) -> None:
        """Waits until it is this one's turn."""
        self._go.acquire()
        if self._over:
            raise Over

    def start(self) -> None:
        """Starts the clock: the first batch is there. Long epochs hardly notice that they wait for it."""
        self._start = time.perf_counter()

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of an epoch; the clock starts with the first."""
        for number, batch in enumerate(loader):
            if number == 0:
                self.start()
            yield batch

    def end(self) -> None:
        """Hands over."""
        self._seconds = time.perf_counter() - self._start
        self._done.release()


class Over(Exception):
    """No more turns."""


class Begins(Callback):
    """Makes a Lightning Trainer wait for its turn; the first of its callbacks, so that the others count."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Waits."""
        self.turn.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        if batch_idx == 0:
            self.turn.start()


class Ends(Callback):
    """Makes it hand over; the last of its callbacks."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Hands over."""
        self.turn.end()
