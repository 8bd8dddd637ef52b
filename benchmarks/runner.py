"""Contenders that take turns: each in a process of its own, which runs a round when it is asked to and then waits."""

import contextlib
import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from project.commands.bench import write_table
from project.training.trainer import quieten


class NoMoreRounds(Exception):
    """The comparison is over."""


class Stopwatch:
    """Times the rounds of a contender, in the contender's process; `result` is what the contender has computed."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._started = pipe, 0.0
        self.result: Any = None

    def next_round(self) -> None:
        """Ends a round, if one has started, and waits for the next; raises NoMoreRounds after the last."""
        if self._started:
            self._pipe.send(("seconds", time.perf_counter() - self._started))
        self._started = 0.0
        if not self._pipe.recv():
            raise NoMoreRounds

    def start(self) -> None:
        self._started = time.perf_counter()

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of a round; the first one starts the clock."""
        for number, batch in enumerate(loader):
            if number == 0:
                self.start()
            yield batch


class EpochRounds(Callback):
    """Makes each epoch of a Trainer a round, in the process of a contender."""

    stopwatch: Stopwatch

    def on_train_epoch_start(self, *_: Any) -> None:
        self.stopwatch.next_round()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.stopwatch.start()


def _run(run: Callable[..., None], arguments: tuple[Any, ...], pipe: Any) -> None:
    quieten()
    stopwatch = EpochRounds.stopwatch = Stopwatch(pipe)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run(*arguments, stopwatch)
        except NoMoreRounds:
            pipe.send(("result", stopwatch.result))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


def compare(contenders: dict[str, tuple[Any, ...]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs contenders in turn, round after round, after one round that warms up.

    Args:
        contenders: By name, a module-level function and its arguments, which a `Stopwatch` follows; it calls
            `next_round` before each round and `start` at its first batch, or trains with `EpochRounds`.
        rounds: Number of rounds that count.

    Returns:
        The median seconds and the `result` of each.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, (run, *arguments) in contenders.items():
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_run, args=(run, tuple(arguments), other)))
        processes[-1].start()
        other.close()

    def ask(name: str, is_round: bool) -> Any:
        pipes[name].send(is_round)
        kind, content = pipes[name].recv()
        if kind == "failed":
            raise RuntimeError(f"{name} has failed: {content}")
        return content

    try:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _, (name, times) in itertools.product(range(rounds + 1), seconds.items()):
            times.append(ask(name, True))
        results = {name: ask(name, False) for name in contenders}
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, results


@contextlib.contextmanager
def training_images(root: str | None, count: int) -> Iterator[list[tuple[str, str]]]:
    """Makes a temporary folder with images.csv the current one; yields paths and labels of its images."""
    source = Path(root).absolute() if root else None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield write_table(source, count)


def show(speed: dict[str, float], reference: str, title: str = "") -> dict[str, float]:
    """Prints a table of images a second; returns how many times faster `reference` is than each."""
    print(f"\n{title:46}    images/s   {reference} is")
    ratios = {name: speed[reference] / value for name, value in speed.items()}
    for name, value in speed.items():
        print(f"  {name:44}  {value:10,.1f}   {ratios[name]:6.2f} x")
    return ratios
