"""Sharded checkpoints: a folder in which each process of a distributed fit, such as FSDP's, has written its part.

Lightning writes meta.pt beside the tensors, with all else. Like other checkpoints they are read without running code:
of what torch.distributed.checkpoint unpickles, only its own records are allowed.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from project.errors import UserError

RECORDS, REST = ".metadata", "meta.pt"
MODEL = "model."  # the prefix of the weights' names, which Lightning adds
ALLOWED = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    metadata.__name__: {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        content: metadata.Metadata = _Unpickler(io.BytesIO(Path(self.path, RECORDS).read_bytes())).load()
        return content


def read(folder: Path) -> dict[str, Any]:
    """The content of a sharded checkpoint, its weights whole and on the CPU, without the optimizer's state.

    UserError where it holds code or is damaged.
    """
    try:
        reader = _Reader(folder)
        tensors: dict[str, Tensor] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(MODEL) and isinstance(entry, metadata.TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*intent is to load in a single process.*")
            load({**tensors}, storage_reader=reader, no_dist=True)
        content: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
        return content | {"state_dict": {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}}
    except (Exception, CheckpointException) as error:  # bytes from anywhere make these readers raise anything
        raise UserError(
            f"{folder} is damaged, is not a sharded checkpoint, or holds code, which is never run."
        ) from error
