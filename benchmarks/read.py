"""How fast images become batches, beside the article's and torchvision's readers."""

import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torchvision.transforms import v2

from benchmarks.baselines import batches, floats, resized
from benchmarks.runner import show, training_images
from project.commands.bench import BATCH, SIZE, loaders
from project.data import images
from project.data.check import inspect_image
from project.data.workers import usable_cores
from project.export.verify import side_by_side

REFERENCE, OURS = "torchvision's reference reader", "fit, from the cache"
Runs = dict[str, Callable[[], Any]]


def reading(root: str | None = None, count: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Reads the same images by each reader in turn: on one core, with workers, and as `check` does.

    Args:
        root: The images, as fit takes them; by default generated ones of 475 x 404 pixels.
        count: Number of images.
        rounds: How often each is run.
    """
    cores, figures = usable_cores(), dict[str, Any]()
    torch.set_num_threads(1)
    with training_images(root, count) as table:
        paths, rows = [path for path, _ in table], [(path, 0) for path, _ in table]
        crops = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        reference = v2.Compose([*crops, *floats(normalised=True)])
        others = {"the article's reader": resized(SIZE, *floats(normalised=False)), REFERENCE: reference}
        for name, workers in {"one_core": 0, "workers": cores}.items():
            readers = {kind: batches(rows, transform, BATCH, workers) for kind, transform in others.items()}
            readers |= {f"fit, {kind}": loader for kind, loader in loaders(workers).items()}
            runs: Runs = {kind: partial(deque, loader, 0) for kind, loader in readers.items()}
            runs |= {} if workers else {"decoding alone (Pillow)": partial(_decode, paths)}
            figures[name] = _compare(f"{workers} workers", runs, len(paths), rounds, OURS)
        figures["gap_seconds"] = _gap(readers[OURS])
        print(f"from the last batch of an epoch to the first of the next: {figures['gap_seconds']:.3f} s\n")
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:  # as check's: without torch
            parts = [paths[start : start + 32] for start in range(0, len(paths), 32)] * 4
            decoding, checking = "decoding alone (Pillow), all cores", "check, all cores"
            runs = {decoding: lambda: deque(pool.map(_decode, parts), 0)}
            runs[checking] = lambda: deque(pool.map(inspect_image, 4 * paths, chunksize=32), 0)
            figures["check"] = _compare("dataset checks", runs, 4 * len(paths), rounds, checking)
    return figures


def _compare(title: str, runs: Runs, count: int, rounds: int, reference: str) -> dict[str, float]:
    """Images a second of runs that take turns."""
    seconds = side_by_side(*runs.values(), rounds=rounds, warm_up=1)
    speed = {name: count / taken for name, taken in zip(runs, seconds, strict=True)}
    show(speed, reference, title)
    return speed


def _gap(loader: Any) -> float:
    """Seconds from the start of an epoch to its first batch, the median of five."""
    gaps = []
    for _ in range(6):
        start, epoch = time.perf_counter(), iter(loader)
        next(epoch)
        gaps.append(time.perf_counter() - start)
        deque(epoch, 0)
    return statistics.median(gaps[1:])


def _decode(paths: Sequence[str]) -> None:
    for path in paths:
        with images.opened(path) as image:
            image.load()
