"""How fast AlexNet trains, beside the article's loop, a usual Lightning loop and tuned plain PyTorch."""

from typing import Any

from benchmarks import baselines
from benchmarks.runner import EpochRounds, Stopwatch, compare, show, training_images
from project import cli
from project.commands.bench import BATCH, SIZE

OURS, UNCACHED = "fit, with its cache", "fit --data.cache off"


def training(root: str | None = None, count: int = 192, rounds: int = 3) -> dict[str, Any]:
    """Trains AlexNet in each way, in turn, epoch by epoch.

    Args:
        root: The images, as fit takes them; by default generated ones of 475 x 404 pixels.
        count: Number of images.
        rounds: Epochs that count, after one that warms up.
    """
    with training_images(root, count) as table:
        batch = min(BATCH, len(table))
        common = ([(path, "ab".index(label)) for path, label in table], 2, SIZE, batch)
        seconds, _ = compare(
            {
                "the article's loop": (baselines.article, *common),
                "a usual Lightning loop": (baselines.usual, *common),
                "tuned plain PyTorch": (baselines.tuned, *common),
                UNCACHED: (fit, batch, "off"),
                OURS: (fit, batch, "on"),
            },
            rounds,
        )
    # fit leaves an incomplete last batch out, the others take it
    whole = len(table) // batch * batch
    speed = {n: (whole if n in (OURS, UNCACHED) else len(table)) / taken for n, taken in seconds.items()}
    return {"images_per_second": speed, "ratio": show(speed, OURS)}


def fit(batch: int, cache: str, _: Stopwatch) -> None:
    """The verb `fit` on images.csv, without the validation and the checkpoints that the others lack."""
    data = ["--data.root=images.csv", f"--data.image_size={SIZE}", f"--data.batch_size={batch}"]
    only_steps = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false", "--trainer.max_epochs=1000"]
    rounds = ["--trainer.accelerator=cpu", f"--trainer.callbacks={EpochRounds.__module__}.EpochRounds"]
    cli.main(["fit", *data, f"--data.cache={cache}", *only_steps, *rounds])
