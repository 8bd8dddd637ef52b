"""The bundled images: 1,797 handwritten digits (UCI, CC BY 4.0; digits.md), written out as an image folder."""

from pathlib import Path

import numpy as np
from PIL import Image

from project import files
from project.data import splits
from project.data.splits import Row
from project.errors import UserError

ROOT = Path("data/digits")
IMAGE_SIZE = 64  # the images are 8x8; AlexNet needs 63


def write(root: Path = ROOT) -> None:
    """Writes `root/train|val|test/<digit>/<number>.png` (70/10/20), whole or not at all, unless `root` exists."""
    if root.exists():
        return
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images, labels = stored["images"], stored["labels"]
    rows = [Row(f"{label}/{number:04d}.png", str(label)) for number, label in enumerate(labels)]
    try:
        with files.new_folder(root) as unfinished:
            for path, _, split, _ in splits.assign(rows, seed=0):
                file = unfinished / split / path
                file.parent.mkdir(parents=True, exist_ok=True)
                grey = images[int(Path(path).stem)].astype(np.uint16) * 255 // 16  # 0-16 to 0-255
                Image.fromarray(grey.astype(np.uint8)).save(file)
    except OSError as error:
        if not root.is_dir():  # unless another process was first
            raise UserError(f"Cannot write the digits into {root}: {error.strerror}; change folder.") from error
