"""How fast a bundle predicts, beside PyTorch."""

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from project import models
from project.data.workers import usable_cores
from project.export import onnx
from project.export.quantize import write_int8
from project.inference import checkpoint
from project.inference.bundle import MODEL as ONNX
from project.inference.bundle import OnnxPredictor, seal
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor

MODEL, CLASSES = "alexnet", 10


def bundle(image_size: int = 224, count: int = 192, rounds: int = 3) -> dict[str, Any]:
    """Predicts batches in PyTorch and from bundles in 32 and 8 bits, in turn.

    Args:
        image_size: Side of the images, in pixels.
        count: Images in a round, of each batch size.
        rounds: Number of rounds.
    """
    onnx.library_versions()
    with tempfile.TemporaryDirectory() as folder:
        network, bundles = make(image_size, Path(folder))
        predictors: dict[str, Predictor] = {"PyTorch": network}
        predictors |= {f"ONNX Runtime, {name}": OnnxPredictor(path) for name, path in bundles.items()}
        print(f"{MODEL}, {image_size} px, {usable_cores()} threads, pixels to probabilities; {rounds} x {count} images")
        print(f"\n{'':24}  batch   p50 ms   p99 ms  images/s   ratio")
        figures: dict[str, Any] = {name: {} for name in predictors}
        for size in (1, 8, 64):
            _measure(predictors, size, image_size, count, rounds, figures)
    return figures


def _measure(
    predictors: dict[str, Predictor], size: int, side: int, count: int, rounds: int, figures: dict[str, Any]
) -> None:
    """Adds the figures of batches of `size` images."""
    image = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for number, (name, predictor) in itertools.product(range(rounds + 1), predictors.items()):
        for _ in range(max(1, count // size) if number else 3):  # which warm up
            start = time.perf_counter()
            predictor.probabilities(image)
            if number:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        median, slow = np.percentile(times, (50, 99)).tolist()
        speed = size * len(times) / sum(times)
        figures[name][str(size)] = {"p50_seconds": median, "p99_seconds": slow, "images_per_second": speed}
        ratio = speed / figures["PyTorch"][str(size)]["images_per_second"]
        print(f"{name:24}  {size:5}  {1e3 * median:7.1f}  {1e3 * slow:7.1f}  {speed:10,.0f}  {ratio:6.2f}")
    print()


def make(image_size: int, scratch: Path) -> tuple[checkpoint.TorchPredictor, dict[str, Path]]:
    """A network of random weights and its bundles by precision: the time does not depend on the weights."""
    half, names = [0.5, 0.5, 0.5], [str(number) for number in range(CLASSES)]
    sections: dict[str, Any] = {"data": {}, "model": {}, "trainer": {}}
    metadata = Metadata(MODEL, names, image_size, "stretch", half, half, sections, calibrated=False)
    bundles = {name: scratch / name for name in ("float32", "int8")}
    for folder in bundles.values():
        folder.mkdir()
    network = models.build(MODEL, CLASSES).eval()
    program = onnx.trace(network, 1.0, image_size)
    onnx.write_onnx(program, bundles["float32"] / ONNX, onnx.properties(metadata))
    samples = np.random.default_rng(0).integers(0, 256, (1, 8, image_size, image_size, 3), np.uint8)
    properties = onnx.properties(replace(metadata, precision="int8"))
    write_int8(bundles["float32"] / ONNX, bundles["int8"] / ONNX, properties, samples)
    for folder in bundles.values():
        seal(folder, metadata)
    return checkpoint.TorchPredictor(network.to(memory_format=torch.channels_last), metadata), bundles
