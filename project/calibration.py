"""Probabilities that mean what they say: one temperature for a checkpoint, found on its validation pictures.

Guo et al. 2017, "On Calibration of Modern Neural Networks": the logits are divided by one number, which leaves every
label as it is.
"""

import contextlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import files
from project.errors import UserError

COLDEST, HOTTEST = 0.05, 20.0
SMALLEST = 1e-30  # probability whose logarithm is still taken


def fit_temperature(true: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]]) -> float | None:
    """The temperature at which the likelihood of the true classes is highest.

    Args:
        true: (N,) places of the true classes.
        probabilities: (N, K), at temperature 1.

    Returns:
        Above 1 where the probabilities were too sure of themselves; None where there is no such temperature from 0.05
        to 20, as with pictures that are all answered rightly, for which surer is always better.
    """
    logits = np.log(np.maximum(probabilities, SMALLEST).astype(np.float64))
    own = logits[np.arange(len(true)), true]
    low, high = 1 / HOTTEST, 1 / COLDEST  # the loss is convex in 1/T: halve where its slope changes sign
    for _ in range(60):
        middle = (low * high) ** 0.5
        mean = (_softmax(logits * middle) * logits).sum(axis=1)
        low, high = (low, middle) if (mean - own).mean() > 0 else (middle, high)
    at_an_end = not 1.001 * COLDEST < 1 / middle < HOTTEST / 1.001
    return None if at_an_end else float(1 / middle)


def at_temperature(probabilities: npt.NDArray[np.floating[Any]], temperature: float) -> npt.NDArray[np.float64]:
    """The same predictions (N, K) as if the logits had been divided by a temperature."""
    return _softmax(np.log(np.maximum(probabilities, SMALLEST).astype(np.float64)) / temperature)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def write(checkpoint: Path, temperature: float, measured: dict[str, float]) -> None:
    """Keeps a temperature beside its checkpoint, with what was measured at it."""
    content = {"temperature": temperature, "checkpoint": fingerprint(checkpoint), **measured}
    with files.replacing(_file(checkpoint)) as stream:
        json.dump(content, stream, indent=2)


def forget(checkpoint: Path) -> None:
    """Removes the temperature kept beside a checkpoint, if there is one."""
    with contextlib.suppress(OSError):  # a run that cannot be written
        _file(checkpoint).unlink(missing_ok=True)


def read(checkpoint: Path) -> float | None:
    """The temperature kept beside a checkpoint; None where there is none, or one of other weights.

    Raises:
        UserError: The file is damaged.
    """
    file = _file(checkpoint)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        temperature, owner = float(content["temperature"]), content["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; python -m project.cli report {checkpoint} makes it anew.") from error
    if not COLDEST / 2 <= temperature <= HOTTEST * 2:
        raise UserError(f"{file} has the temperature {temperature}; report {checkpoint} makes it anew.")
    return temperature if owner == fingerprint(checkpoint) else None


def require(checkpoint: Path) -> float:
    """As `read`.

    Raises:
        UserError: There is none.
    """
    temperature = read(checkpoint)
    if temperature is None:
        raise UserError(
            f"No temperature is known for {checkpoint}; python -m project.cli report {checkpoint} finds it, where the "
            "validation pictures are there and some of them are answered wrongly."
        )
    return temperature


def fingerprint(checkpoint: Path) -> str:
    """Differs where a checkpoint's content does: made of the checksums in its archive, without reading all of it."""
    with zipfile.ZipFile(checkpoint) as archive:
        records = [(record.filename, record.CRC, record.file_size) for record in archive.infolist()]
    return f"{zlib.crc32(repr(sorted(records)).encode()):08x}"


def _file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".temperature.json")
