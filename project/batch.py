"""Batch: the output of the data and the input of the classifier."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from project.errors import UserError


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


def as_batch(batch: Any) -> Batch:
    """A `Batch` as it is; of another DataLoader, its images, or its images and labels."""
    if isinstance(batch, Batch):
        return batch
    image, label = (batch, None) if isinstance(batch, Tensor) else (*batch, None)[:2]
    if not isinstance(image, Tensor):
        kind = type(batch).__name__
        raise UserError(f"A batch is a {kind}; give (images, labels), (B, 3, H, W) uint8 and (B,) int64.")
    row = torch.arange(len(image))
    return Batch(image, torch.full_like(row, -1) if label is None else label.long(), row, [])
