"""The images that command-line arguments mean: files, folders, patterns, CSV files, standard input."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from project import files
from project.data import folders, manifest, shards
from project.data.folders import Skipped
from project.errors import UserError, some

STREAM = "-"  # standard input


def gather(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """Collects path and true class, empty where it is unknown, of the images that the arguments mean, in their order.

    A file means itself; a folder, all images below it in order of name, without hidden ones; a pattern like
    photos/*.jpg, its matches; a CSV file, its column path, relative to the file; a dash, the lines of standard input.
    UserError where an argument is none of these, or means no image.
    """
    pairs = list[tuple[str, str]]()
    for name in arguments:
        if not (found := list(_images(name))):
            raise UserError(f"There are no images in {name}.")
        pairs += found
    return pairs


def _images(name: str) -> Iterator[tuple[str, str]]:
    if name == STREAM:
        yield from gather(line.rstrip("\r\n") for line in sys.stdin if line.strip())
    elif shards.is_shards(root := shards.local(name)):
        yield from ((str(root / row.path), row.label) for row in manifest.rows_of_shards(root))
    elif os.path.isdir(name):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        skipped = Skipped()
        paths = sorted(folders.images(name, name.rstrip("/"), skipped), key=lambda path: path.split("/"))
        yield from ((str(Path(path)), "") for path in paths)
        for kind in sorted(skipped.keys() - {folders.HIDDEN, folders.NOT_IMAGE}):
            print(f"left out, {kind}: {some(skipped[kind], 3)}", file=sys.stderr)
    elif files.is_table(name) and os.path.exists(name):  # noqa: PTH110
        for line in manifest.read_csv(Path(name), {"path"}, tidy=True):
            true = line.get("true", line.get("label", ""))  # beside true, label is a prediction
            yield os.path.normpath(Path(name).parent / line["path"]), true
    elif os.path.lexists(name) or shards.is_file(name):  # a dangling link exists, and gets its error row
        yield name, ""
    else:
        folder = next((str(folder) for folder in Path(name).parents if os.path.isdir(folder)), "")  # noqa: PTH112
        pattern = Path(glob.escape(folder), Path(name).relative_to(folder))  # a real folder's brackets are no pattern
        if not (matches := sorted(glob.glob(str(pattern), recursive=True))):  # noqa: PTH207 (keeps the path as given)
            raise UserError(f"There is no file or folder {name}, and no match for it.")
        yield from gather(matches)
