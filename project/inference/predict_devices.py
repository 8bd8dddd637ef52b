"""predict --devices: processes that share the images, each with a predictor of its own; without Lightning."""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import cycle
from typing import Any

from project.data.workers import prepare, usable_cores
from project.errors import FailedRun, UserError
from project.inference.load import Source
from project.inference.metadata import Metadata
from project.inference.predictions import Prediction

TASK, AHEAD = 8, 2  # batches of a task, within which images are read ahead; tasks of a process at a time
_load = cache(Source.load)  # once in each process


def predict(
    source: Source,
    paths: Sequence[str],
    devices: int,
    calibrated: bool,
    tta: bool,
    batch_size: int,
    workers: int | None,
) -> tuple[Metadata, Generator[Prediction, None, None]]:
    """Labels images in several processes: one per accelerator, or, without one and for bundles, several on the CPU.

    Returns the classifier's metadata, and the predictions in the order of the images. UserError where the checkpoint
    cannot be used, or there are fewer devices; FailedRun where a process was killed.
    """
    metadata = source.load(calibrated, "cpu").metadata
    threads = max(1, usable_cores() // devices)
    options = {"batch_size": batch_size, "workers": workers or threads, "tta": tta}
    label = partial(_label, source, calibrated, threads, options)
    size = batch_size * max(1, min(TASK, len(paths) // (batch_size * devices)))  # images of a task
    tasks = (paths[start : start + size] for start in range(0, len(paths), size))
    return metadata, _stream(_device_names(source, devices), label, tasks)


def _stream(names: list[str], label: Any, tasks: Iterable[Sequence[str]]) -> Generator[Prediction, None, None]:
    waiting, others = deque[Future[list[Prediction]]](), multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, initializer=prepare, initargs=(0,)) for _ in names]
    try:
        for task, pool, name in zip(tasks, cycle(pools), cycle(names), strict=False):
            waiting.append(pool.submit(label, name, task))
            if len(waiting) == AHEAD * len(pools):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise FailedRun(
            f"One of the {len(pools)} processes has failed: it was killed, perhaps for lack of memory; give fewer "
            "--devices or a smaller --batch-size."
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()
        for pool in pools:
            pool.shutdown(cancel_futures=True)  # waits for its thread, which Python's exit would race with


def _device_names(source: Source, devices: int) -> list[str]:
    if not source.is_bundle:
        import torch  # a bundle does without

        if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
            if devices > (present := torch.accelerator.device_count()):
                raise UserError(f"--devices {devices} cannot be used: this machine has {present} x {accelerator.type}.")
            return [f"{accelerator.type}:{number}" for number in range(devices)]
    return ["cpu"] * devices


def _label(
    source: Source, calibrated: bool, threads: int, options: dict[str, Any], device: str, paths: list[str]
) -> list[Prediction]:
    return _load(source, calibrated, device, threads).predict(paths, **options)
