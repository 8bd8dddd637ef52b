"""How long functions take, side by side."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def side_by_side(*runs: Callable[[], Any], rounds: int = 20, warm_up: int = 3) -> list[float]:
    """Returns the median seconds of each function over `rounds` in which they take turns, after some to warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(warm_up + rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[warm_up:]) for times in seconds]
