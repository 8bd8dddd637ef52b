"""The weights that a network starts with: random, published or from a file; no code in a file is ever executed."""

import contextlib
import copy
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from filelock import FileLock
from torch import Tensor, nn

from project import models
from project.errors import UserError, some

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
DESCRIPTION = ("mean", "std", "class_names", "model", "resize")  # keys of a checkpoint's metadata, as in Weights
OPTIONAL = re.compile("aux|Aux|num_batches_tracked")  # models.build makes no side outputs; a count is not a weight


class Weights(NamedTuple):
    """Tensors by name, their source for messages, and what is known about them."""

    tensors: Mapping[str, Tensor]
    source: str
    mean: Sequence[float] | None = None  # of the pixels, a channel each, on the scale of 0 to 1
    std: Sequence[float] | None = None
    class_names: Sequence[str] | None = None
    model: str | None = None  # name of the network
    resize: str | None = None  # as `images.read` takes it


def start(
    name: str, class_names: Sequence[str], weights: str, part: Mapping[str, Any] | None = None
) -> tuple[nn.Sequential, str, bool]:
    """Creates a network with weights; if these are of other classes, its head is re-initialised.

    `weights` are `none`, `DEFAULT` or another name of published ones, or a file: a checkpoint of this project (or its
    run's folder), a state dict or safetensors (or the folder of a bundle). `part` is the class path and the arguments
    of a network that has no short name.

    Returns Normalize ► network, a sentence on what was loaded (empty for `none`), and whether its head is a new one
    above layers that are not. UserError where the weights do not exist, cannot be downloaded, or are another network's.
    """
    if weights == "none":
        return models.build(name, len(class_names), part=part), "", False
    if not (file := _file(weights)) and part:
        raise UserError(f"--model.weights {weights}: {name} has no published weights; give a file.")
    loaded = from_file(file) if file else published(name, weights)
    if loaded.model not in (None, name):
        raise UserError(
            f"{loaded.source} holds the weights of {loaded.model}, not of {name}; give that by --model.name or "
            "--model.network."
        )
    scale = ""
    if loaded.mean is None and "mean" in (known := _described(name)):
        loaded = loaded._replace(**known)
        scale = f"; it does not say how pixels are normalised, so as for the published weights of {name}"
    network = models.build(name, len(class_names), loaded.mean, loaded.std, loaded.source if loaded.model else "", part)
    head = _load(network[1], name, loaded, class_names)
    return network, f"weights: {loaded.source}{head or ', head included'}{scale}", bool(head)


def _file(weights: str) -> Path | None:
    """The file that --model.weights names, in the folder of a bundle or run, too; None for published weights."""
    file = Path(weights)
    if file.is_dir():
        bundled = file / "model.safetensors"
        return bundled if bundled.is_file() else file / "checkpoints" / "best.ckpt"
    return file if file.suffix in FILES or file.is_file() else None


def resize(name: str, weights: str) -> str:
    """How images are made square for weights, as `images.read` takes it; downloads nothing; UserError if not known."""
    own = from_file(file).resize if (file := _file(weights)) else None
    if not (known := own or _described(name, "DEFAULT" if file else weights).get("resize")):
        raise UserError(
            f"--model.weights {weights} of {name} has no known resize; give others, or --data.resize crop:bicubic:0.9."
        )
    return str(known)


def _described(name: str, choice: str = "DEFAULT") -> dict[str, Any]:
    """What is known of the images of published weights, if there are any: no mean and deviation for -1 to 1."""
    from torchvision.models import get_model_weights

    if name.startswith(models.TIMM):
        tagged = name.removeprefix(models.TIMM) + f".{choice}" * (choice != "DEFAULT")
        try:
            known: Any = models.import_timm().get_pretrained_cfg(tagged, allow_unregistered=False)
        except RuntimeError:  # there are none
            return {}
        way = {"squash": "stretch", "border": "pad"}.get(known.crop_mode, "crop")
        interpolation, share = known.interpolation, known.crop_pct
    elif name in models.torchvision_names() and choice in (entries := get_model_weights(name)).__members__:
        known, way = entries[choice].transforms(), "crop"
        interpolation, share = known.interpolation.value, known.crop_size[0] / known.resize_size[0]
    else:
        return {}
    pixels = {} if name in ("googlenet", "inception_v3") else {"mean": list(known.mean), "std": list(known.std)}
    return {"resize": f"{way}:{interpolation}" + f":{share:.4g}" * (share != 1), **pixels}


def _load(network: nn.Module, name: str, weights: Weights, class_names: Sequence[str]) -> str:
    """Loads all weights, those of the head only if they are of the same classes; else returns a sentence about that."""
    own, tensors = network.state_dict(), _renamed(weights.tensors, network)
    ours, theirs = ({key: tuple(tensor.shape) for key, tensor in state.items()} for state in (own, tensors))
    resized = {key for key in ours if key in theirs and theirs[key] != ours[key]}
    # further heads, as of distilled networks, differ in the number of classes alone
    heads = {key for key in resized if (len(class_names), *theirs[key][1:]) == ours[key]}
    heads |= {key for key in ours if key.startswith(f"{models.head(network)[0] or None}.")}
    note = ""
    other_classes = weights.class_names is not None and list(weights.class_names) != list(class_names)
    if other_classes or any(theirs.get(key) != ours[key] for key in heads):
        rows = max((theirs[key][0] for key in heads if key in theirs), default=0)
        classes = some(weights.class_names, 4) if weights.class_names else f"{rows} classes"
        note = f"; the head is new: the weights have {classes}, the data {some(class_names, 4)}"
        for key in heads:
            del ours[key]
            theirs.pop(key, None)
    faults = [
        f"{key} {theirs.get(key, 'nothing')} for {ours.get(key, 'nothing')}"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key) and not OPTIONAL.search(key)
    ]
    if faults:
        raise UserError(
            f"{weights.source} does not fit {name}: {some(faults, 4)}. Give the network that the weights are of by "
            "--model.name."
        )
    state = copy.copy(own)  # with the layers' versions, by which some networks convert older weights
    state.update((key, tensors[key]) for key in ours if key in theirs)
    network.load_state_dict(state)
    return note


def published(name: str, choice: str) -> Weights:
    """Published weights, from the library's cache or downloaded; UserError if there are none or they cannot be had."""
    if name.startswith(models.TIMM):
        return _of_timm(name, choice)
    from torchvision.models import get_model_weights

    if name not in models.torchvision_names():
        raise UserError(f"There are no published weights of {name}; python -m project.cli models lists all weights.")
    known = get_model_weights(name)
    if choice not in known.__members__:
        raise UserError(
            f"There are no weights {choice} of {name}; --model.weights takes none, DEFAULT, "
            f"{', '.join(entry.name for entry in known)} or a file ({', '.join(FILES)})."
        )
    entry = known[choice]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = contextlib.nullcontext() if cached.exists() else FileLock(cached.with_name(f".{cached.name}.lock"))
        with lock:  # of the processes of a machine one downloads
            tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # urllib's errors are of this kind
        raise UserError(
            f"Cannot download the weights {entry.name} of {name} ({getattr(error, 'reason', error)}); "
            f"without a connection, put {cached.name} into {cached.parent}."
        ) from error
    except Exception as error:  # bytes from anywhere make the unpickler raise anything
        raise UserError(f"{cached} is damaged; remove it, and it is downloaded again.") from error
    return Weights(tensors, f"{name} {entry.name}", **_described(name, choice))


def _of_timm(name: str, choice: str) -> Weights:
    tagged = name if choice == "DEFAULT" else f"{name}.{choice}"
    try:
        network = models.timm_network(tagged, pretrained=True)
    except OSError as error:  # the hub's errors are of this kind
        raise UserError(
            f"Cannot get the weights of {tagged.removeprefix(models.TIMM)} ({type(error).__name__}); without a "
            "connection, download its model.safetensors elsewhere and give that file by --model.weights."
        ) from error
    return Weights(network.state_dict(), tagged, **_described(name, choice))


def from_file(file: Path) -> Weights:
    """Reads a checkpoint of this project, any state dict, or safetensors; UserError where the file is none of these."""
    if not file.is_file():
        raise UserError(f"There are no weights {file}; give a file, or DEFAULT.")
    content: Any
    if file.suffix == ".safetensors":
        content, metadata = _safetensors(file), None
        with contextlib.suppress(OSError, ValueError):  # only a bundle has this file
            metadata = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
    else:
        content = read(file)
        metadata = content.get("metadata") if isinstance(content, dict) else None
        while isinstance(content, dict) and (inner := next((k for k in ("state_dict", "model") if k in content), None)):
            content = content[inner]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{file} holds no weights by name; give a checkpoint, a state dict or safetensors.")
    known = metadata if isinstance(metadata, dict) and metadata.keys() >= set(DESCRIPTION) else {}
    return Weights(content, str(file), *(known.get(key) for key in DESCRIPTION))


def read(file: Path) -> Any:
    """Reads a file of torch.save; UserError where it holds code or is damaged. Tensors stay on disk until used."""
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped and not is_whole(file):
            raise ValueError("a checksum is wrong")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from error
    except Exception as error:  # bytes from anywhere make the zip reader and the unpickler raise anything
        raise UserError(
            f"{file} is damaged, is not a checkpoint, or holds code, which is never run; give the best.ckpt of a run."
        ) from error


def is_whole(file: Path) -> bool:
    """Whether the checksums of a zip archive of torch.save are right, which PyTorch does not check; 0.2 s a GB."""
    with zipfile.ZipFile(file) as archive:
        has_checksums = any(record.CRC for record in archive.infolist())  # torch.save can leave them out
        return not has_checksums or archive.testzip() is None


def _safetensors(file: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{file} needs the library safetensors; install it: pip install -e .[export]") from error
    try:
        return load_file(file)
    except Exception as error:  # its own kind of error, which the package does not export in every version
        raise UserError(f"{file} is damaged or not in the safetensors format.") from error


def _renamed(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Removes prefixes of wrappers (module., network.1.) and replaces DenseNet's old names."""
    first = next(iter(network.state_dict()))
    prefixes = [key[: -len(first)] for key in tensors if key.endswith(f".{first}")]
    prefix = "" if first in tensors else min(prefixes, key=len, default="")
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
    return {old.sub(r"\1", key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}
