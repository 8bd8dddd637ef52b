"""How fast fit trains: beside the article's loop, a usual Lightning loop and tuned plain PyTorch; and in bf16."""

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
                UNCACHED: (fit, batch, "--data.cache=off"),
                OURS: (fit, batch, "--data.cache=on"),
            },
            rounds,
        )
    whole = len(table) // batch * batch  # fit leaves an incomplete last batch out, the others take it
    speed = {n: (whole if n in (OURS, UNCACHED) else len(table)) / taken for n, taken in seconds.items()}
    return {"images_per_second": speed, "ratio": show(speed, OURS)}


def precision(rounds: int = 3) -> dict[str, Any]:
    """Trains in float32 and with bf16 autocast on the CPU, in turn, and says whether bf16 is worth it on this machine.

    Args:
        rounds: Epochs that count, after one that warms up.
    """
    networks, modes, gain = ("alexnet", "resnet18"), ("32-true", "bf16-mixed"), {}
    ways = {(n, m): f"--data.cache=on --model.name={n} --trainer.precision={m}" for n in networks for m in modes}
    with training_images(None, BATCH) as table:
        seconds, _ = compare({text: (fit, BATCH, text) for text in ways.values()}, rounds)
    for name in networks:
        gain[name] = show({m: len(table) / seconds[ways[name, m]] for m in modes}, modes[1], name)[modes[0]]
    verdicts = (f"{'' if gain[n] > 1.05 else 'not '}worth it for {n} ({gain[n]:.2f} times as fast)" for n in networks)
    print(f"\n--trainer.precision bf16-mixed on this machine's CPU is {', '.join(verdicts)}.")
    return {"times_as_fast": gain}


def fit(batch: int, options: str, _: Stopwatch) -> None:
    """The verb `fit` on images.csv, without the validation and the checkpoints that the others lack."""
    words = f"--data.root=images.csv --data.image_size={SIZE} --data.batch_size={batch} --trainer.limit_val_batches=0"
    words += f" --trainer.enable_checkpointing=false --trainer.max_epochs=1000 --trainer.accelerator=cpu {options}"
    cli.main(["fit", *words.split(), f"--trainer.callbacks={EpochRounds.__module__}.EpochRounds"])
