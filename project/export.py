"""Packs a checkpoint for use elsewhere: python -m project.cli export runs/digits/version_0."""

import importlib
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from project import bundle, calibration, files, parity, runs
from project.data.images import Pixels
from project.errors import UserError

LOSS, SMALLER, FASTER = 0.5, 3.0, 1.5  # int8: points of accuracy it may lose, times it must be smaller or faster
FULL, QUANTIZED = "float32", "int8"


def export(
    checkpoint: str | None = None,
    /,
    quantize: Literal["int8"] | None = None,
    out: str | None = None,
    pt2: bool = False,
    data: str | None = None,
) -> int:
    """Packs a checkpoint for use elsewhere, and checks that it says the same there.

    The bundle is a folder with model.onnx (pixels to probabilities, for use without torch), model.safetensors and
    config.json (the network of PyTorch), README.md (the model card) and SHA256SUMS. `predict` and `load` take it
    wherever they take a checkpoint. Exits with 1, and leaves nothing, where validation pictures, read from their files,
    get other answers than from the checkpoint.

    Args:
        checkpoint: A checkpoint or a run's folder; by default the newest run's best.ckpt.
        quantize: int8: layers that compute in 8 bits, on scales that training pictures show, if that costs at most 0.5
            points of accuracy on the validation pictures and the file is a third or the speed 1.5-fold.
        out: The folder to make; must not exist. By default bundle in the run.
        pt2: Write model.pt2 too, for torch.export.load, which runs code from the file: for your own use.
        data: Where the run's pictures are now; by default where they were.
    """
    file = runs.find(checkpoint)
    target = Path(out) if out is not None else runs.folder_of(file) / "bundle"
    files.require_new(target, "out")
    from project import convert  # torch: not before the arguments are known to be right
    from project.checkpoint import load

    convert.require_libraries()
    network = load(file, device="cpu")
    if (temperature := calibration.read(file)) is not None:
        network.temperature = temperature
    pictures = parity.validation(runs.folder_of(file), network.metadata, data)
    samples = parity.samples(runs.folder_of(file), network, data) if quantize is not None else []
    config = _plain(network.metadata) | {
        "temperature": network.temperature,
        "calibrated": temperature is not None,
        "precision": FULL,
        "export": _origin(),
    }
    try:
        files.sweep(target.parent)
        with files.new_folder(target) as folder:
            program = convert.traced(network.network, network.temperature, network.image_size)
            convert.write_onnx(program, folder / bundle.MODEL, convert.described(config, network.temperature, FULL))
            convert.write_safetensors(network.network, folder / bundle.WEIGHTS)
            if pt2:
                convert.write_program(program, folder / bundle.PROGRAM)
            del program
            bundle.seal(folder, config)
            exact = bundle.Bundle(folder)
            config["compared"], answers = parity.compare(network, exact, pictures)
            if samples:
                config |= _quantized(folder, config, exact, answers, pictures, samples)
            from project import card

            card.write(folder / bundle.CARD, file, config)
            bundle.seal(folder, config)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; give another place by --out.") from error
    size = sum(part.stat().st_size for part in target.iterdir())
    print(f"bundle: {target} ({size / 1e6:,.0f} MB)\nnext: python -m project.cli predict {target} PICTURES...")
    return 0


def _quantized(
    folder: Path,
    config: dict[str, Any],
    exact: bundle.Bundle,
    expected: parity.Answers,
    pictures: parity.Labelled,
    samples: list[Pixels],
) -> dict[str, Any]:
    """Makes model.onnx one of 8 bits, if that is worth it; says what was measured.

    Returns:
        What it adds to config.json.
    """
    from project import convert

    model, trial = folder / bundle.MODEL, folder / QUANTIZED
    trial.mkdir()
    try:
        described = convert.described(config, config["temperature"], QUANTIZED)
        convert.write_int8(model, trial / bundle.MODEL, described, samples)
        bundle.seal(trial, config)
        small = bundle.Bundle(trial)
        found = parity.ask(small, pictures, batch_size=64)
    except UserError as error:
        shutil.rmtree(trial)
        print(f"int8: {str(error).replace(f'{trial}{os.sep}', '').rstrip('.')}; model.onnx stays float32")
        return {}
    right = expected.accuracy, found.accuracy
    difference = float(np.nan_to_num(np.abs(expected.probabilities - found.probabilities), nan=1.0).max())
    sizes = [file.stat().st_size for file in (model, trial / bundle.MODEL)]
    image = np.zeros((1, exact.image_size, exact.image_size, 3), np.uint8)
    seconds = parity.side_by_side(lambda: exact.probabilities(image), lambda: small.probabilities(image))
    lost, smaller, faster = 100 * (right[0] - right[1]), sizes[0] / sizes[1], seconds[0] / seconds[1]
    keep = is_worth_it(lost, smaller, faster)
    print(
        f"int8: accuracy {right[0]:.2%} becomes {right[1]:.2%}, probabilities differ by at most {difference:.2g}, "
        f"{sizes[0] / 1e6:,.1f} MB become {sizes[1] / 1e6:,.1f} ({smaller:.1f} x smaller), {1e3 * seconds[0]:.1f} ms a "
        f"picture become {1e3 * seconds[1]:.1f} ({faster:.1f} x as fast): "
        f"{'kept' if keep else 'not worth it, model.onnx stays float32'}"
    )
    if keep:
        (trial / bundle.MODEL).replace(model)
    shutil.rmtree(trial)
    measured = [dict(zip((FULL, QUANTIZED), pair, strict=True)) for pair in (right, sizes, seconds)]
    result = dict(zip(("accuracy", "bytes", "seconds_a_picture"), measured, strict=True))
    return {
        "precision": QUANTIZED if keep else FULL,
        "int8": {"kept": keep, "largest_difference": difference, **result},
    }


def is_worth_it(lost: float, smaller: float, faster: float) -> bool:
    """Whether 8 bits are kept: points of accuracy they lose, times the file is smaller, times they are faster."""
    return round(lost, 6) <= LOSS and (smaller >= SMALLER or faster >= FASTER)


def _origin() -> dict[str, Any]:
    from project.checkpoint import provenance
    from project.convert import LIBRARIES

    # not what the package index calls them: onnxruntime has several names there
    versions = {name: str(importlib.import_module(name).__version__) for name in ("torch", *LIBRARIES)}
    return {"versions": versions, "git_commit": provenance()["git_commit"]}


def _plain(value: Any) -> Any:
    """The same for JSON, which has no number that is none."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
