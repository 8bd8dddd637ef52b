"""The baselines: AlexNet trained and used as articles, templates and careful scripts do it."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy
from torchvision.transforms import v2

from benchmarks.runner import EpochRounds, Stopwatch
from project.data.workers import usable_cores

Rows = Sequence[tuple[str, int]]  # path and label
QUIET: dict[str, Any] = dict.fromkeys(("enable_model_summary", "enable_checkpointing", "enable_progress_bar"), False)


class Images(Dataset[tuple[Any, int]]):
    """A map-style dataset as others write it: Pillow opens an image, torchvision transforms it."""

    def __init__(self, rows: Rows, transform: Any) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        path, label = self.rows[row]
        with open(path, "rb") as stream:  # noqa: PTH123 (as torchvision's own loader does)
            return self.transform(Image.open(stream).convert("RGB")), label


def resized(size: int, *last: Any, flip: bool = True) -> Any:
    """The article's transforms, Resize, flip and tensor, then `last`."""
    return v2.Compose([v2.Resize((size, size)), *[v2.RandomHorizontalFlip()] * flip, v2.PILToTensor(), *last])


def floats(normalised: bool) -> list[Any]:
    """To floats of 0 to 1, or normalised by ImageNet's mean and standard deviation."""
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return [v2.ToDtype(torch.float32, scale=True), *[normalise] * normalised]


def batches(rows: Rows, transform: Any, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """A loader whose workers stay from epoch to epoch."""
    images = Images(rows, transform)
    return DataLoader(images, batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)


def article(rows: Rows, classes: int, size: int, batch_size: int, stopwatch: Stopwatch) -> None:
    """The article's loop: all images read into memory first, plain Adam, loss and accuracy read at every step."""
    images = Images(rows, resized(size, *floats(normalised=False)))
    in_memory: Any = [images[row] for row in range(len(images))]
    loader: Any = DataLoader(in_memory, batch_size, shuffle=True)
    network = torchvision.models.AlexNet(classes)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    while True:
        stopwatch.next_round()
        total, right = 0.0, 0
        for image, label in stopwatch.batches(loader):
            optimizer.zero_grad()
            logits = network(image)
            loss: Any = nn.functional.cross_entropy(logits, label)
            loss.backward()
            optimizer.step()
            total += loss.item()
            right += int((logits.argmax(1) == label).sum().item())


def tuned(rows: Rows, classes: int, size: int, batch_size: int, stopwatch: Stopwatch) -> None:
    """Tuned plain PyTorch: fused Adam, channels_last, uint8 to the device, workers."""
    loader = batches(rows, resized(size), batch_size, usable_cores(), shuffle=True)
    network = torchvision.models.AlexNet(classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    while True:
        stopwatch.next_round()
        for image, label in stopwatch.batches(loader):
            pixels = image.to(memory_format=torch.channels_last).float().sub_(127.5).div_(127.5)
            optimizer.zero_grad()
            loss: Any = nn.functional.cross_entropy(network(pixels), label)
            loss.backward()
            optimizer.step()


class UsualModule(LightningModule):
    """A LightningModule as templates have it: torchvision's AlexNet, Adam at its default, accuracy at every step."""

    def __init__(self, classes: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.network = torchvision.models.AlexNet(classes)
        self.train_accuracy = Accuracy("multiclass", num_classes=classes)
        self.val_accuracy = Accuracy("multiclass", num_classes=classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        image, label = batch
        logits = self.network(image)
        loss = nn.functional.cross_entropy(logits, label)
        self.train_accuracy(logits, label)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        image, label = batch
        self.val_accuracy(self.network(image), label)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def usual(rows: Rows, classes: int, size: int, batch_size: int, _: Stopwatch) -> None:
    """A usual Lightning loop."""
    trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=[EpochRounds()], **QUIET)
    loader = batches(rows, resized(size, *floats(normalised=True)), batch_size, usable_cores(), shuffle=True)
    trainer.fit(UsualModule(classes), loader)


def one_by_one(paths: list[str], size: int, stopwatch: Stopwatch) -> None:
    """The usual script: each file is opened, transformed and predicted alone."""
    network, transform = reference(), resized(size, *floats(normalised=True), flip=False)
    while True:
        stopwatch.next_round()
        stopwatch.start()
        with torch.no_grad():
            images = (transform(Image.open(path).convert("RGB")) for path in paths)
            stopwatch.result = torch.cat([network(image[None]).softmax(dim=1) for image in images]).tolist()


def by_loader(paths: list[str], size: int, batch_size: int, workers: int, stopwatch: Stopwatch) -> None:
    """The same with a DataLoader's batches."""
    transform = resized(size, *floats(normalised=True), flip=False)
    loader = batches([(path, 0) for path in paths], transform, batch_size, workers)
    network = reference()
    while True:
        stopwatch.next_round()
        stopwatch.start()
        with torch.no_grad():
            stopwatch.result = torch.cat([network(image).softmax(dim=1) for image, _ in loader]).tolist()


def reference(classes: int = 1000) -> Any:
    """The AlexNet of torchvision, the same weights each time; large in the last layer, so that classes differ."""
    torch.manual_seed(0)
    network = torchvision.models.AlexNet(classes).eval()
    nn.init.normal_(network.classifier[-1].weight)
    return network
