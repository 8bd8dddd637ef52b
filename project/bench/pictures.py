"""Pictures to measure with: made ones, and a data set that reads them as others do."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Rows = list[tuple[str, int]]  # path and label


def make_photographs(root: Path, count: int) -> Path:
    """Writes JPEGs with the detail of photographs: random shapes of all sizes and some noise, about 70 kB each."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((404, 475, 3))
        for octave in range(1, 7):
            coarse = random.normal(0, 1, (2**octave, 2**octave, 3))
            scaled = [
                Image.fromarray(c.astype(np.float32)).resize((475, 404), Image.Resampling.BICUBIC) for c in coarse.T
            ]
            pixels += np.dstack([np.asarray(channel) for channel in scaled]) * 60 / octave
        pixels = np.clip(pixels + 128 + random.normal(0, 8, pixels.shape), 0, 255)
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)
    return root


class Pictures:
    """What others do: a map-style data set that opens a picture by Pillow and transforms it.

    Args:
        rows: Paths and labels.
        transform: As torchvision has them.
    """

    def __init__(self, rows: Rows, transform: Any) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        path, label = self.rows[row]
        with open(path, "rb") as stream:  # noqa: PTH123 (as torchvision's own loader does)
            return self.transform(Image.open(stream).convert("RGB")), label


def resized(size: int, *last: Any, flip: bool = True) -> Any:
    """The article's transforms, Resize, flip and tensor, and what comes after them."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize((size, size)), *[v2.RandomHorizontalFlip()] * flip, v2.PILToTensor(), *last])


def floats(normalised: bool) -> list[Any]:
    """To 0-1, and by ImageNet's mean and deviation, in the loader."""
    import torch
    from torchvision.transforms import v2

    ends = [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))] if normalised else []
    return [v2.ToDtype(torch.float32, scale=True), *ends]
