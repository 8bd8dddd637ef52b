"""How a fit is asked to stop: Ctrl-C, SIGTERM, SLURM's signal; it does so between two steps."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

NOT_ASKED, INTERRUPT, TERMINATE, REQUEUE = range(4)  # of all ranks' the highest counts


class Signals:
    """Notes the signals that end a fit, instead of raising wherever the program stands.

    Raised there, as Python does by default, the exception is now and then lost in a library; and Lightning's handler of
    SIGTERM talks to the other ranks from within, whatever they are about to do. A second Ctrl-C ends the process at
    once.

    Attributes:
        asked: What has been asked for here: NOT_ASKED, INTERRUPT, TERMINATE or REQUEUE.
    """

    def __init__(self) -> None:
        self.asked = NOT_ASKED
        self._slurm: Any = None

    def listen(self, trainer: Trainer) -> None:
        """From here on signals wait; Lightning puts every handler back at the end of the fit."""
        if threading.current_thread() is not threading.main_thread():  # no other may set a handler
            return
        environment = trainer._accelerator_connector.cluster_environment
        noted = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE}
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            noted[environment.requeue_signal] = REQUEUE
            self._slurm = signal.getsignal(environment.requeue_signal)  # Lightning's, which puts the job back

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.asked == INTERRUPT:
                os._exit(130)
            self.asked = max(self.asked, noted[signal.Signals(number)])

        for number in noted:
            signal.signal(number, note)

    def requeue(self) -> None:
        """Has Lightning's SLURM plugin save and put the job back into the queue."""
        self._slurm(int(signal.SIGUSR1), None)

    @staticmethod
    def end(asked: int) -> None:
        """Ends the fit; Lightning cleans up after these exceptions."""
        raise KeyboardInterrupt if asked == INTERRUPT else SIGTERMException


class Ranks:
    """Agreement of all ranks, by a message from processor to processor: no accelerator is waited for."""

    def __init__(self, trainer: Trainer) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def highest(self, number: int) -> int:
        """The highest number of any rank."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(numbers)
