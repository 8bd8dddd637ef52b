"""Images packed into a few large files, as `shard` writes them: in a folder, or in object storage, s3://bucket/prefix.

A path below such a folder, shards/cat/1.jpg, is an image inside, wherever a file's path can be given.
"""

import bisect
import contextlib
import errno
import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from project import files
from project.errors import FailedRun, UserError, some

ABOUT, ROWS, REMOTE = "shards.json", "rows.npy", "remote"
CACHE = Path("data/cache/s3")  # of what was read from object storage; `make clean-cache` removes it
LOCATION = re.compile(r"s3:/+([^/]+)(?:/(.*?))?/*")
ATTEMPTS = 8  # to reach the storage, over about a minute


def dtype(path: int, group: int) -> np.dtype[np.void]:
    """A row of images whose paths and groups are at most that many bytes long; offset and size are in bytes."""
    place = [("chunk", np.int32), ("offset", np.int64), ("size", np.int64)]
    return np.dtype([("path", f"S{path}"), ("label", np.int32), ("split", np.int8), ("group", f"S{group}"), *place])


def chunk(number: int) -> str:
    """The name of a file of images."""
    return f"chunk-{number}-0.bin"


def is_shards(root: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of shards."""
    return os.path.isfile(os.path.join(root, ABOUT))  # noqa: PTH113, PTH118 (once an image)


def is_remote(root: str) -> bool:
    """Whether a data set is in object storage."""
    return LOCATION.fullmatch(root) is not None


def place(root: str | os.PathLike[str]) -> Path:
    """The folder of a data set; that of one in object storage is a cache here, as the last start has left it."""
    if not (match := LOCATION.fullmatch(os.fspath(root))):
        return Path(root)
    location = "/".join(filter(None, match.groups()))
    name = location.rpartition("/")[2]
    return CACHE / quote(location, safe="") / (name if name.strip(".") else "_")  # none inside another


def local(root: str | os.PathLike[str]) -> Path:
    """The folder of a data set; that of one in object storage is a cache here, which has what every start needs.

    UserError where the storage cannot be reached, or has no shards there.
    """
    folder = place(root)
    if not (match := LOCATION.fullmatch(os.fspath(root))):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock  # a server of a bundle has none

    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as new:
        files.write_json(Path(new, REMOTE), [match[1], f"{match[2]}/" if match[2] else ""])
        _download(Path(new), ABOUT, UserError)
        if not is_shards(folder) or (folder / ABOUT).read_bytes() != Path(new, ABOUT).read_bytes():
            _download(Path(new), ROWS, UserError)
            opened(new)  # not while they are uploaded
            for file in (folder / ABOUT, *folder.glob("chunk-*")):  # of others
                file.unlink(missing_ok=True)
            for name in (ROWS, REMOTE, ABOUT):
                Path(new, name).replace(folder / name)
    return folder


def are_other(run: Path, folder: Path) -> bool:
    """Whether a run began with other shards than those in the folder now, so that its split was another."""
    ours, theirs = run / ABOUT, folder / ABOUT
    return ours.is_file() and theirs.is_file() and ours.read_bytes() != theirs.read_bytes()


def opened(folder: str | os.PathLike[str]) -> tuple[list[str], npt.NDArray[np.void]]:
    """The names of the classes and the rows (N,), by path, of a folder of shards; UserError where it is not whole."""
    return _opened(os.fspath(folder), os.stat(os.path.join(folder, ABOUT)).st_mtime_ns)  # noqa: PTH116, PTH118


@functools.lru_cache(8)
def _opened(name: str, _version: int) -> tuple[list[str], npt.NDArray[np.void]]:
    folder = Path(name)
    sizes = {ABOUT: -1}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        names, sizes = about["class_names"], {ROWS: about["rows"]}
        if not (folder / REMOTE).exists():
            sizes |= {chunk(number): size for number, size in enumerate(about["chunks"]) if size}
    needed = ((folder / name, size) for name, size in sizes.items())
    if lost := [file.name for file, size in needed if not file.exists() or file.stat().st_size != size]:
        raise UserError(f"The shards in {folder} are not whole: {some(lost, 3)}; copy them again, or write them anew.")
    with contextlib.suppress(ValueError, IndexError, TypeError):
        rows = np.load(folder / ROWS, mmap_mode="r").view(np.ndarray)  # read as it is needed, once for all processes
        if rows.dtype.names == dtype(1, 1).names and 0 <= rows["label"].min() <= rows["label"].max() < len(names):
            return names, rows
    raise UserError(f"{folder / ROWS} is damaged; copy it again, or write the shards anew.")


def status(path: str) -> os.stat_result:
    """The status of a file, or of what lists the image inside a folder of shards."""
    try:
        return os.stat(path)  # noqa: PTH116 (a Path would take as long as the call)
    except FileNotFoundError:
        return os.stat(os.path.join(_find(path)[0], ABOUT))  # noqa: PTH116, PTH118


def is_file(path: str) -> bool:
    """Whether there is such a file, or such an image in a folder of shards."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.isfile(path) or bool(_find(path))  # noqa: PTH113
    return False


def read(path: str) -> bytes:
    """The bytes of a file, or of an image inside a folder of shards; FileNotFoundError where there is neither."""
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_bytes()
    folder, row = _find(path)
    file = os.path.join(folder, chunk(row["chunk"]))  # noqa: PTH118
    if not os.path.exists(file):  # noqa: PTH110
        _fetch(Path(folder), row["chunk"])
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 (a fifth of the time of Path.open)
        stream.seek(row["offset"])
        return stream.read(row["size"])


def _find(path: str) -> tuple[str, np.void]:
    """The folder of shards that a path lies in, and its row there; FileNotFoundError where there is none."""
    folder, above = path, os.path.dirname(path)  # noqa: PTH120
    while above != folder and not is_shards(above):
        folder, above = above, os.path.dirname(above)  # noqa: PTH120
    if is_shards(above):
        rows, name = opened(above)[1], os.fsencode(path[len(above) :].lstrip("/"))
        index = bisect.bisect_left(rows["path"], name)
        if index < len(rows) and rows[index]["path"] == name:
            return above, rows[index]
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _fetch(folder: Path, number: int) -> None:
    """Downloads a file of images, unless another process does."""
    from filelock import FileLock

    file = folder / chunk(number)
    with FileLock(folder / f".{file.name}.lock"):
        if not file.exists():
            _download(folder, file.name)
            if file.stat().st_size != json.loads((folder / ABOUT).read_text(encoding="utf-8"))["chunks"][number]:
                file.unlink()
                raise FailedRun(f"Other shards have replaced those of {folder} since the start; start again.")


def _download(folder: Path, name: str, refusal: type[Exception] = FailedRun) -> None:
    """Downloads a file, whole or not at all, as boto3 does; `refusal` where it cannot be read."""
    bucket, prefix = json.loads((folder / REMOTE).read_text(encoding="utf-8"))
    try:
        _client().download_file(bucket, prefix + name, str(folder / name))
    except UserError:
        raise
    except Exception as error:  # of boto3, urllib3 or the disk
        reason = " ".join(str(error).split()).rstrip(".")
        hint = "check the address, the network, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        raise refusal(f"Cannot read s3://{bucket}/{prefix}{name}: {reason}; {hint}.") from error


@functools.cache
def _client() -> Any:
    """S3 with the usual variables, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise UserError("s3:// needs the library boto3; install it: pip install -e .[stream]") from error
    retries: Any = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    return boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=30))
