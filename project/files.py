"""Files that appear whole or not at all, whenever the process is killed."""

import csv
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from project.errors import UserError


def beside(file: Path) -> Path:
    """A new hidden name for the unfinished `file`, in its folder: a rename is atomic only within one file system."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def replacing(file: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """Opens a file that replaces `file` when the block ends without an error; text is UTF-8, line ends are as given."""
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""} if mode == "w" else {}
    unfinished = beside(file)
    try:
        with unfinished.open(mode, **text) as stream:
            yield stream
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file; objects are written as their attributes by name, NaN and infinity as null."""
    plain = json.loads(json.dumps(content, default=vars), parse_constant=lambda _: None)  # JSON has no NaN
    text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    with replacing(file, "wb") as stream:  # what UTF-8 cannot encode in a path becomes an escape of JSON
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_csv(file: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes a CSV file."""
    with replacing(file) as stream:
        csv.writer(stream).writerows(rows)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder for files that is renamed to `folder` when the block ends without an error."""
    unfinished = beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unused(file: Path) -> Path:
    """The file or folder if there is none yet, else the first of NAME-2, NAME-3 … that is free."""
    numbered = (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([file], numbered) if not os.path.lexists(path))


def with_home(word: str) -> str:
    """A path, alone or after the name of an option, with the home folder for a leading ~ where no shell has put it."""
    return re.sub(r"^(--?[\w.-]+=)?~(?=/|$)", lambda match: (match[1] or "") + os.path.expanduser("~"), word)  # noqa: PTH111


def shipped(config: str) -> str:
    """The path of a configuration; configs/NAME.yaml also means the package's own, where there is no such file."""
    if not re.fullmatch(r"configs/[\w-]+\.yaml", config) or os.path.lexists(config):
        return config
    package = Path(__file__).parent  # configs/ lies in an installed package, and beside a checkout's
    found = (folder / config for folder in (package, package.parent))
    return next((str(file) for file in found if file.is_file()), config)


def is_table(name: str) -> bool:
    """Whether a file's name says that it is a table of images."""
    return name.lower().endswith((".csv", ".parquet"))


def require_new(file: Path, option: str, overwrite: bool | None = None) -> None:
    """Raises UserError where an output exists or cannot be created; `overwrite` is None where no option allows that."""
    folder = file.absolute().parent
    if not os.access(f"{folder}/.", os.W_OK):  # with the dot, a file is no folder
        raise UserError(f"Cannot write --{option} {file}: {folder} is no folder, or not writable; give another path.")
    try:
        file.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"Cannot write --{option} {file}: {error.strerror}; give another path.") from error
    if not (overwrite and file.is_file()):
        way_out = "add --overwrite" if overwrite is False else "remove it"
        raise UserError(f"{file} exists; give another path by --{option}, or {way_out}.")
