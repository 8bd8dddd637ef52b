"""Where a network's weights start: random, published ones, or a file; nothing is ever unpickled."""

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


class Weights(NamedTuple):
    """What a source holds.

    Attributes:
        tensors: By name, as the source calls them.
        source: Its name, for messages.
        mean: Of the pixels they were trained on, a channel each, on the scale of 0 to 1; None where that is unknown.
        std: Likewise, the standard deviation.
        class_names: What its classes are called, where that is known.
        model: The network they are of, where that is known.
    """

    tensors: Mapping[str, Tensor]
    source: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    model: str | None = None


def start(name: str, class_names: Sequence[str], weights: str) -> tuple[nn.Sequential, str]:
    """Makes a network that starts from weights; its head is new where the weights are of other classes.

    Args:
        name: Of the network.
        class_names: K names.
        weights: `none`, `DEFAULT` or another name of published ones, or a file: a checkpoint of this project (or its
            run's folder), a state dict or safetensors (or the folder of a bundle).

    Returns:
        Normalize ► network, and a sentence on what was taken; empty for `none`.

    Raises:
        UserError: There are no such weights, they cannot be had, or they are another network's.
    """
    if weights == "none":
        return models.build(name, len(class_names)), ""
    file = Path(weights)
    if file.is_dir():  # a bundle's or a run's
        bundled = file / "model.safetensors"
        file = bundled if bundled.is_file() else file / "checkpoints" / "best.ckpt"
    given = from_file(file) if file.suffix in FILES or file.is_file() else published(name, weights)
    if given.model not in (None, name):
        raise UserError(
            f"{given.source} holds the weights of {given.model}, not of {name}; give --model.name {given.model}."
        )
    network = models.build(name, len(class_names), given.mean, given.std)
    return network, put(network[1], name, given, class_names)


def put(network: nn.Module, name: str, given: Weights, class_names: Sequence[str]) -> str:
    """Loads all weights, those of the head only if they are of the same classes, and says which."""
    own, renamed = network.state_dict(), _renamed(given.tensors, network)
    tensors = renamed
    head = models.head(network)[0]
    of_head = {key for key in own if key.startswith(f"{head}.")}
    # further heads (side outputs, those of distilled networks): what differs in the number of classes alone
    of_head |= {
        key
        for key, tensor in own.items()
        if key in tensors and tensor.shape != tensors[key].shape and tensor.shape[1:] == tensors[key].shape[1:]
        if len(tensor) == len(class_names)
    }
    other = given.class_names is not None and list(given.class_names) != list(class_names)
    if other or any(key not in tensors or tensors[key].shape != own[key].shape for key in of_head):
        tensors = {key: tensor for key, tensor in tensors.items() if key not in of_head}
        rows = next((len(tensor) for key, tensor in renamed.items() if key in of_head), 0)
        theirs = _some(given.class_names) if given.class_names else f"{rows} classes"
        note = f"weights: {given.source}; the head is new: the weights have {theirs}, the data {_some(class_names)}"
    else:
        note, of_head = f"weights: {given.source}, head included", set()
    missing = [key for key in own if key not in tensors and key not in of_head and "num_batches_tracked" not in key]
    strange = [key for key in tensors if key not in own and "aux" not in key.lower()]  # side outputs: see build
    unequal = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if missing or strange or unequal:
        faults = (("it lacks", missing), ("it has besides", strange), ("other shapes", unequal))
        raise UserError(
            f"{given.source} does not fit {name}: "
            + "; ".join(f"{what} {_some(keys)}" for what, keys in faults if keys)
            + ". Give the network that the weights are of by --model.name."
        )
    state = OrderedDict((key, tensor) for key, tensor in tensors.items() if key in own)
    # the layers' versions, by which some networks know how to read older weights
    versions = own if next(iter(own)) not in given.tensors else given.tensors
    vars(state)["_metadata"] = getattr(versions, "_metadata", vars(own)["_metadata"])
    network.load_state_dict(state, strict=False)
    return note


def published(name: str, choice: str) -> Weights:
    """Weights that a library's authors have trained, from its cache folder or the network.

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
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # urllib's errors are of this kind
        raise UserError(
            f"Cannot download the weights {entry.name} of {name} ({getattr(error, 'reason', error)}); "
            f"without a connection, put {place.name} into {place.parent}."
        ) from error
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        raise UserError(f"{place} is damaged; remove it, and it is downloaded again.") from error
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
        own = tagged.removeprefix(models.TIMM)
        raise UserError(
            f"Cannot get the weights of {own} ({type(error).__name__}); without a connection, download its "
            "model.safetensors elsewhere and give that file by --model.weights."
        ) from error
    config: Any = network.pretrained_cfg
    return Weights(network.state_dict(), tagged, list(config["mean"]), list(config["std"]))


def from_file(file: Path) -> Weights:
    """A checkpoint of this project, a state dict of any, or safetensors.

    Raises:
        UserError: It is not there, damaged, or holds something else.
    """
    if not file.is_file():
        raise UserError(f"There are no weights {file}; give a file, or DEFAULT.")
    keys = ("mean", "std", "class_names", "model")
    if file.suffix == ".safetensors":
        known = _described(file.with_name("config.json"), keys)
        return Weights(_safetensors(file), str(file), *(known.get(key) for key in keys))
    content = read(file)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    known = metadata if isinstance(metadata, dict) else {}
    while isinstance(content, dict) and (inner := next((k for k in ("state_dict", "model") if k in content), None)):
        content = content[inner]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{file} holds no weights by name; give a checkpoint, a state dict or safetensors.")
    return Weights(content, str(file), *(known.get(key) for key in keys))


def read(file: Path) -> Any:
    """What torch.save has written; tensors stay on disk until they are used.

    Raises:
        UserError: It cannot be read, is damaged, or holds code.
    """
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped and not is_whole(file):
            raise ValueError("its content does not fit its checksums")
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
    """Whether a file of torch.save, a zip archive, is as it was written: PyTorch itself does not look at its checksums.

    Takes 0.2 s a GB.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            has_checksums = any(record.CRC for record in archive.infolist())  # torch.save can be told to write none
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


def _described(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What a bundle's config.json says of the weights beside it; nothing where the file is another's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and set(keys) <= set(content) else {}


def _renamed(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Without what wrappers put before the names (module., network.1.), and DenseNet's old names made new."""
    first = next(iter(network.state_dict()))
    wrapped = [key[: -len(first)] for key in tensors if key.endswith(f".{first}")]
    before = "" if first in tensors else min(wrapped, key=len, default="")
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
    return {old.sub(r"\1", key.removeprefix(before)): tensor for key, tensor in tensors.items()}


def _some(names: Sequence[str], count: int = 4) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more:,} more" if more > 0 else "")
