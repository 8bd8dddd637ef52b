"""Bundles: a folder with a trained network for use elsewhere, made by `export`; read here without torch.

model.onnx maps uint8 images to probabilities: normalisation, temperature and softmax are inside. model.safetensors and
config.json are the PyTorch network. SHA256SUMS lists the files as they were written. None of them holds code.
"""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import files
from project.data.images import Pixels
from project.data.workers import usable_cores
from project.errors import UserError
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor

MODEL, WEIGHTS, CONFIG, CARD, PROGRAM = "model.onnx", "model.safetensors", "config.json", "README.md", "model.pt2"
PARTS = (MODEL, WEIGHTS, CONFIG, CARD, PROGRAM)
SUMS = "SHA256SUMS"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.29 and later report which models are used
ANEW = "make the bundle anew by python -m project.cli export"


class OnnxPredictor(Predictor):
    """A bundle's model.onnx; several threads may use it at once.

    Each batch is computed by `threads`, by default one per core that this process may use. UserError where a file is
    missing or damaged, or contradicts another.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._file = folder / MODEL
        with ThreadPoolExecutor(1) as pool:  # sums are computed while the model is read
            session = pool.submit(_session, self._file, threads or usable_cores())
            super().__init__(verify(folder, MODEL))  # where a file is damaged, its error is the more precise one
        self._session = session.result()
        _require_match(self._session, self._file, self.metadata)

    def probabilities(self, image: Pixels) -> npt.NDArray[np.float32]:
        try:
            result: npt.NDArray[np.float32] = self._session.run(None, {"image": image})[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(f"{self._file} fails on an image: {' '.join(str(error).split())[:300]}") from error
        if result.shape != (len(image), len(self.class_names)):
            raise UserError(f"{self._file} maps {len(image)} images to an array of shape {result.shape}.")
        return result


def properties(metadata: Metadata) -> dict[str, str]:
    """The texts in a model.onnx that must match config.json; the layout NHWC means (B, H, W, 3)."""
    preprocess = {"image_size": metadata.image_size, "resize": metadata.resize, "layout": "NHWC"}
    return {"preprocess": json.dumps(preprocess), "class_names": json.dumps(metadata.class_names)}


def seal(folder: Path, metadata: Metadata) -> None:
    """Writes config.json, then SHA256SUMS of all files that are there."""
    values = {name: value for name, value in dataclasses.asdict(metadata).items() if value is not None}
    files.write_json(folder / CONFIG, values)
    lines = [f"{_sum(folder / name)}  {name}\n" for name in PARTS if (folder / name).exists()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def verify(folder: Path, needed: str) -> Metadata:
    """Compares the files that are there with SHA256SUMS, and reads config.json; only `needed` must be there besides.

    UserError where one of these is missing, a file is damaged, or config.json is not a bundle's.
    """
    for name in (SUMS, CONFIG, needed):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; copy the whole bundle, or {ANEW}.")
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        if not {CONFIG, needed} <= set(sums) <= set(PARTS):
            raise UserError(f"{folder / SUMS} is damaged; {ANEW}.")
        present = [name for name in sums if (folder / name).is_file()]
        with ThreadPoolExecutor(len(present)) as pool:
            for name, checksum in zip(present, pool.map(_sum, [folder / name for name in present]), strict=True):
                if checksum != sums[name]:
                    raise UserError(f"{folder / name} is damaged: its content does not match {SUMS}; {ANEW}.")
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {error.filename or folder}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} or {SUMS} is damaged; {ANEW}.") from error
    return Metadata.parse(content, f"{folder / CONFIG} is not the configuration of a bundle")


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _session(file: Path, threads: int) -> Any:
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise UserError("A bundle needs the library onnxruntime; install it: pip install -e .[export]") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised, not logged
    # spinning threads would take the cores from the threads that read images, and from other processes
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # external weights would be read from this folder, which does not exist: all of a bundle's are in model.onnx
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.absolute()))
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"{file} cannot be used: {' '.join(str(error).split())[:300]}") from error


def _require_match(session: Any, file: Path, metadata: Metadata) -> None:
    """Checks that a model's input, output and properties match config.json."""
    size, count = metadata.image_size, len(metadata.class_names)
    inputs = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    outputs = [(node.type, node.shape[1:]) for node in session.get_outputs()]
    texts, expected = session.get_modelmeta().custom_metadata_map, properties(metadata)
    if (
        inputs != [("image", "tensor(uint8)", [size, size, 3])]
        or outputs != [("tensor(float)", [count])]
        or {key: texts.get(key) for key in expected} != expected
    ):
        raise UserError(
            f"{file} and {CONFIG} beside it contradict each other: the model must map images of {size} pixels, "
            f"{metadata.resize}, to the probabilities of {count} classes of the same names; {ANEW}."
        )
