"""What labels pictures, whatever computes the probabilities; torch is not needed here."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from project import runs
from project.data import images
from project.data.workers import usable_cores
from project.errors import UserError
from project.predictions import Prediction

AHEAD = 2  # batches that are read while another is computed
Picture = str | os.PathLike[str] | bytes  # a file, or the bytes of one


class Batch(NamedTuple):
    """Pictures that are labelled together.

    Attributes:
        names: Of all of them.
        pixels: (B, H, W, 3) uint8, RGB, of the B that could be read.
        failed: By place among the names, why the others could not.
    """

    names: list[str]
    pixels: images.Pixels
    failed: dict[int, str]


class Predictor(ABC):
    """A trained classifier, ready to be used.

    Attributes:
        class_names: K names.
        image_size: Side of the square images, in pixels.
        resize: How a picture becomes square; see `images.read`.
        metadata: Everything else that is known of it: configuration, figures, versions, git commit.
    """

    class_names: list[str]
    image_size: int
    resize: images.Resize
    metadata: dict[str, Any]

    @abstractmethod
    def probabilities(self, image: images.Pixels) -> npt.NDArray[np.float32]:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""

    def predict(
        self, pictures: Iterable[Picture], batch_size: int = 64, workers: int | None = None, tta: bool = False
    ) -> list[Prediction]:
        """One `Prediction` a picture, in the order given; an unreadable one has its `error` set.

        Args:
            pictures: Files, or the bytes of files.
            batch_size: Pictures at a time.
            workers: Threads that read them; by default as many as there are cores.
            tta: Test-time augmentation: the mean over each picture and its mirror image, in twice the time.
        """
        return list(self.stream(pictures, batch_size, workers, tta))

    def stream(
        self, pictures: Iterable[Picture], batch_size: int = 64, workers: int | None = None, tta: bool = False
    ) -> Generator[Prediction, None, None]:
        """As `predict`, one by one as they are ready; at no time more than a few batches are in memory."""
        with closing(self.batches(pictures, batch_size, workers)) as batches:
            for batch in batches:
                yield from self.answers(batch, tta)

    def answers(self, batch: Batch, tta: bool = False) -> Iterator[Prediction]:
        """One `Prediction` for each picture of a batch, in its order."""
        names, pixels, failed = batch
        rows = iter(self._rows(pixels, tta))
        for place, name in enumerate(names):
            if place in failed:
                yield Prediction(name, error=failed[place])
            else:
                yield Prediction.of(name, next(rows), self.class_names)

    def _rows(self, pixels: images.Pixels, tta: bool) -> list[list[float]]:
        if not len(pixels):
            return []
        probabilities = self.probabilities(pixels)
        if tta:
            probabilities = np.mean(
                [probabilities, self.probabilities(np.ascontiguousarray(pixels[:, :, ::-1]))], axis=0
            )
        rows: list[list[float]] = probabilities.tolist()
        return rows

    def batches(
        self, pictures: Iterable[Picture], batch_size: int = 64, workers: int | None = None
    ) -> Generator[Batch, None, None]:
        """Pictures as they are read.

        Threads are enough: Pillow lets others run while it decodes and resizes.
        """
        rest, waiting = iter(pictures), deque[tuple[list[str], list[Future[images.Pixels]]]]()
        pool = ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="reader")

        def read_ahead() -> None:
            if batch := list(islice(rest, batch_size)):
                names = ["<bytes>" if isinstance(picture, bytes) else os.fspath(picture) for picture in batch]
                waiting.append(
                    (names, [pool.submit(images.read, picture, self.image_size, self.resize) for picture in batch])
                )

        try:
            for _ in range(AHEAD):
                read_ahead()
            while waiting:
                names, read = waiting.popleft()
                read_ahead()
                pixels, failed = [], {}
                for place, future in enumerate(read):
                    try:
                        pixels.append(future.result())
                    except images.ImageError as error:
                        failed[place] = error.reason
                size = self.image_size
                stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
                yield Batch(names, stacked, failed)
        finally:
            pool.shutdown(cancel_futures=True)


def load(path: str | os.PathLike[str] | None = None, calibrated: bool = False, device: str | None = None) -> Predictor:
    """Loads a trained classifier.

    Args:
        path: A checkpoint, a run's folder or a bundle that `export` has made; None means the newest run's best.ckpt.
        calibrated: Divide the logits by the temperature that `report` has found, so that probabilities mean what they
            say. A bundle has it built in, if it was known.
        device: Where it computes; by default the accelerator, where there is one. A bundle computes on the CPU.

    Raises:
        UserError: There is no such thing, it cannot be used, or no temperature has been found for it.
    """
    from project import bundle

    if path is not None and bundle.is_bundle(path):
        if device not in (None, "cpu"):
            raise UserError(f"{path} is a bundle, which computes on the CPU, not on {device}; give its checkpoint.")
        made = bundle.Bundle(path)
        if calibrated:
            bundle.require_calibrated(Path(path), made.metadata)
        return made
    file = runs.find(path)
    if file.name in bundle.PARTS and bundle.is_bundle(file.parent):
        raise UserError(f"{file} is a part of a bundle; give the folder, {file.parent}.")
    try:
        from project import checkpoint  # torch: not before it is needed
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file} is a checkpoint, which needs {error.name}; install it, or give a bundle, which export makes of it "
            "where torch is."
        ) from error
    return checkpoint.load(file, calibrated, device)
