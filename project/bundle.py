"""A bundle: a folder with a trained network that others can use, made by `export`; read here, without torch.

model.onnx takes uint8 pictures and gives probabilities: normalisation, temperature and softmax are inside.
model.safetensors and config.json are the network of PyTorch. SHA256SUMS knows the files as they were written. None of
them holds code.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import expected
from project.data import images
from project.data.workers import usable_cores
from project.errors import UserError
from project.predictor import Predictor

MODEL, WEIGHTS, CONFIG, CARD, PROGRAM = "model.onnx", "model.safetensors", "config.json", "README.md", "model.pt2"
PARTS = (MODEL, WEIGHTS, CONFIG, CARD, PROGRAM)
SUMS = "SHA256SUMS"
LAYOUT = "NHWC"  # (B, H, W, 3), as Pillow and browsers have pictures
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on it tells its maker which models are used
ANEW = "make the bundle anew by python -m project.cli export"


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with a bundle, damaged or not."""
    try:
        return any((Path(path) / name).is_file() for name in (MODEL, CONFIG))
    except OSError:  # a name that is too long, a folder that may not be looked into: runs.find says so
        return False


class Bundle(Predictor):
    """A bundle's model.onnx, ready to be used; several threads may use it at once.

    Args:
        path: The folder.
        threads: That one batch is computed with; by default as many as this process may use cores.

    Raises:
        UserError: A file is missing, damaged, or not what a bundle has.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        folder = Path(path)
        self._file = folder / MODEL
        _require_files(folder, MODEL)
        with ThreadPoolExecutor(1) as pool:  # sums are computed while the model is read
            verified = pool.submit(verify, folder, MODEL)
            try:
                self._session = _session(self._file, threads or usable_cores())
            except UserError:
                verified.result()  # if the file is damaged, that is the reason
                raise
            self.metadata: dict[str, Any] = verified.result()
        self.class_names: list[str] = self.metadata["class_names"]
        self.image_size: int = self.metadata["image_size"]
        self.resize: images.Resize = self.metadata["resize"]
        self.temperature: float = self.metadata["temperature"]
        _require_fit(self._session, self._file, self.metadata)

    def probabilities(self, image: images.Pixels) -> npt.NDArray[np.float32]:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""
        try:
            found: npt.NDArray[np.float32] = self._session.run(None, {"image": image})[0]
        except Exception as error:  # ONNX Runtime's own kinds, which have no common one
            raise UserError(f"{self._file} fails on a picture: {_line(error)}") from error
        if found.shape != (len(image), len(self.class_names)):
            raise UserError(f"{self._file} answers {len(image)} pictures with an array of the shape {found.shape}.")
        return found


def preprocess(metadata: dict[str, Any]) -> dict[str, Any]:
    """What model.onnx says of its pictures, under the key `preprocess`."""
    return {"image_size": metadata["image_size"], "resize": metadata["resize"], "layout": LAYOUT}


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json, then SHA256SUMS of all files that are there."""
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    # a path that is no text becomes an escape of JSON
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    names = [name for name in PARTS if (folder / name).exists()]
    lines = [f"{_sum(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def verify(folder: Path, needed: str) -> dict[str, Any]:
    """Compares all files that are there with SHA256SUMS, and reads config.json.

    Args:
        folder: The bundle.
        needed: The file that must be there besides; others may have been left out.

    Raises:
        UserError: One is missing or damaged, or config.json is not a bundle's.
    """
    _require_files(folder, needed)
    try:
        sums = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        listed = {line[66:]: line[:64] for line in sums if re.fullmatch(r"[0-9a-f]{64}  [\w.]+", line)}
        if len(listed) != len(sums) or not {CONFIG, needed} <= set(listed):
            raise UserError(f"{folder / SUMS} is damaged; {ANEW}.")
        there = [name for name in listed if (folder / name).is_file()]
        with ThreadPoolExecutor(max(1, len(there))) as pool:
            found = dict(zip(there, pool.map(_sum, [folder / name for name in there]), strict=True))
        if damaged := [name for name in there if found[name] != listed[name]]:
            raise UserError(f"{folder / damaged[0]} is damaged: its content is not what {SUMS} says; {ANEW}.")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {error.filename or folder}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} or {SUMS} is not text in the format of a bundle; {ANEW}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not the configuration of a bundle; {ANEW}.")
    if fault := expected.fault(config, expected.EXPECTED | expected.OF_BUNDLES):
        raise UserError(f"{folder / CONFIG} is not the configuration of a bundle: {fault}.")
    return config


def require_calibrated(folder: Path, metadata: dict[str, Any]) -> None:
    """Checks that a temperature is built in.

    Raises:
        UserError: None was known when the bundle was made.
    """
    if not metadata["calibrated"]:
        raise UserError(
            f"{folder} was made before a temperature was known; run python -m project.cli report on its run, then "
            "export again."
        )


def _require_files(folder: Path, needed: str) -> None:
    for name in (SUMS, CONFIG, needed):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; copy the whole bundle, or {ANEW}.")


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
    options.log_severity_level = 4  # what goes wrong is raised
    # threads that wait in a loop take the cores from those that read pictures, and from other processes
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # weights in other files would be read from this folder, which is none: all of a bundle's are in model.onnx
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.absolute()))
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own kinds, which have no common one
        raise UserError(f"{file} cannot be used: {_line(error)}") from error


def _require_fit(session: Any, file: Path, config: dict[str, Any]) -> None:
    """Checks that a model takes and gives what config.json says."""
    size, count = config["image_size"], len(config["class_names"])
    takes = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    gives = [(node.type, node.shape[1:]) for node in session.get_outputs()]
    if takes != [("image", "tensor(uint8)", [size, size, 3])] or gives != [("tensor(float)", [count])]:
        raise UserError(
            f"{file} does not map pictures of {size} pixels to {count} probabilities, as {CONFIG} beside it says."
        )
    batch = session.get_inputs()[0].shape[0]
    if isinstance(batch, int):
        raise UserError(f"{file} takes batches of {batch} only; {ANEW}.")
    said = session.get_modelmeta().custom_metadata_map
    for key, value in {"preprocess": preprocess(config), "class_names": config["class_names"]}.items():
        try:
            agrees = json.loads(said.get(key, "null")) == value
        except (ValueError, RecursionError):
            agrees = False
        if not agrees:
            raise UserError(f"{file} and {CONFIG} beside it do not say the same of {key}; {ANEW}.")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return (text if len(text) <= 300 else f"{text[:300]}…") + "."
