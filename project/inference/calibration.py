"""Calibration: one temperature per checkpoint, fitted on its validation images, makes probabilities match frequencies.

Guo et al. 2017, "On Calibration of Modern Neural Networks": the logits are divided by one number, which changes no
label.
"""

import json
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import files

LOWEST, HIGHEST = 0.05, 20.0  # temperatures
SMALLEST = 1e-30  # floor of a probability before its logarithm is taken
QUANTILES = 201  # of the maximum logits are kept, in steps of 0.5 %; of fewer images, all


def fit_temperature(true: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]]) -> float | None:
    """Finds the temperature, for probabilities (N, K) at 1, that maximises the likelihood of the true classes (N,).

    It is above 1 where the network was overconfident, and None where none from 0.05 to 20 is best, as with images that
    are all classified correctly, for which more confidence is always better.
    """
    logits = np.log(np.maximum(probabilities, SMALLEST).astype(np.float64))
    own = logits[np.arange(len(true)), true]
    low, high = LOWEST, HIGHEST  # the loss is convex in 1/T: bisect for the change of its slope's sign
    for _ in range(60):
        middle = (low * high) ** 0.5
        mean = (_softmax(logits / middle) * logits).sum(axis=1)
        low, high = (middle, high) if (mean - own).mean() > 0 else (low, middle)
    return middle if 1.001 * LOWEST < middle < HIGHEST / 1.001 else None


def at_temperature(probabilities: npt.NDArray[np.floating[Any]], temperature: float) -> npt.NDArray[np.float64]:
    """Returns the probabilities (N, K) as if the logits had been divided by a temperature."""
    return _softmax(np.log(np.maximum(probabilities, SMALLEST).astype(np.float64)) / temperature)


def max_logits(probabilities: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The maximum logits (N,) of images with the probabilities (N, K), low if an image is of none of the classes.

    Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings", arXiv:1911.11132.
    Probabilities give the logits up to a constant: here, their mean is 0.
    """
    logits = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))
    return np.asarray(logits.max(axis=1) - logits.mean(axis=1))


def quantiles(values: npt.NDArray[np.float64]) -> list[float]:
    """The values (N,) in increasing order; of more than `QUANTILES`, as many at even distances in that order."""
    kept = np.linspace(0, len(values) - 1, min(len(values), QUANTILES)).round().astype(int)
    return [float(value) for value in np.sort(values)[kept]]


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def write(checkpoint: Path, temperature: float | None, max_logits: Sequence[float] = ()) -> None:
    """Writes what the validation images have told into a file beside the checkpoint."""
    content = {"temperature": temperature, "max_logits": max_logits, "checkpoint": fingerprint(checkpoint)}
    files.write_json(_file(checkpoint), content)


def read(checkpoint: Path) -> tuple[float | None, list[float]]:
    """Reads the temperature and the maximum logits of the validation images from the file beside a checkpoint.

    A file that is damaged, or of other weights, counts as missing; `report` replaces it.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(_file(checkpoint).read_text(encoding="utf-8"))
        temperature, max_logits = content["temperature"], content.get("max_logits", [])  # of before, without
        is_valid = temperature is None or LOWEST / 2 <= temperature <= HIGHEST * 2
        if is_valid and np.isfinite(max_logits).all() and content["checkpoint"] == fingerprint(checkpoint):
            return temperature, max_logits
    return None, []


def fingerprint(checkpoint: Path) -> str:
    """Identifies a checkpoint's content by the checksums in its archive, without reading all of it."""
    file = checkpoint / ".metadata" if checkpoint.is_dir() else checkpoint  # of a sharded one
    if not zipfile.is_zipfile(file):
        return f"{zlib.crc32(file.read_bytes()):08x}"
    with zipfile.ZipFile(checkpoint) as archive:
        records = [(record.filename, record.CRC, record.file_size) for record in archive.infolist()]
    return f"{zlib.crc32(repr(sorted(records)).encode()):08x}"


def _file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".temperature.json")
