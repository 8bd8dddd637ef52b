"""How fast a bundle answers, beside PyTorch: python -m project.cli bench bundle."""

import functools
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from project import bundle, checkpoint, convert, models, parity
from project.bench.pictures import make_photographs
from project.data.workers import usable_cores
from project.errors import FailedRun
from project.predictor import Predictor

MODEL, CLASSES = "alexnet", 10
BATCHES = (1, 8, 64)
WARM_UP = 3  # batches of each size


def measure(image_size: int, count: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Lets all answer in turn, round after round, then the verb predict; prints the tables and returns them.

    Args:
        image_size: Side of the pictures, in pixels.
        count: Pictures that each answers in a round, of each batch size.
        rounds: How many.
        scratch: A folder for the bundles.
    """
    convert.require_libraries()
    network, folders = make(image_size, scratch)
    contestants: dict[str, Predictor] = {"PyTorch": network}
    contestants |= {f"ONNX Runtime, {name}": bundle.Bundle(folder) for name, folder in folders.items()}
    print(
        f"{MODEL}, {image_size} px, pixels to probabilities, {usable_cores()} threads; in turn, {rounds} rounds of "
        f"{count} pictures (p99 of fewer than 100 batches is nearly the slowest)\n"
    )
    result: dict[str, Any] = {}
    random = np.random.default_rng(0)
    print(f"{'':24}  batch   p50 ms   p99 ms  pictures/s   ratio")
    for size in BATCHES:
        image = random.integers(0, 256, (size, image_size, image_size, 3), np.uint8)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number, (name, one) in itertools.product(range(rounds + 1), contestants.items()):
            for _ in range(max(1, count // size) if number else WARM_UP):
                start = time.perf_counter()
                one.probabilities(image)
                if number:
                    seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            middle, slow = np.percentile(times, (50, 99)).tolist()
            speed = size * len(times) / sum(times)
            entry = {"p50_seconds": middle, "p99_seconds": slow, "pictures_per_second": speed, "batches": len(times)}
            result.setdefault(name, {})[str(size)] = entry
            ratio = speed / result["PyTorch"][str(size)]["pictures_per_second"]
            print(f"{name:24}  {size:5}  {1e3 * middle:7.1f}  {1e3 * slow:7.1f}  {speed:10,.0f}  {ratio:6.2f}")
        print()
    saved = _saved(network, scratch / "best.ckpt")
    seconds_of_predict = _predict([saved, *folders.values()], rounds, scratch)
    print("predict of one picture, from the command to its end")
    for name, median in zip(contestants, seconds_of_predict, strict=True):
        result[name]["predict_seconds"] = median
        print(f"{name:24}  {median:5.2f} s  {seconds_of_predict[0] / median:6.2f}")
    return result


def _predict(places: list[Path], rounds: int, scratch: Path) -> list[float]:
    """Seconds that the verb predict takes for one picture, by what it is given; a process of its own each time."""
    (picture,) = make_photographs(scratch / "photo", 1).rglob("*.jpg")

    def predict(place: Path) -> None:
        command = [sys.executable, "-m", "project.cli", "predict", str(place), str(picture), "--out", "-"]
        on_processor = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # as all of the table
        made = subprocess.run(command, env=on_processor, capture_output=True, text=True)
        if made.returncode:
            raise FailedRun(f"predict {place} fails: {made.stderr.strip()}")

    return parity.side_by_side(*(functools.partial(predict, place) for place in places), rounds=rounds, warm_up=1)


def _saved(network: checkpoint.Network, file: Path) -> Path:
    weights = {f"network.{name}": tensor for name, tensor in network.network.state_dict().items()}
    torch.save({checkpoint.METADATA: network.metadata, "state_dict": weights}, file)
    return file


def make(image_size: int, scratch: Path) -> tuple[checkpoint.Network, dict[str, Path]]:
    """A network of random weights and its bundles by precision: how long an answer takes does not depend on them."""
    half = [0.5, 0.5, 0.5]
    metadata = {
        "model": MODEL,
        "class_names": [str(number) for number in range(CLASSES)],
        "image_size": image_size,
        "resize": "stretch",
        "mean": half,
        "std": half,
        "config": {"data": {}, "model": {}, "trainer": {}},
    }
    config = metadata | {"temperature": 1.0, "calibrated": False}
    folders = {name: scratch / name for name in ("float32", "int8")}
    for folder in folders.values():
        folder.mkdir()
    files = {name: folder / bundle.MODEL for name, folder in folders.items()}
    network = models.build(MODEL, CLASSES).eval()
    program = convert.traced(network, 1.0, image_size)
    convert.write_onnx(program, files["float32"], convert.described(metadata, 1.0, "float32"))
    samples = np.random.default_rng(0).integers(0, 256, (1, 8, image_size, image_size, 3), np.uint8)
    convert.write_int8(files["float32"], files["int8"], convert.described(metadata, 1.0, "int8"), samples)
    network.to(memory_format=torch.channels_last)  # as checkpoint.load has it
    for folder in folders.values():
        bundle.seal(folder, config)
    return checkpoint.Network(network, metadata), folders
