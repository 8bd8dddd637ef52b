"""Arrays become matplotlib figures; nothing here knows where they come from."""

import math
from collections.abc import Sequence

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
