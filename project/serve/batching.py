"""Pictures of requests that come at the same time are computed together."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from project.data.images import Pixels
from project.data.workers import usable_cores

Result = TypeVar("Result")


class Full(Exception):
    """As many pictures wait as may."""


class Batcher:
    """Reads pictures in threads, as many as there are cores, and computes several at once in others.

    While a batch is computed the next one gathers. A batch that is not full waits only for pictures that are being read
    at that moment, so that a single client never waits.

    Args:
        read: From a picture's bytes to pixels (H, W, 3).
        compute: From pixels (B, H, W, 3) to probabilities (B, K).
        batch_size: Largest B.
        wait: Seconds that pictures wait for those that are being read, at most.
        room: Pictures that may be here at once.
        lanes: Batches that are computed at once.

    Attributes:
        has_ended: Nothing is computed any more.
    """

    has_ended = False

    def __init__(
        self,
        read: Callable[[bytes], Pixels],
        compute: Callable[[Pixels], npt.NDArray[np.float32]],
        batch_size: int,
        wait: float,
        room: int,
        lanes: int = 1,
    ) -> None:
        self._read, self._compute = read, compute
        self._batch_size, self._wait, self._room = batch_size, wait, room
        self._readers = ThreadPoolExecutor(usable_cores(), thread_name_prefix="reader")
        self._lanes, self._lane = lanes, ThreadPoolExecutor(lanes, thread_name_prefix="network")
        self._here = self._reading = 0
        self._ready: deque[tuple[Pixels, asyncio.Future[list[float]]]] = deque()
        self._news = asyncio.Event()

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Keeps places for so many pictures.

        Raises:
            Full: There are not as many.
        """
        if self._here + count > self._room:
            raise Full
        self._here += count
        try:
            yield
        finally:
            self._here -= count

    async def pixels(self, picture: bytes) -> Pixels:
        """Reads a picture.

        Raises:
            ImageError: It cannot be read.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, picture)

    async def probabilities(self, picture: bytes) -> list[float]:
        """Reads a picture and computes its K probabilities.

        Raises:
            ImageError: It cannot be read.
        """
        self._reading += 1
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        try:
            pixels = await self.pixels(picture)
            self._ready.append((pixels, answer))
        finally:
            self._reading -= 1
            self._news.set()
        return await answer

    async def alone(self, function: Callable[[], Result]) -> Result:
        """Runs other work of the network, in the place of a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._lane, function)

    async def run(self) -> None:
        """Computes batches until it is cancelled."""
        try:
            await asyncio.gather(*(self._work() for _ in range(self._lanes)))
        finally:
            self.has_ended = True

    async def _work(self) -> None:
        while True:
            batch = await self._next()
            pixels, answers = zip(*batch, strict=True)
            try:
                rows = await self.alone(partial(self._rows, pixels))
            except Exception as error:  # whatever it is, it belongs to those who asked; the next batch may do
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for answer, row in zip(answers, rows, strict=True):
                    if not answer.done():
                        answer.set_result(row)

    def _rows(self, pixels: Sequence[Pixels]) -> list[list[float]]:
        rows: list[list[float]] = self._compute(np.stack(pixels)).tolist()
        assert len(rows) == len(pixels), f"{len(rows)} answers for {len(pixels)} pictures"
        return rows

    async def _next(self) -> list[tuple[Pixels, asyncio.Future[list[float]]]]:
        deadline: float | None = None
        while True:
            self._ready = deque(one for one in self._ready if not one[1].done())  # the others' clients have gone
            is_late = deadline is not None and time.monotonic() >= deadline
            if self._ready and (len(self._ready) >= self._batch_size or not self._reading or is_late):
                return [self._ready.popleft() for _ in range(min(len(self._ready), self._batch_size))]
            if self._ready and deadline is None:
                deadline = time.monotonic() + self._wait
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), deadline and max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Ends its threads."""
        self._readers.shutdown(cancel_futures=True)
        self._lane.shutdown(cancel_futures=True)
