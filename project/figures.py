"""Arrays become matplotlib figures; nothing here knows where they come from."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure


def image_grid(images: npt.NDArray[np.uint8], titles: Sequence[str], columns: int = 8) -> Figure:
    """Pictures in rows, each under its title.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        titles: N texts.
        columns: Pictures in a row.
    """
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(1.1 * columns, 1.35 * rows), layout="constrained")
    for place, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        axes.set_axis_off()
        if place < len(images):
            axes.imshow(images[place])
            axes.set_title(titles[place][:12], fontsize=11, parse_math=False)
    return figure


def rate_finder(
    rates: npt.NDArray[np.floating[Any]], losses: npt.NDArray[np.floating[Any]], chosen: float | None
) -> Figure:
    """Loss over the learning rate, and the one that was chosen.

    Args:
        rates: (N,)
        losses: (N,)
        chosen: None where none could be.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.set_xscale("log")
    finite = losses[np.isfinite(losses)]
    if len(finite):
        axes.set_ylim(0, 2 * finite[0])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    if chosen is not None:
        axes.axvline(chosen, color="tab:red", label=f"suggested: {chosen:.2g}")
        axes.legend()
    return figure
