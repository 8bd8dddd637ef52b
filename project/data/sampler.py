"""Which rows make which batch: a function of seed, epoch and rank count, whatever the workers do."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, row: the epoch travels with the row, so that workers augment each epoch differently


class BatchSampler(Sampler[list[Key]]):
    """Cuts the rows into global batches and gives each rank its share of every one.

    Every rank sees the same number of batches and every row of them is seen once, without the repeats that
    `DistributedSampler` adds to even out the ranks; a share of the last batch may be empty.

    Args:
        rows: How many rows there are.
        batch_size: Rows in a global batch.
        shuffle: New order each epoch, drawn from (seed, epoch).
        seed: The run's seed.
        weights: (rows,) how often each row is drawn, relative to the others; then an epoch draws with replacement.
        rank: This process.
        world_size: How many processes share a batch.
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
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.weights = weights
        self.epoch = 0
        self._start = (0, 0)

    def __len__(self) -> int:
        """Batches an epoch: when shuffling, the rows left over after the last full batch wait for another epoch."""
        return self.rows // self.batch_size if self.shuffle else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        (epoch, first), self._start = self._start, (0, 0)
        order = self._order()
        for batch in range(first if epoch == self.epoch else 0, len(self)):
            places = np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, self.rows))
            places = places[self.rank :: self.world_size]
            yield [(self.epoch, int(row)) for row in (order[places] if order is not None else places)]

    def _order(self) -> npt.NDArray[np.int64] | None:
        if not self.shuffle:
            return None
        random = np.random.default_rng((self.seed, self.epoch))
        if self.weights is None:
            return random.permutation(self.rows)
        return random.choice(self.rows, self.rows, p=self.weights / self.weights.sum())

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def start_from(self, epoch: int, batch: int) -> None:
        """Makes the next iteration go on at a batch of an epoch: the two numbers are the place in the order.

        Workers draw batches before Lightning has set the epoch; an iteration of another epoch starts as always.
        """
        self.epoch, self._start = epoch, (epoch, batch)

    @property
    def sampler(self) -> "BatchSampler":
        """Itself: Lightning looks for `set_epoch` on a batch sampler's `sampler`."""
        return self
