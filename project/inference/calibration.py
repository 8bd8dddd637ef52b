"""Calibration: one temperature per checkpoint, fitted on its validation images, makes probabilities match frequencies.

Guo et al. 2017, "On Calibration of Modern Neural Networks": the logits are divided by one number, which changes no
label.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import files
from project.errors import UserError, command

LOWEST, HIGHEST = 0.05, 20.0  # temperatures
SMALLEST = 1e-30  # floor of a probability before its logarithm is taken


def fit_temperature(true: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]]) -> float | None:
    """Finds the temperature that maximises the likelihood of the true classes.

    Args:
        true: (N,) indices of the true classes.
        probabilities: (N, K), at temperature 1.

    Returns:
        Above 1 where the network was overconfident. None where no temperature from 0.05 to 20 is best, as with images
        that are all classified correctly, for which more confidence is always better.
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


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def write(checkpoint: Path, temperature: float | None) -> None:
    """Writes a temperature into a file beside its checkpoint; None removes the file."""
    if temperature is None:
        _file(checkpoint).unlink(missing_ok=True)
        return
    files.write_json(_file(checkpoint), {"temperature": temperature, "checkpoint": fingerprint(checkpoint)})


def read(checkpoint: Path) -> float | None:
    """Reads the temperature beside a checkpoint; None where there is none, or that of other weights.

    Raises:
        UserError: The file is damaged.
    """
    file = _file(checkpoint)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        temperature, owner = float(content["temperature"]), content["checkpoint"]
        if not LOWEST / 2 <= temperature <= HIGHEST * 2:
            raise ValueError(temperature)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; {command('report', checkpoint)} writes it anew.") from error
    return temperature if owner == fingerprint(checkpoint) else None


def fingerprint(checkpoint: Path) -> str:
    """Identifies a checkpoint's content by the checksums in its archive, without reading all of it."""
    with zipfile.ZipFile(checkpoint) as archive:
        records = [(record.filename, record.CRC, record.file_size) for record in archive.infolist()]
    return f"{zlib.crc32(repr(sorted(records)).encode()):08x}"


def _file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".temperature.json")
