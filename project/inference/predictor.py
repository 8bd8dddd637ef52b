"""Predictor: labels images, whatever computes the probabilities; torch is not needed here."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from project.data import images
from project.data.workers import usable_cores
from project.inference.metadata import Metadata
from project.inference.predictions import Prediction

READ_AHEAD = 2  # batches that are read while another is computed
ImageSource = str | os.PathLike[str] | bytes  # a file, or the bytes of one


class Batch(NamedTuple):
    """Images that are labelled together."""

    names: list[str]  # of all images
    pixels: images.Pixels  # (B, H, W, 3) uint8, RGB, of the B images that could be read
    failed: dict[int, str]  # why the others could not be read, by index into the names


class Predictor(ABC):
    """A trained classifier.

    Attributes:
        metadata: What is known of it: configuration, versions, git commit.
        class_names: K names.
        image_size: Side of the square images, in pixels.
        resize: How an image becomes square; see `images.read`.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.class_names, self.image_size, self.resize = metadata.class_names, metadata.image_size, metadata.resize

    @abstractmethod
    def probabilities(self, image: images.Pixels) -> npt.NDArray[np.float32]:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""

    def predict(
        self, inputs: Iterable[ImageSource], batch_size: int = 64, workers: int | None = None, tta: bool = False
    ) -> list[Prediction]:
        """Returns one `Prediction` per image, in the given order; an unreadable image has its `error` set.

        Args:
            inputs: Files, or the bytes of files.
            batch_size: Images at a time.
            workers: Threads that read images; by default one per core.
            tta: Test-time augmentation: average over each image and its mirror image, in twice the time.
        """
        return list(self.stream(inputs, batch_size, workers, tta))

    def stream(
        self, inputs: Iterable[ImageSource], batch_size: int = 64, workers: int | None = None, tta: bool = False
    ) -> Generator[Prediction, None, None]:
        """Like `predict`, one by one as they are ready; only a few batches are in memory at any time."""
        with closing(self.batches(inputs, batch_size, workers)) as batches:
            for batch in batches:
                rows: Iterator[list[float]] = iter(())
                if len(batch.pixels):
                    probabilities = self.probabilities(batch.pixels)
                    if tta:
                        mirrored = self.probabilities(np.ascontiguousarray(batch.pixels[:, :, ::-1]))
                        probabilities = np.mean([probabilities, mirrored], axis=0)
                    rows = iter(probabilities.tolist())
                for index, name in enumerate(batch.names):
                    if index in batch.failed:
                        yield Prediction(name, error=batch.failed[index])
                    else:
                        yield Prediction.of(name, next(rows), self.class_names)

    def batches(
        self, inputs: Iterable[ImageSource], batch_size: int = 64, workers: int | None = None
    ) -> Generator[Batch, None, None]:
        """Reads images in threads, which suffice: Pillow releases the GIL while it decodes and resizes."""
        pool = ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="reader")

        def submit() -> Iterator[tuple[list[str], list[Future[images.Pixels]]]]:
            remaining = iter(inputs)
            while sources := list(islice(remaining, batch_size)):
                names = ["<bytes>" if isinstance(source, bytes) else os.fspath(source) for source in sources]
                yield names, [pool.submit(images.read, s, self.image_size, self.resize) for s in sources]

        try:
            submitted = submit()
            waiting = deque(islice(submitted, READ_AHEAD))
            while waiting:
                names, futures = waiting.popleft()
                waiting.extend(islice(submitted, 1))
                pixels, failed = [], {}
                for index, future in enumerate(futures):
                    try:
                        pixels.append(future.result())
                    except images.ImageError as error:
                        failed[index] = error.reason
                empty = np.empty((0, self.image_size, self.image_size, 3), np.uint8)
                yield Batch(names, np.stack(pixels) if pixels else empty, failed)
        finally:
            pool.shutdown(cancel_futures=True)
