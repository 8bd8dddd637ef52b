"""What this project is measured against: AlexNet trained and used as articles, templates and careful scripts do it."""

from typing import Any, cast

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy

from project.bench.pictures import Pictures, Rows, floats, resized
from project.bench.turns import Begins, Course, Ends
from project.data.workers import usable_cores


def article(rows: Rows, classes: int, size: int, batch_size: int, course: Course) -> None:
    """The article's loop: all pictures read into memory first, plain Adam, loss and accuracy read at every step."""
    held = Pictures(rows, resized(size, *floats(False)))
    loader: Any = DataLoader(_typed([held[row] for row in range(len(held))]), batch_size, shuffle=True)
    network = torchvision.models.AlexNet(classes)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    loss_of = nn.CrossEntropyLoss()
    while True:
        course.begin()
        total, right = 0.0, 0
        for image, label in course.batches(loader):
            optimizer.zero_grad()
            logits = network(image)
            loss = loss_of(logits, label)
            loss.backward()
            optimizer.step()
            total += loss.item()
            right += int((logits.argmax(1) == label).sum().item())
        course.end()


def tuned(rows: Rows, classes: int, size: int, batch_size: int, course: Course) -> None:
    """Plain PyTorch with all that is known to help: fused Adam, channels_last, uint8 to the device, workers."""
    loader: Any = DataLoader(
        _typed(Pictures(rows, resized(size))),
        batch_size,
        shuffle=True,
        num_workers=usable_cores(),
        persistent_workers=True,
    )
    network = torchvision.models.AlexNet(classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    while True:
        course.begin()
        for image, label in course.batches(loader):
            pixels = image.to(memory_format=torch.channels_last).float().sub_(127.5).div_(127.5)
            optimizer.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(network(pixels), label)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        course.end()


class UsualModule(LightningModule):
    """A LightningModule as templates have it: torchvision's AlexNet, Adam at 1e-3, accuracy logged at every step.

    Args:
        classes: How many.
        lr: Adam's learning rate; the default is PyTorch's, which templates leave as it is.
    """

    def __init__(self, classes: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
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
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def usual(rows: Rows, classes: int, size: int, batch_size: int, course: Course) -> None:
    """A usual Lightning loop."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Begins(course), Ends(course)],
    )
    trainer.fit(UsualModule(classes), usual_loader(rows, size, batch_size, train=True, flip=True))


def usual_loader(rows: Rows, size: int, batch_size: int, train: bool, flip: bool) -> DataLoader[Any]:
    """Pictures as templates read them: floats, normalised in the workers."""
    return DataLoader(
        _typed(Pictures(rows, resized(size, *floats(True), flip=flip and train))),
        batch_size,
        shuffle=train,
        num_workers=usable_cores(),
        persistent_workers=True,
    )


def one_by_one(paths: list[str], size: int, course: Course) -> None:
    """The loop that people write to label files: each is opened, transformed, and goes through the network alone."""
    network, transform = reference(), resized(size, *floats(True), flip=False)
    while True:
        course.begin()
        course.start()
        found = []
        with torch.no_grad():
            for path in paths:
                image = transform(Image.open(path).convert("RGB"))
                found.append(network(image[None]).softmax(dim=1)[0])
        course.result = torch.stack(found).tolist()
        course.end()


def by_loader(paths: list[str], size: int, batch_size: int, workers: int, course: Course) -> None:
    """The same with a DataLoader's batches; its workers stay from epoch to epoch."""
    rows = _typed(Pictures([(path, 0) for path in paths], resized(size, *floats(True), flip=False)))
    loader: Any = DataLoader(rows, batch_size, num_workers=workers, persistent_workers=workers > 0)
    network = reference()
    while True:
        course.begin()
        course.start()
        with torch.no_grad():
            found = [network(image).softmax(dim=1) for image, _ in loader]
        course.result = torch.cat(found).tolist()
        course.end()


def reference(classes: int = 1000) -> nn.Module:
    """The AlexNet of torchvision, the same weights each time; large in the last layer, so that classes differ."""
    torch.manual_seed(0)
    network = torchvision.models.AlexNet(classes).eval()
    nn.init.normal_(network.classifier[-1].weight)
    return cast(nn.Module, network)


def _typed(items: Any) -> Dataset[Any]:
    return cast(Dataset[Any], items)  # DataLoader asks for no more than __len__ and __getitem__
