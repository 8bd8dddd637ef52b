"""The DataLoader and its batch sampler: which rows make which batch is a function of seed, epoch and rank count."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from project.batch import Batch
from project.data import workers
from project.data.dataset import Features, ImageDataset, Key
from project.errors import FailedRun


class BatchSampler(Sampler[list[Key]]):
    """Splits the rows into global batches and each batch over the ranks.

    Every rank gets the same number of batches and every row is seen once, without the repeats that
    `DistributedSampler` adds to even out the ranks; a rank's share of the last batch may be empty.

    `shuffle` draws the order of an epoch from (seed, epoch), with replacement by `weights`, the relative frequencies
    (rows,). With `same`, every epoch is the first one again, in order and augmentation.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: npt.NDArray[np.float64] | None = None,
        same: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world_size, self.weights, self.same = rank, world_size, weights, same
        self.epoch, self._start = 0, (0, 0)

    def __len__(self) -> int:
        """Batches an epoch; when shuffling, an incomplete last batch is dropped."""
        return self.rows // self.batch_size if self.shuffle else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        (epoch, first), self._start = self._start, (0, 0)
        order = np.arange(self.rows)
        if self.shuffle:
            random = np.random.default_rng((self.seed, self.epoch))
            if self.weights is None:
                order = random.permutation(self.rows)
            else:
                order = random.choice(self.rows, self.rows, p=self.weights / self.weights.sum())
        for batch in range(first if epoch == self.epoch else 0, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, row) for row in rows[self.rank :: self.world_size].tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = 0 if self.same else epoch

    def start_from(self, epoch: int, batch: int) -> None:
        """Makes the next iteration start at a batch of an epoch; one of another epoch starts at its beginning."""
        self.set_epoch(epoch)  # workers draw batches before Lightning calls it
        self._start = (self.epoch, batch)

    @property
    def sampler(self) -> "BatchSampler":
        """Itself: Lightning looks for `set_epoch` on a batch sampler's `sampler`."""
        return self


class LostWorker(FailedRun):
    """Why a worker has ended, or images cannot be read; the fit can be resumed."""


class Loader:
    """The batches of a DataLoader; tells why a worker has ended.

    No DataLoader itself, because Lightning would give one another sampler, under DDP and to predict. Its workers live
    until Lightning, at the end of a fit, ends them through `_iterator`, as it does those of a DataLoader.
    """

    def __init__(self, dataset: Any, batch_sampler: BatchSampler, **options: Any) -> None:
        self.dataset, self.batch_sampler, self._options = dataset, batch_sampler, options
        self._iterator: Any = None
        self._workers: tuple[BaseProcess, ...] = ()

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self._iterator is None:
            self._batches = DataLoader(self.dataset, batch_sampler=self.batch_sampler, **self._options)
            self._workers = ()
        try:
            self._iterator = iter(self._batches)
            self._workers = self._workers or tuple(multiprocessing.active_children())
            yield from self._iterator
        except (EOFError, OSError, RuntimeError) as error:
            if self._batches.num_workers and (reason := workers.why_lost(error, self._workers)):
                raise LostWorker(reason) from error
            raise
        except FailedRun as error:  # a worker's has its traceback
            raise LostWorker(str(error).rstrip().rpartition(f"{FailedRun.__name__}: ")[2]) from error


def loader(
    dataset: ImageDataset | Features,
    sampler: BatchSampler,
    num_workers: int,
    ahead: int = workers.AHEAD,
    pin_memory: bool = False,
) -> Loader:
    """A loader whose workers live from epoch to epoch and leave Ctrl-C and SIGTERM to the main process.

    Where the system supports it they are forked from a small server process: a worker forked from the training process
    would keep its weights and optimiser state alive as they were at that moment, 0.7 GB for AlexNet.
    """
    if num_workers:
        workers.start_server()
    return Loader(
        dataset,
        sampler,
        num_workers=num_workers,
        collate_fn=_whole_batch,
        pin_memory=pin_memory,
        prefetch_factor=ahead if num_workers else None,
        persistent_workers=num_workers > 0,
        multiprocessing_context="forkserver" if num_workers and workers.HAS_SERVER else None,
        worker_init_fn=workers.prepare,
        generator=torch.Generator(),  # not the global one: what the network draws must not depend on the workers
    )


def _whole_batch(batch: Any) -> Any:
    """The batch that `__getitems__` has returned, from a worker in shared memory.

    The DataLoader would move it there in a thread whose errors are lost: with a full /dev/shm it would wait forever.
    """
    if get_worker_info() is not None:
        for tensor in batch[:-1]:
            tensor.share_memory_()
    return batch
