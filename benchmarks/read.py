"""How fast images become batches, beside the article's and torchvision's readers."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torchvision.transforms import v2

from benchmarks.baselines import batches, floats, resized
from benchmarks.runner import show, training_images
from project.commands.bench import BATCH, SIZE, loaders
from project.data import images
from project.data.workers import usable_cores
from project.inference.timing import side_by_side

REFERENCE, OURS = "torchvision's reference reader", "fit, from the cache"
Runs = dict[str, Callable[[], Any]]


def reading(root: str | None = None, count: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Reads the same images by each reader in turn: on one core and with workers.

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
    return figures


def _compare(title: str, runs: Runs, count: int, rounds: int, reference: str) -> dict[str, float]:
    """Images a second of runs that take turns."""
    seconds = side_by_side(*runs.values(), rounds=rounds, warm_up=1)
    speed = {name: count / taken for name, taken in zip(runs, seconds, strict=True)}
    show(speed, reference, title)
    return speed


def _decode(paths: Sequence[str]) -> None:
    for path in paths:
        with images.opened(path) as image:
            image.load()
