"""How fast this machine trains and reads, and what saving costs: python -m project.cli bench [training|data|saving]."""

import contextlib
import io
import itertools
import statistics
import tempfile
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image

from project import files
from project.data.inputs import gather
from project.data.workers import usable_cores
from project.errors import UserError
from project.inference.timing import side_by_side

BATCH, SIZE = 64, 224
PARTS = {  # of a step, and the actions under which Lightning's profiler records them
    "waiting for data": ".train_dataloader_next",
    "transfer": ".batch_to_device",
    "forward and loss": ".training_step",
    "backward": ".backward",
    "optimiser": ".optimizer_step",
    "step": "run_training_epoch",
}


def bench(
    what: Literal["training", "data", "saving"] = "training",
    /,
    root: str | None = None,
    count: PositiveInt = 192,
    rounds: PositiveInt = 3,
    json: str | None = None,
) -> int:
    """Measures the parts of a training step, the speed of reading, or the cost of checkpoints.

    Args:
        what: `training`: a step of `fit` with AlexNet, and the same step on a batch in memory. `data`: reading, on one
            core and with workers, with and without the cache. `saving`: a whole `fit` with and without checkpoints.
        root: The images, as fit takes them; by default generated ones of 475 x 404 pixels, for `saving` the digits.
        count: Number of images; `saving` takes all.
        rounds: How often each is measured, in turn; the median counts.
        json: Write the figures into this file too; must not exist.
    """
    if json is not None:
        files.require_new(Path(json), "json")
    source = Path(root).absolute() if root else None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if what == "saving":
            figures = _saving(f"--data.root={source}" if source else "--data.cache=on", rounds)
        else:
            train = write_table(source, count)
            figures = _training(len(train), rounds) if what == "training" else _data(rounds)
    if json is not None:
        files.write_json(Path(json), figures)
    return 0


def make_photographs(root: Path, count: int) -> Path:
    """Writes JPEGs as detailed as photographs: noise of all scales, 65 kB each."""
    random = np.random.default_rng(0)
    root.mkdir(parents=True)
    for number in range(count):
        scales = [Image.fromarray(random.integers(0, 256, (2**k, 2**k, 3), np.uint8)) for k in range(1, 10)]
        layers = [np.asarray(scale.resize((475, 404), Image.Resampling.BICUBIC)) for scale in scales]
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(root / f"{number:04d}.jpg", quality=90)
    return root


def write_table(root: Path | None, count: int) -> list[tuple[str, str]]:
    """Writes randomly chosen images, in two classes whatever their own, into images.csv; returns those for training."""
    root = root or make_photographs(Path("photos"), count + 2)
    paths = sorted(path for path, _ in gather([str(root)]))
    if len(paths) < 4:
        raise UserError(f"bench needs at least 4 images; {root} has {len(paths)}.")
    np.random.default_rng(0).shuffle(paths)
    splits = ["val", "val", *["train"] * count]  # one of each class, for without a validation set fit does not start
    rows = list(zip(paths, itertools.cycle("ab"), splits, strict=False))
    files.write_csv(Path("images.csv"), [("path", "label", "split"), *rows])
    train = [(path, label) for path, label, split in rows if split == "train"]
    print(f"{root}: {len(train):,} images to train on, {SIZE} px, batches of {min(BATCH, len(train))}\n")
    return train


def _fit(*options: str) -> Any:
    """Runs `fit` in the current folder without its output; returns its Trainer."""
    from project.training import cli as trainer_cli
    from project.training.trainer import quieten

    quieten()
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer_cli.Cli("fit", list(options)).trainer


def _training(count: int, rounds: int) -> dict[str, Any]:
    """Runs fit for one epoch that warms up and `rounds` that count; after each, as many steps from memory."""
    from project.training.throughput import StepsInMemory

    batch = min(BATCH, count)
    data = ["--data.root=images.csv", f"--data.image_size={SIZE}", f"--data.batch_size={batch}", "--data.cache=on"]
    only_steps = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    watch = ["--trainer.profiler=simple", f"--trainer.callbacks={StepsInMemory.__module__}.StepsInMemory"]
    trainer = _fit(*data, *only_steps, *watch, f"--trainer.max_epochs={rounds + 1}")
    split = dict[str, float]()
    for part, action in PARTS.items():
        (times,) = (times for name, times in trainer.profiler.recorded_durations.items() if name.endswith(action))
        split[part] = sum(times[len(times) // (rounds + 1) :]) / (count // batch * rounds)
    step = split.pop("step")
    split["optimiser"] -= split["forward and loss"] + split["backward"]  # which it calls
    split["logging and the rest"] = step - sum(split.values())
    (memory,) = (callback for callback in trainer.callbacks if isinstance(callback, StepsInMemory))
    limit = statistics.median(memory.seconds[1:])
    print(f"{'a step of fit':30}          ms    share")
    for part, seconds in split.items():
        print(f"  {part:28}  {1e3 * seconds:10.1f}   {seconds / step:6.1%}")
    print(
        f"\n{batch / step:.1f} images/s: a step takes {step / limit:.2f} times as long as the same network's forward, "
        f"backward and optimizer on a batch in memory, {batch / limit:.1f} images/s."
    )
    return {"step_seconds": split, "images_per_second": batch / step, "limit": batch / limit}


def loaders(workers: int) -> dict[str, Any]:
    """The loaders of fit for the training images of images.csv, each image once."""
    from project.data.datamodule import ImageData

    data = partial(ImageData, "images.csv", image_size=SIZE, batch_size=BATCH, workers=workers)
    sources = {"first epoch": data(cache="off"), "from the cache": data(cache="on")}
    sources["from the cache, augment crop"] = data(cache="on", augment="crop")
    return {name: source.in_order("train") for name, source in sources.items()}


def _data(rounds: int) -> dict[str, Any]:
    """Reads all images by each loader in turn."""
    import torch

    cores = usable_cores()
    torch.set_num_threads(1)
    readers = loaders(0) | {f"{name}, {cores} workers": loader for name, loader in loaders(cores).items()}
    epochs = [partial(deque[Any], loader, 0) for loader in readers.values()]
    seconds = side_by_side(*epochs, rounds=rounds, warm_up=1)  # warming up fills the cache
    count = sum(len(batch.row) for batch in readers["from the cache"])  # of those that can be read
    speed = {name: count / taken for name, taken in zip(readers, seconds, strict=True)}
    print(f"{'reading':40}    images/s")
    for name, value in speed.items():
        print(f"  {name:38}  {value:10,.0f}")
    return {"images_per_second": speed}


def _saving(data: str, rounds: int) -> dict[str, Any]:
    """Runs fit with and without checkpoints, in turn, after an epoch that fills the cache."""
    without = "--trainer.enable_checkpointing=false"
    _fit(data, without, "--trainer.max_epochs=1")
    saving, plain = side_by_side(partial(_fit, data), partial(_fit, data, without), rounds=rounds, warm_up=0)
    cost = saving / plain - 1
    print(f"fit takes {saving:.1f} s with checkpoints, {plain:.1f} s without: saving costs {cost:.1%} of its time.")
    return {"with_checkpoints": saving, "without_checkpoints": plain, "cost": cost}
