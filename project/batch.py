"""Batch: the output of the data and the input of the classifier."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Images of one step, with their labels.

    Attributes:
        image: (B, 3, H, W) uint8, RGB; channels-last in memory, like the network.
        label: (B,) int64.
        row: (B,) int64, the index in the data set.
        failed: (row, reason) of the images that could not be read; they are not among the B.
    """

    image: Tensor
    label: Tensor
    row: Tensor
    failed: list[tuple[int, str]]
