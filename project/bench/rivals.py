"""What this project is measured against: AlexNet trained as articles, templates and careful scripts do it."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy
from torchvision.transforms import v2

from project.bench.turns import Turn
from project.data.workers import usable_cores

Rows = list[tuple[str, int]]  # path and label


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pillow, Resize, flip, and what a way of working adds.

    Args:
        rows: Paths and labels.
        size: Side, in pixels.
        flip: Whether a picture may be mirrored.
        last: The last transforms.
    """

    def __init__(self, rows: Rows, size: int, flip: bool, last: list[nn.Module]) -> None:
        self.rows = rows
        mirror = [v2.RandomHorizontalFlip()] if flip else []
        self.transform = v2.Compose([v2.Resize((size, size)), *mirror, v2.PILToTensor(), *last])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.rows[row]
        with Path(path).open("rb") as stream:
            return self.transform(Image.open(stream).convert("RGB")), label


def floats(normalised: bool) -> list[nn.Module]:
    """To 0-1, and by ImageNet's mean and deviation, in the loader."""
    ends = [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))] if normalised else []
    return [v2.ToDtype(torch.float32, scale=True), *ends]


def article(rows: Rows, classes: int, size: int, batch_size: int, turn: Turn) -> None:
    """The article's loop: all pictures read into memory first, plain Adam, loss and accuracy read at every step."""
    pictures = list(Pictures(rows, size, True, floats(False)))  # type: ignore[call-overload]
    loader: Any = DataLoader(pictures, batch_size, shuffle=True)
    network = torchvision.models.AlexNet(classes)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    loss_of = nn.CrossEntropyLoss()
    while True:
        turn.begin()
        total, right = 0.0, 0
        for image, label in loader:
            optimizer.zero_grad()
            logits = network(image)
            loss = loss_of(logits, label)
            loss.backward()
            optimizer.step()
            total += loss.item()
            right += int((logits.argmax(1) == label).sum().item())
        turn.end()


def tuned(rows: Rows, classes: int, size: int, batch_size: int, turn: Turn) -> None:
    """Plain PyTorch with all that is known to help: fused Adam, channels_last, uint8 to the device, workers."""
    loader: Any = DataLoader(
        Pictures(rows, size, True, []), batch_size, shuffle=True, num_workers=usable_cores(), persistent_workers=True
    )
    network = torchvision.models.AlexNet(classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    while True:
        turn.begin()
        for image, label in loader:
            pixels = image.to(memory_format=torch.channels_last).float().sub_(127.5).div_(127.5)
            optimizer.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(network(pixels), label)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        turn.end()


class UsualModule(LightningModule):
    """A LightningModule as templates have it: torchvision's AlexNet, Adam at 1e-3, accuracy logged at every step.

    Args:
        classes: How many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = torchvision.models.AlexNet(classes)
        self.train_accuracy = Accuracy("multiclass", num_classes=classes)
        self.val_accuracy = Accuracy("multiclass", num_classes=classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Loss and accuracy of a batch."""
        image, label = batch
        logits = self.network(image)
        loss = nn.functional.cross_entropy(logits, label)
        self.train_accuracy(logits, label)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy of a batch."""
        image, label = batch
        self.val_accuracy(self.network(image), label)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with its default learning rate."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def usual_loader(rows: Rows, size: int, batch_size: int, train: bool, flip: bool) -> DataLoader[Any]:
    """Pictures as templates read them: floats, normalised in the workers."""
    return DataLoader(
        Pictures(rows, size, flip and train, floats(True)),
        batch_size,
        shuffle=train,
        num_workers=usable_cores(),
        persistent_workers=True,
    )
