"""Pictures of requests that come at the same time are computed together."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from project.data.images import Pixels

THREADS = "batcher"  # how their names begin
Result = TypeVar("Result")


class Full(Exception):
    """As many pictures wait as may."""


class Waiting(NamedTuple):
    """What waits for its turn.

    Attributes:
        what: A picture's bytes, its pixels, or other work.
        answer: Whoever asked waits for it.
        since: Seconds, by the clock of the event loop.
    """

    what: Any
    answer: asyncio.Future[Any]
    since: float


class Batcher:
    """Reads pictures in threads and computes several at once, without asking for more cores than there are.

    Reading a picture takes one core, a batch its share of them all. A batch begins when it is full, or when all that
    has come is read; the pictures of the next one gather while it is computed. So batches grow with the load, reading
    and computing do not get into each other's way, and a client that is alone never waits.

    Args:
        read: From a picture's bytes to pixels (H, W, 3).
        compute: From pixels (B, H, W, 3) to probabilities (B, K).
        batch_size: Largest B.
        wait: Seconds that a picture waits for others to be read, at most.
        room: Pictures that may be here at once.
        cores: That are shared.
        lanes: Batches that are computed at once.
    """

    def __init__(
        self,
        read: Callable[[bytes], Pixels],
        compute: Callable[[Pixels], npt.NDArray[np.float32]],
        batch_size: int,
        wait: float,
        room: int,
        cores: int,
        lanes: int = 1,
    ) -> None:
        self._read, self._compute = read, compute
        self._batch_size, self._wait, self._room = batch_size, wait, room
        self._cores, self._lanes, self._share = cores, lanes, max(1, cores // lanes)
        self._free = cores
        self._threads = ThreadPoolExecutor(cores + lanes, thread_name_prefix=THREADS)
        self._here = self._reading = 0
        self._encoded: deque[Waiting] = deque()
        self._decoded: deque[Waiting] = deque()
        self._other: deque[Waiting] = deque()
        self._lanes_taken = 0
        self._begun: list[float] = []  # of all that is read or computed, since when
        self._alarm: asyncio.TimerHandle | None = None

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

    async def probabilities(self, picture: bytes) -> list[float]:
        """Reads a picture and computes its K probabilities.

        Raises:
            ImageError: It cannot be read.
        """
        row: list[float] = await self._answer(self._encoded, picture)
        return row

    async def alone(self, work: Callable[[], Result]) -> Result:
        """Runs other work of the network, in the place of a batch."""
        result: Result = await self._answer(self._other, work)
        return result

    def busy(self) -> float:
        """Seconds for which a picture has been read, or a batch computed, at most; 0 where there is nothing to do."""
        return asyncio.get_running_loop().time() - min(self._begun) if self._begun else 0.0

    def close(self) -> None:
        """Ends its threads, and waits for none that is at work; what waits is not computed any more."""
        for line in (self._encoded, self._decoded, self._other):
            line.clear()
        if self._alarm is not None:
            self._alarm.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, line: deque[Waiting], what: Any) -> Any:
        loop = asyncio.get_running_loop()
        line.append(Waiting(what, answer := loop.create_future(), loop.time()))
        self._go_on()
        return await answer

    def _go_on(self) -> None:
        """Begins whatever may begin now."""
        for line in (self._encoded, self._decoded, self._other):
            kept = [one for one in line if not one.answer.done()]  # the others' clients have gone
            line.clear()
            line.extend(kept)
        while self._other and self._lanes_taken < self._lanes and self._free >= self._share:
            self._compute_other(self._other.popleft())
        self._compute_what_is_gathered()
        while self._encoded and self._free > 0 and not (self._is_late() or self._is_enough()):
            self._decode(self._encoded.popleft())
        self._compute_what_is_gathered()
        if self._decoded and self._alarm is None and self._lanes_taken < self._lanes:
            self._alarm = asyncio.get_running_loop().call_at(self._decoded[0].since + self._wait, self._ring)

    def _compute_what_is_gathered(self) -> None:
        while self._decoded and self._lanes_taken < self._lanes and (self._is_late() or self._is_gathered()):
            # lanes that have nothing to do share what there is
            count = min(self._batch_size, -(-len(self._decoded) // (self._lanes - self._lanes_taken)))
            self._compute_batch([self._decoded.popleft() for _ in range(count)])

    def _ring(self) -> None:
        self._alarm = None
        self._go_on()

    def _is_late(self) -> bool:
        return bool(self._decoded) and asyncio.get_running_loop().time() >= self._decoded[0].since + self._wait

    def _is_enough(self) -> bool:
        return len(self._decoded) + self._reading >= max(self._batch_size, self._cores)

    def _is_gathered(self) -> bool:
        is_whole = len(self._decoded) >= self._batch_size or not (self._encoded or self._reading)
        return is_whole and self._free >= self._share

    def _decode(self, one: Waiting) -> None:
        def done(future: asyncio.Future[Pixels]) -> None:
            self._reading -= 1
            if error := future.exception():
                _tell(one, error)
            else:
                self._decoded.append(Waiting(future.result(), one.answer, asyncio.get_running_loop().time()))

        self._reading += 1
        self._run(1, partial(self._read, one.what), done)

    def _compute_batch(self, batch: Sequence[Waiting]) -> None:
        def done(future: asyncio.Future[list[list[float]]]) -> None:
            error = future.exception()  # whatever it is, it belongs to those who asked; the next batch may do
            for one, row in zip(batch, [error] * len(batch) if error else future.result(), strict=True):
                _tell(one, row)

        self._run_in_lane(partial(self._rows, [one.what for one in batch]), done)

    def _compute_other(self, one: Waiting) -> None:
        self._run_in_lane(one.what, lambda future: _tell(one, future.exception() or future.result()))

    def _rows(self, pixels: Sequence[Pixels]) -> list[list[float]]:
        rows: list[list[float]] = self._compute(np.stack(pixels)).tolist()
        assert len(rows) == len(pixels), f"{len(rows)} answers for {len(pixels)} pictures"
        return rows

    def _run_in_lane(self, work: Callable[[], Any], done: Callable[[asyncio.Future[Any]], None]) -> None:
        def left(future: asyncio.Future[Any]) -> None:
            self._lanes_taken -= 1
            done(future)

        self._lanes_taken += 1
        self._run(self._share, work, left)

    def _run(self, cores: int, work: Callable[[], Any], done: Callable[[asyncio.Future[Any]], None]) -> None:
        def ended(future: asyncio.Future[Any]) -> None:
            self._free += cores
            self._begun.remove(now)
            if not future.cancelled():  # by close
                done(future)
                self._go_on()

        loop = asyncio.get_running_loop()
        self._free -= cores
        self._begun.append(now := loop.time())
        loop.run_in_executor(self._threads, work).add_done_callback(ended)


def _tell(one: Waiting, result: Any) -> None:
    if one.answer.done():  # cancelled: its client has gone
        return
    if isinstance(result, BaseException):
        one.answer.set_exception(result)
    else:
        one.answer.set_result(result)
