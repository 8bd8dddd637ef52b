"""How a fit is stopped: Ctrl-C, SIGTERM or SLURM's signal, between two steps and on all ranks together."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

NONE, INTERRUPT, TERMINATE, REQUEUE = range(4)  # ordered: the highest request over all ranks wins


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restores all signal handlers at its end: an error within Lightning's clean-up, as a full disk, leaves a fit's."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set a handler
            for number, handler in handlers.items():
                if handler not in (None, signal.getsignal(number)):  # None: not installed from Python
                    signal.signal(number, handler)


def run_child(words: list[str]) -> int:
    """Runs a command of this project in a child process; returns its exit code, 128 + N where signal N has ended it.

    A signal to this process stops the child by SIGTERM: a terminal sends Ctrl-C to both, and a fit that gets SIGINT
    twice ends without a save. A second Ctrl-C kills the child.
    """
    with restored(), subprocess.Popen([sys.executable, "-m", "project.cli", *words]) as child:
        received = list[int]()

        def stop(number: int, _: FrameType | None) -> None:
            received.append(number)
            child.kill() if received.count(signal.SIGINT) > 1 else child.terminate()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        code = child.wait()
    return 128 + received[0] if received else 128 - code if code < 0 else code


class Signals:
    """Records the signals that stop a fit, instead of raising an exception in the middle of a step.

    An exception from a signal handler may be lost inside a library, and Lightning's handler of SIGTERM communicates
    with the other ranks whatever these are doing. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = NONE  # on this rank
        self._slurm: Any = None
        self._group: Any = None  # of all ranks, where there are several

    def listen(self, trainer: Trainer) -> None:
        """Installs the handlers; `restored` restores the previous ones."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
            return
        requests = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE}
        # the only way to the options that a user gave to --trainer.plugins SLURMEnvironment
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            requests[environment.requeue_signal] = REQUEUE
            self._slurm = signal.getsignal(environment.requeue_signal)  # Lightning's handler, which requeues the job

        def record(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.requested == INTERRUPT:
                os._exit(130)
            self.requested = max(self.requested, requests[signal.Signals(number)])

        for number in requests:
            signal.signal(number, record)

    def requeue(self) -> None:
        """Lets Lightning's SLURM handler save a checkpoint and requeue the job."""
        self._slurm(int(signal.SIGUSR1), None)

    def all_reduce_max(self, number: int) -> int:
        """The highest number of any rank, over the CPUs: no accelerator is waited for."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(numbers)
