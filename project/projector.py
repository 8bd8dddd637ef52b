"""What the last layer is given for validation pictures, as points in TensorBoard's PROJECTOR tab."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from project import files
from project.answers import spread
from project.callbacks import data_of, gather

MOST = 500  # pictures
COMPONENTS = 50  # that their features are reduced to: the first principal ones
THUMBNAIL = 64  # pixels; 23 by 23 of them make a picture of 1,472, and the tab takes 8,192
POINTS, LABELS, THUMBNAILS, CONFIG = "projector.tsv", "projector_labels.tsv", "projector.png", "projector_config.pbtxt"


class Projector(Callback):
    """Writes points, thumbnails and labels of some validation pictures into the run when the fit ends.

    They are taken from the last validation while it runs, so that no picture goes through the network for them.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._found: list[tuple[Any, ...]] = []  # row, true, predicted, features of each batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to look at what reaches the last layer."""
        self._found = []
        model: Any = pl_module  # the Classifier
        self._chosen = torch.zeros(len(data_of(trainer).dataset("val")), dtype=torch.bool, device=pl_module.device)
        self._chosen[spread(len(self._chosen), MOST)] = True
        seen: list[Tensor] = []
        self._seen = seen
        self._handle = None if model.compiled else model.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps what is wanted of the batch."""
        if self._seen:
            chosen, features = self._chosen[batch.row], self._seen.pop().float()
            features = features.flatten(2).mean(dim=2) if features.ndim > 2 else features  # before a convolution
            self._found.append(
                (batch.row[chosen], batch.label[chosen], outputs.argmax(dim=1)[chosen], features[chosen])
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks no longer."""
        if self._handle is not None:
            self._handle.remove()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files, on the first rank; a full disk is no reason for a finished fit to fail."""
        found = [[part.cpu().numpy() for part in parts] for parts in self._found]
        found = [parts for rank in gather(trainer, found) for parts in rank]
        if not trainer.is_global_zero or not found:
            return
        rows, true, predicted, features = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        data = data_of(trainer)
        batch = data.dataset("val").__getitems__([(0, row) for row in sorted(rows.tolist())])
        place = {row: place for place, row in enumerate(rows.tolist())}
        order = [place[row] for row in batch.row.tolist()]  # without those that cannot be read by now
        if len(order) < 3 or not np.isfinite(features[order]).all():
            return
        points = principal(features[order], COMPONENTS)
        names = [" ".join(name.split()) for name in data.class_names]
        lines = ["true\tpredicted\tright"]
        for answer, label in zip(predicted[order], true[order], strict=True):
            lines.append(f"{names[label]}\t{names[answer]}\t{'yes' if answer == label else 'no'}")
        images = batch.image.permute(0, 2, 3, 1).numpy()
        try:
            self._write(points, lines, images)
        except OSError as error:
            print(f"{self.run}: {error.strerror}; TensorBoard's PROJECTOR tab will not show this run", flush=True)

    def _write(self, points: npt.NDArray[np.floating[Any]], lines: list[str], images: npt.NDArray[np.uint8]) -> None:
        side = min(THUMBNAIL, images.shape[1])
        table, png = io.StringIO(), io.BytesIO()
        np.savetxt(table, points, "%.5g", "\t")
        Image.fromarray(thumbnails(images, side)).save(png, "PNG", compress_level=1)  # in two thirds of the time
        config = (
            f'embeddings {{\n  tensor_name: "validation" tensor_path: "{POINTS}" metadata_path: "{LABELS}"\n'
            f'  sprite {{ image_path: "{THUMBNAILS}" single_image_dim: {side} single_image_dim: {side} }}\n}}\n'
        )
        texts = {POINTS: table.getvalue(), LABELS: "\n".join(lines) + "\n", CONFIG: config}
        contents = {name: text.encode("utf-8", "surrogateescape") for name, text in texts.items()}
        for name in (POINTS, LABELS, THUMBNAILS, CONFIG):  # the last one names the others
            # not brought to the disk at once: that would wait for last.ckpt, which is being written meanwhile
            unfinished = files.beside(self.run / name)
            try:
                unfinished.write_bytes(contents.get(name, png.getvalue()))
                unfinished.replace(self.run / name)
            finally:
                unfinished.unlink(missing_ok=True)


def principal(features: npt.NDArray[np.floating[Any]], components: int) -> npt.NDArray[np.floating[Any]]:
    """Features (N, F) along their first principal components (N, C), at most so many; distances stay, about."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)  # squares may be beyond float32
    values, vectors = np.linalg.eigh(centred @ centred.T)  # N is small, F may be thousands
    first = np.argsort(-values)[: min(components, features.shape[1])]
    reduced: npt.NDArray[np.floating[Any]] = vectors[:, first] * np.sqrt(np.maximum(values[first], 0))
    return reduced


def thumbnails(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Images (N, H, W, 3) as one, row by row in a square of small ones, which the tab cuts up again."""
    columns = math.ceil(math.sqrt(len(images)))
    sheet = np.zeros((columns * side, columns * side, 3), dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = small
    return sheet
