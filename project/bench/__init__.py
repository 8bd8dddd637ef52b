"""Measures, side by side in one run: python -m project.cli bench [training|data|predict|accuracy|bundle|serve]."""

import json as json_format
import math
import tempfile
from pathlib import Path
from typing import Literal

from project import files
from project.bench.pictures import make_photographs
from project.errors import UserError


def bench(
    what: Literal["training", "data", "predict", "accuracy", "bundle", "serve"] = "training",
    /,
    root: str | None = None,
    count: int | None = None,
    rounds: int | None = None,
    full: bool = False,
    target: float | None = None,
    epochs: int = 12,
    image_size: int | None = None,
    seconds: float = 30,
    json: str | None = None,
) -> int:
    """Measures this machine, this project and the usual ways beside each other, in one run.

    Each is run in turn, round after round, and the medians count. Exits with 0.

    Args:
        what: `training`: AlexNet's training steps beside the article's loop, a usual Lightning loop and tuned plain
            PyTorch, then what a step of ours consists of. `data`: reading, on one core, with workers, from the cache.
            `predict`: labelling files, beside plain loops over torchvision's network and transforms. `accuracy`:
            seconds to a validation accuracy, beside a usual Lightning loop with its default recipe. `bundle`: AlexNet's
            answers in PyTorch, and from a bundle in 32 and in 8 bits, for batches of 1, 8 and 64, then how long
            `predict` takes for a picture. `serve`: requests a second and their latency with 1, 8 and 64 clients, with
            batches and one by one.
        root: The pictures, as fit takes them; by default made ones of 475 x 404 pixels, for accuracy the digits.
        count: How many of them; by default 192 for training and bundle, 256 for data and predict. (Accuracy takes all.)
        rounds: How often each is run; by default 3 for training and bundle, 5 for data and predict.
        full: Training: what a step costs at other batch and picture sizes, too.
        target: Accuracy: the validation accuracy to reach, 0 to 1.
        epochs: Accuracy: how many each may take.
        image_size: Accuracy, bundle and serve: side of the pictures, in pixels; by default as in fit, and 224.
        seconds: Serve: how long each number of clients asks.
        json: Write the figures into this file too; must not exist.
    """
    if json is not None:
        files.require_new(Path(json), "json")
    for option, value in (("count", count), ("rounds", rounds), ("epochs", epochs)):
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1.")
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds is {seconds}; it must be above 0.")
    if what == "accuracy" and (target is None or not 0 < target <= 1):
        raise UserError(f"bench accuracy needs a --target above 0 and at most 1, not {target}; for example 0.95.")
    with tempfile.TemporaryDirectory() as folder:
        if what == "accuracy":
            from project.bench import accuracy

            assert target is not None
            result = accuracy.measure(root, target, epochs, image_size, Path(folder))
        elif what == "serve":
            from project.bench import serving

            result = serving.measure(image_size or 224, seconds, Path(folder))
        elif what == "bundle":
            from project.bench import bundle

            result = bundle.measure(image_size or 224, count or 192, rounds or 3, Path(folder))
        else:
            many = count or (192 if what == "training" else 256)
            place = Path(root) if root else make_photographs(Path(folder) / "photos", many)
            if what == "data":
                from project.bench import reading

                result = reading.measure(place, many, rounds or 5, Path(folder))
            elif what == "predict":
                from project.bench import predicting

                result = predicting.measure(place, many, rounds or 5, Path(folder))
            else:
                from project.bench import training

                result = training.measure(place, many, rounds or 3, full, Path(folder))
    if json is not None:
        with files.replacing(Path(json)) as stream:
            json_format.dump(result, stream, indent=2)
    return 0
