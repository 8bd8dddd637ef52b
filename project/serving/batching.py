"""Images of requests that arrive at the same time are computed in one batch."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from project.data.images import Pixels
from project.serving.settings import Settings

Result = TypeVar("Result")


class Waiting(NamedTuple):
    """A decoded image (H, W, 3), its batch and index in it once that has started, and when it was decoded."""

    pixels: Pixels
    start: asyncio.Future[tuple[asyncio.Future[list[list[float]]], int]]
    since: float


class Batcher:
    """Decodes images in threads and computes several at once.

    A batch starts as soon as the network is free and the batch is full, nothing more is being decoded, or its first
    image has waited for `settings.batch_wait`. The images of the next batch gather meanwhile, so batches grow with the
    load, and a single client never waits. `read` maps an image's bytes to pixels (H, W, 3) uint8, and `compute` pixels
    (B, H, W, 3) to probabilities (B, K).
    """

    def __init__(
        self, read: Callable[[bytes], Pixels], compute: Callable[[Pixels], npt.NDArray[np.float32]], settings: Settings
    ) -> None:
        self._read, self._compute, self._settings = read, compute, settings
        self._decoders, self._computers = ThreadPoolExecutor(settings.threads), ThreadPoolExecutor(settings.parallel)
        self._decoding = self._computing = 0
        self._waiting: deque[Waiting] = deque()
        self._started: dict[Future[Any], float] = {}  # when unfinished work was handed to the threads

    async def probabilities(self, content: bytes) -> list[float]:
        """Decodes an image, or raises ImageError, and computes its K probabilities."""
        loop = asyncio.get_running_loop()
        self._decoding += 1
        try:
            pixels = await self._submit(self._decoders, self._read, content)
            image = Waiting(pixels, loop.create_future(), loop.time())
            self._waiting.append(image)
        finally:
            self._decoding -= 1
            self._start_batches()
        batch, index = await image.start
        return (await asyncio.shield(batch))[index]  # a request that times out must not cancel the others' batch

    def run(self, work: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        """Runs work of the network in a thread, in turn with the batches."""
        self._computing += 1
        future = self._submit(self._computers, work, *arguments)
        future.add_done_callback(self._release)
        return future

    def busy(self) -> float:
        """Seconds since the oldest unfinished work was handed to the threads; 0 where there is none."""
        now = asyncio.get_running_loop().time()
        return now - min([now, *self._started.values()])

    def _start_batches(self) -> None:
        """Starts the batches that are due, or a timer for the next one."""
        loop, size = asyncio.get_running_loop(), self._settings.batch_size
        self._waiting = deque(image for image in self._waiting if not image.start.done())  # timed out
        while self._waiting and (free := self._settings.parallel - self._computing) > 0:
            due = self._waiting[0].since + self._settings.batch_wait
            if len(self._waiting) < size and self._decoding and loop.time() < due:
                loop.call_at(due, self._start_batches)
                return
            count = min(size, -(-len(self._waiting) // free))  # the images are divided among the free networks
            batch = [self._waiting.popleft() for _ in range(count)]
            rows = self.run(lambda pixels: self._compute(np.stack(pixels)).tolist(), [image.pixels for image in batch])
            for index, image in enumerate(batch):
                image.start.set_result((rows, index))

    def _release(self, _: asyncio.Future[Any]) -> None:
        self._computing -= 1
        self._start_batches()

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        future = pool.submit(work, *arguments)
        self._started[future] = asyncio.get_running_loop().time()
        future.add_done_callback(self._started.pop)  # also where the request has timed out
        return asyncio.wrap_future(future)
