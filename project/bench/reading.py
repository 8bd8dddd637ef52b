"""How fast pictures become batches, beside the usual ways: python -m project.cli bench data."""

import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from project.bench.pictures import Pictures, floats, resized
from project.data import images, manifest
from project.data.check import examine_all
from project.data.table import Manifest
from project.data.workers import usable_cores
from project.errors import UserError

BATCH, SIZE = 64, 224


def measure(root: Path, count: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Runs all readers in turn, prints the table and returns it: pictures a second by reader."""
    import torch

    rows = manifest.load(root)
    base, paths = rows.root, list(itertools.islice(readable(rows), count))
    if not paths:
        raise UserError(f"None of the pictures in {root} can be read; python -m project.cli check {root} says why.")
    cores = usable_cores()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[], Iterator[int]]] = {
        "decoding alone (Pillow)": lambda: _decode(base, paths),
        "the article's reader": lambda: _loop(_usual(base, paths, "article", 0)),
        "torchvision's reference reader": lambda: _loop(_usual(base, paths, "reference", 0)),
        "ours, first epoch": lambda: _loop(_ours(base, paths, "flip", 0)),
        "ours, from the cache": lambda: _loop(_ours(base, paths, "flip", 0, scratch)),
        "ours, from the cache, crop": lambda: _loop(_ours(base, paths, "crop", 0, scratch)),
    }
    print(f"{root}: {len(paths):,} pictures, {SIZE} px, batches of {BATCH}, medians of {rounds} rounds\n")
    one_core = _compare("on one core", runs, len(paths), rounds)
    with_workers = {
        f"torchvision's reference reader, {cores} workers": _usual(base, paths, "reference", cores),
        f"ours, {cores} workers, first epoch": _ours(base, paths, "flip", cores),
        f"ours, {cores} workers, from the cache": _ours(base, paths, "flip", cores, scratch),
    }
    loaders: dict[str, Callable[[], Iterator[int]]] = {
        name: functools.partial(_loop, made) for name, made in with_workers.items()
    }
    many = _compare(f"with {cores} workers, which are there already", loaders, len(paths), rounds)
    gap = _gap(with_workers[f"ours, {cores} workers, from the cache"])
    print(f"from the last batch of an epoch to the first of the next: {gap:.3f} s\n")
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:  # as check's: without torch
        full = [[str(base / path) for path in paths[start : start + 32]] for start in range(0, len(paths), 32)] * 4
        pools: dict[str, Callable[[], Iterator[int]]] = {
            "decoding alone (Pillow), all cores": lambda: pool.map(_decode_all, full),
            "check, all cores": lambda: (len(part) for part, _ in pool.map(examine_all, full)),
        }
        checked = _compare("the doctor", pools, 4 * len(paths), rounds)
    torch.set_num_threads(threads)
    first, cached = one_core["ours, first epoch"], one_core["ours, from the cache"]
    print(
        f"One core reads {first:,.0f} pictures a second, {cached:,.0f} from the cache: leave --data.cache on; where "
        f"training is faster than {first * cores:,.0f} a second, its first epoch waits for the pictures."
    )
    return {"one_core": one_core, "workers": many, "gap_seconds": gap, "check": checked}


def _compare(title: str, runs: dict[str, Callable[[], Iterator[int]]], pictures: int, rounds: int) -> dict[str, float]:
    """Pictures a second of each, the median over the rounds; each round runs all of them, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in itertools.product(range(rounds + 1), runs):
        start = time.perf_counter()
        seen = sum(runs[name]())
        assert seen == pictures, (name, seen)
        if number:
            seconds[name].append(time.perf_counter() - start)
    speed = {name: pictures / statistics.median(times) for name, times in seconds.items()}
    beside = speed.get("torchvision's reference reader") or next(iter(speed.values()))
    print(f"{title:60}  pictures/s   ratio")
    for name, value in speed.items():
        print(f"  {name:58}  {value:10,.0f}  {value / beside:6.2f}")
    print()
    return speed


def _loop(loader: Any) -> Iterator[int]:
    for batch in loader:
        yield len(batch[0])


def _gap(loader: Any) -> float:
    """Seconds between two epochs, the median of five."""
    gaps = []
    for _ in range(6):
        start = time.perf_counter()
        epoch = iter(loader)
        next(epoch)
        gaps.append(time.perf_counter() - start)
        for _ in epoch:
            pass
    return statistics.median(gaps[1:])


def readable(rows: Manifest, mixed: bool = False) -> Iterator[str]:
    """The paths of those pictures that can be read, in order or in a fixed mixed one."""
    count = len(rows.paths)
    for row in np.random.default_rng(0).permutation(count).tolist() if mixed else range(count):
        path = rows.paths[row]
        try:
            images.read(rows.root / path, SIZE)
        except images.ImageError:
            continue
        yield path


def _decode(root: Path, paths: Sequence[str]) -> Iterator[int]:
    for path in paths:
        with images.opened(root / path) as image:
            image.load()
        yield 1


def _decode_all(paths: Sequence[str]) -> int:
    return sum(_decode(Path(), paths))


def _ours(root: Path, paths: Sequence[str], augment: Any, workers: int, cache: Path | None = None) -> Any:
    from project.data.cache import Cache
    from project.data.dataset import ImageDataset, loader, read_size
    from project.data.sampler import BatchSampler

    size = read_size(SIZE, augment)
    kept = Cache(cache / f"{size}.pixels", len(paths), size) if cache else None
    dataset = ImageDataset(root, paths, None, SIZE, augment=augment, kept=kept)
    return loader(dataset, BatchSampler(len(paths), BATCH, shuffle=False), workers)


def _usual(root: Path, paths: Sequence[str], kind: str, workers: int) -> Any:
    """`article`: Resize, flip, tensor. `reference`: what torchvision's training script does."""
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    reference = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor(), *floats(True)])
    transform = resized(SIZE, *floats(False)) if kind == "article" else reference
    rows = [(str(root / path), 0) for path in paths]
    return DataLoader(
        Pictures(rows, transform),  # type: ignore[arg-type]
        BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
