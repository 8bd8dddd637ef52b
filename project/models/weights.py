"""The weights that a network starts with: random, published or from a file; no code in a file is ever executed."""

import copy
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from project import models
from project.errors import UserError, did_you_mean

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
DESCRIPTION = ("mean", "std", "class_names", "model")  # keys of a checkpoint's metadata, in the order of Weights


class Weights(NamedTuple):
    """Tensors with what is known about them.

    Attributes:
        tensors: By name, as their source has them.
        source: Its name, for messages.
        mean: Of the pixels they were trained on, a channel each, on the scale of 0 to 1; None if unknown.
        std: Their standard deviation.
        class_names: The classes, if known.
        model: The name of the network, if known.
    """

    tensors: Mapping[str, Tensor]
    source: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    model: str | None = None


def start(name: str, class_names: Sequence[str], weights: str) -> tuple[nn.Sequential, str]:
    """Creates a network with weights; if these are of other classes, its head is re-initialised.

    Args:
        name: Of the network.
        class_names: K names.
        weights: `none`, `DEFAULT` or another name of published ones, or a file: a checkpoint of this project (or its
            run's folder), a state dict or safetensors (or the folder of a bundle).

    Returns:
        Normalize ► network, and a sentence on what was loaded; empty for `none`.

    Raises:
        UserError: The weights do not exist, cannot be downloaded, or are another network's.
    """
    if weights == "none":
        return models.build(name, len(class_names)), ""
    file = Path(weights)
    if file.is_dir():  # a bundle's or a run's
        bundled = file / "model.safetensors"
        file = bundled if bundled.is_file() else file / "checkpoints" / "best.ckpt"
    loaded = from_file(file) if file.suffix in FILES or file.is_file() else published(name, weights)
    if loaded.model not in (None, name):
        raise UserError(
            f"{loaded.source} holds the weights of {loaded.model}, not of {name}; give --model.name {loaded.model}."
        )
    network = models.build(name, len(class_names), loaded.mean, loaded.std)
    return network, _load(network[1], name, loaded, class_names)


def _load(network: nn.Module, name: str, weights: Weights, class_names: Sequence[str]) -> str:
    """Loads all weights, those of the head only if they are of the same classes; returns a sentence about that."""
    own, tensors = network.state_dict(), _renamed(weights.tensors, network)

    def same_shape(key: str, start: int = 0) -> bool:
        return bool(tensors[key].shape[start:] == own[key].shape[start:])

    head = models.head(network)[0]
    # further heads (side outputs, those of distilled networks) differ in the number of classes alone
    of_head = {
        key
        for key in own
        if key.startswith(f"{head}.")
        or (key in tensors and not same_shape(key) and same_shape(key, 1) and len(own[key]) == len(class_names))
    }
    other_classes = weights.class_names is not None and list(weights.class_names) != list(class_names)
    if other_classes or any(key not in tensors or not same_shape(key) for key in of_head):
        rows = next((len(tensor) for key, tensor in tensors.items() if key in of_head), 0)
        theirs = _shortened(weights.class_names) if weights.class_names else f"{rows} classes"
        note = f"; the head is new: the weights have {theirs}, the data {_shortened(class_names)}"
        tensors = {key: tensor for key, tensor in tensors.items() if key not in of_head}
    else:
        note, of_head = ", head included", set()
    faults = {
        "it lacks": [key for key in own if key not in {*tensors, *of_head} and "num_batches_tracked" not in key],
        "it has besides": [key for key in tensors if key not in own and "aux" not in key.lower()],  # see models.build
        "other shapes": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in tensors and not same_shape(key)
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault} {_shortened(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(
            f"{weights.source} does not fit {name}: {listed}. Give the network that the weights are of by --model.name."
        )
    # a copy keeps the layers' versions, by which some networks convert older weights
    has_versions = isinstance(weights.tensors, OrderedDict) and next(iter(own)) in weights.tensors
    state: Any = copy.copy(weights.tensors if has_versions else own)
    state.clear()
    state.update((key, tensor) for key, tensor in tensors.items() if key in own)
    network.load_state_dict(state, strict=False)
    return f"weights: {weights.source}{note}"


def published(name: str, choice: str) -> Weights:
    """Weights that torchvision's or timm's authors have trained, from the library's cache or downloaded.

    Raises:
        UserError: There are none of that name, or they cannot be downloaded.
    """
    if name.startswith(models.TIMM):
        return _of_timm(name, choice)
    from torchvision.models import get_model_weights

    if name not in (names := models.torchvision_names()):
        raise UserError(f"There are no published weights of {name}.{did_you_mean(name, names)}")
    known = get_model_weights(name)
    if choice != "DEFAULT" and choice not in known.__members__:
        raise UserError(
            f"There are no weights {choice} of {name}; --model.weights takes none, DEFAULT, "
            f"{', '.join(entry.name for entry in known)} or a file ({', '.join(FILES)})."
        )
    entry = known[choice] if choice in known.__members__ else known.DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # urllib's errors are of this kind
        raise UserError(
            f"Cannot download the weights {entry.name} of {name} ({getattr(error, 'reason', error)}); "
            f"without a connection, put {cached.name} into {cached.parent}."
        ) from error
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        raise UserError(f"{cached} is damaged; remove it, and it is downloaded again.") from error
    source = f"{name} {entry.name}"
    if name in ("googlenet", "inception_v3"):  # trained on pixels from -1 to 1, as networks from scratch are here
        return Weights(tensors, source)
    preset = entry.transforms()
    return Weights(tensors, source, list(preset.mean), list(preset.std))


def _of_timm(name: str, choice: str) -> Weights:
    tagged = name if choice == "DEFAULT" else f"{name}.{choice}"
    try:
        network = models.timm_network(tagged, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # the hub's client has many kinds, some of them its own
        raise UserError(
            f"Cannot get the weights of {tagged.removeprefix(models.TIMM)} ({type(error).__name__}); without a "
            "connection, download its model.safetensors elsewhere and give that file by --model.weights."
        ) from error
    config: Any = network.pretrained_cfg
    return Weights(network.state_dict(), tagged, list(config["mean"]), list(config["std"]))


def from_file(file: Path) -> Weights:
    """Reads a checkpoint of this project, any state dict, or safetensors.

    Raises:
        UserError: The file is missing, damaged, or holds something else.
    """
    if not file.is_file():
        raise UserError(f"There are no weights {file}; give a file, or DEFAULT.")
    content: Any
    if file.suffix == ".safetensors":
        content, known = _safetensors(file), _bundle_config(file.with_name("config.json"))
    else:
        content = read(file)
        metadata = content.get("metadata") if isinstance(content, dict) else None
        known = metadata if isinstance(metadata, dict) else {}
        while isinstance(content, dict) and (inner := next((k for k in ("state_dict", "model") if k in content), None)):
            content = content[inner]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{file} holds no weights by name; give a checkpoint, a state dict or safetensors.")
    return Weights(content, str(file), *(known.get(key) for key in DESCRIPTION))


def read(file: Path) -> Any:
    """Reads a file of torch.save without executing code; tensors stay on disk until they are used.

    Raises:
        UserError: The file cannot be read, is damaged, or holds code.
    """
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped and not is_whole(file):
            raise ValueError("a checksum is wrong")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is no checkpoint, or holds code, which is never run; give the best.ckpt or last.ckpt of a run."
        ) from error
    except Exception as error:  # bytes from anywhere make the zip reader and the unpickler raise anything
        raise UserError(f"{file} is damaged or no checkpoint; give a best.ckpt or last.ckpt of a run.") from error


def is_whole(file: Path) -> bool:
    """Whether the checksums of a file of torch.save, a zip archive, are right, which PyTorch itself does not check.

    Takes 0.2 s a GB.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            has_checksums = any(record.CRC for record in archive.infolist())  # torch.save can leave them out
            return not has_checksums or archive.testzip() is None
    except OSError:
        raise
    except Exception:  # a damaged archive makes the zip reader raise anything
        return False


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{file} needs the library safetensors; install it: pip install -e .[export]") from error
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # its own kind of error, which the package does not export in every version
        raise UserError(f"{file} is damaged or not in the safetensors format.") from error
    return tensors


def _bundle_config(file: Path) -> dict[str, Any]:
    """The config.json of a bundle; empty if there is none, or another program's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and set(DESCRIPTION) <= set(content) else {}


def _renamed(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Removes prefixes of wrappers (module., network.1.) and replaces DenseNet's old names."""
    first = next(iter(network.state_dict()))
    prefixes = [key[: -len(first)] for key in tensors if key.endswith(f".{first}")]
    prefix = "" if first in tensors else min(prefixes, key=len, default="")
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
    return {old.sub(r"\1", key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
