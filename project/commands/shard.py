"""Packs a data set into a few large files: python -m project.cli shard photos shards/photos."""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image

from project import files
from project.data import images, manifest, shards
from project.data.folders import Layout
from project.data.manifest import Manifest
from project.data.paths import Paths
from project.data.splits import SPLITS
from project.data.workers import usable_cores
from project.errors import UserError, command, some

MOST_IMAGES, MOST_BYTES = 1_000, 64 * 1024**2  # of a file, the second as they were before
QUALITY = 90  # of a JPEG
UNFINISHED = "unfinished.json"  # what is being written


def shard(
    root: str,
    out: str,
    /,
    short_side: PositiveInt = 256,
    keep: bool = False,
    split: str | None = None,
    split_seed: int = 0,
    group: str | None = None,
    exclude: str | None = None,
    layout: Layout | None = None,
) -> None:
    """Packs a data set into a folder of a few large files, in the format of LitData, which fit reads as --data.root.

    The folder has the split inside, so that one may be copied to other machines, or to object storage: --data.root
    s3://bucket/prefix. A command that was killed goes on when it is given again.

    Args:
        root: The images: a folder or a table, as fit takes them.
        out: The folder of the shards; must not exist.
        short_side: Images are shrunk to this short side, in pixels, and stored as JPEG; smaller ones stay as they are.
        keep: Store the images as they are.
        split: A run's split.csv, as fit --data.split takes it.
        split_seed: Seed of the split, as fit --data.split_seed takes it.
        group: Pattern of what must stay in one split, as fit --data.group takes it.
        exclude: Table of images to leave out, as fit --data.exclude takes it.
        layout: Whether the folders in root are splits or classes, as fit --data.layout takes it.
    """
    from rich.console import Console
    from rich.progress import track

    try:
        from litdata.streaming import Cache
    except ImportError as error:
        raise UserError("shard needs the library litdata; install it: pip install -e .[stream]") from error
    if shards.is_remote(out):
        raise UserError(f"shard writes a folder, not {out}; give one, and copy it there: aws s3 cp --recursive.")
    root_, split_, exclude_ = shards.local(root), Path(split) if split else None, Path(exclude) if exclude else None
    data = manifest.load(root_, split_, split_seed, group=group, exclude=exclude_, layout=layout)
    if outside := [path for path in data.paths if path.startswith(("/", "../"))]:
        raise UserError(f"{root} must have relative paths, below its folder, not {some(outside, 3)}; change them.")
    for notice in data.notices:  # which fit has no more
        print(notice)
    folder, side, parts = Path(out), None if keep else int(short_side), list(_parts(data))
    _begin(folder, data, {"short_side": side, "parts": list(map(len, parts))})
    with ThreadPoolExecutor(usable_cores()) as pool:
        for number, rows in track(list(enumerate(parts)), "shard", console=Console(stderr=True), transient=True):
            if not (done := folder / f"part-{number}.json").exists():
                with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
                    encoded = pool.map(partial(_encoded, side), [data.root / data.paths[row] for row in rows])
                    part = _write(Cache(name, chunk_size=len(rows)), Path(name), data, rows, encoded)
                    if part["sizes"]:
                        Path(name, shards.chunk(0)).replace(folder / shards.chunk(number))
                    files.write_json(done, part)
    _finish(folder, data, parts)


def _parts(data: Manifest) -> Iterator[list[int]]:
    """The rows of each file, in order."""
    rows, total = list[int](), 0
    for row in np.argsort(Paths.of(data.paths).encoded, kind="stable").tolist():  # as they are looked up
        file = data.root / data.paths[row]
        size = file.stat().st_size if file.exists() else 0
        if rows and (len(rows) == MOST_IMAGES or total + size > MOST_BYTES):
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += size
    yield rows


def _begin(folder: Path, data: Manifest, options: dict[str, Any]) -> None:
    """Makes the folder, or finds it as an interrupted command with the same options and images left it."""
    columns = (Paths.of(data.paths).encoded, data.labels, data.splits, np.array(data.class_names))
    digest = hashlib.sha256(b"\0".join(column.tobytes() for column in columns)).hexdigest()
    about, unfinished = options | {"images": digest}, folder / UNFINISHED
    if not folder.exists():
        try:
            files.write_json(unfinished, about)
        except OSError as error:
            raise UserError(f"Cannot write into {folder}: {error.strerror}; give another folder.") from error
    elif not unfinished.exists():
        raise UserError(f"{folder} exists; give another folder, or remove it.")
    elif json.loads(unfinished.read_text(encoding="utf-8")) != about:
        raise UserError(f"{folder} was begun with other options or images; remove it, or give another folder.")


def _write(cache: Any, folder: Path, data: Manifest, rows: list[int], encoded: Iterable[bytes | str]) -> dict[str, Any]:
    """Writes one file of images by LitData; returns its index, and where each image lies in it."""
    found = dict(zip(rows, encoded, strict=True))
    left_out = {data.paths[row]: reason for row, reason in found.items() if isinstance(reason, str)}
    contents = {row: content for row, content in found.items() if isinstance(content, bytes)}
    places: dict[str, Any] = {"rows": list(contents), "sizes": list(map(len, contents.values())), "left_out": left_out}
    if not contents:
        return places | {"index": {"chunks": []}, "offsets": [], "bytes": 0, "digest": ""}
    for number, (row, content) in enumerate(contents.items()):
        label = int(data.labels[row])
        cache[number] = {
            "image": content,
            "label": label,
            "class": data.class_names[label],
            "split": SPLITS[data.splits[row]],
            "path": os.fsencode(data.paths[row]).decode(errors="replace"),
        }
    cache.done()
    cache.merge()
    written, offsets, end = (folder / shards.chunk(0)).read_bytes(), list[int](), 0
    for content in contents.values():  # in order, wherever the format has put them
        offsets.append(written.index(content, end))
        end = offsets[-1] + len(content)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(written).hexdigest()
    return places | {"index": index, "offsets": offsets, "bytes": len(written), "digest": digest}


def _encoded(short_side: int | None, file: Path) -> bytes | str:
    """An image's file, or where its short side is longer than that, a smaller JPEG; the reason if it is unreadable."""
    try:
        if short_side is not None:
            with images.opened(file) as image:
                images.upright(image)
                scale = short_side / min(image.size)
                if scale < 1:
                    small, content = images.to_8_bits(image), io.BytesIO()
                    width, height = (max(1, round(side * scale)) for side in image.size)
                    small.resize((width, height), Image.Resampling.LANCZOS).save(content, "JPEG", quality=QUALITY)
                    return content.getvalue()
        return shards.read(str(file))
    except images.ImageError as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)


def _finish(folder: Path, data: Manifest, parts: list[list[int]]) -> None:
    """Writes the lists of all images and files, and prints what there is."""
    done = [json.loads((folder / f"part-{number}.json").read_text(encoding="utf-8")) for number in range(len(parts))]
    rows, offsets, sizes = ([value for part in done for value in part[name]] for name in ("rows", "offsets", "sizes"))
    numbers, chunks = np.repeat(np.arange(len(done)), [len(part["rows"]) for part in done]), [p["bytes"] for p in done]
    encoded, groups = Paths.of(data.paths).encoded, Paths.of(data.groups or [""] * len(data.paths)).encoded
    columns: list[Any] = [encoded[rows], data.labels[rows], data.splits[rows], groups[rows], numbers, offsets, sizes]
    table = np.rec.fromarrays(columns, dtype=shards.dtype(encoded.itemsize, groups.itemsize))
    named = [(entry, shards.chunk(number)) for number, part in enumerate(done) for entry in part["index"]["chunks"]]
    entries = [entry | {"filename": name} for entry, name in named]
    config: dict[str, Any] = next((part["index"]["config"] for part in done if part["rows"]), {})
    with files.replacing(folder / shards.ROWS, "wb") as stream:
        np.save(stream, table)
    files.write_json(folder / "index.json", {"chunks": entries, "config": config})
    about = {"class_names": data.class_names, "chunks": chunks, "rows": (folder / shards.ROWS).stat().st_size}
    digest = hashlib.sha256("".join(part["digest"] for part in done).encode()).hexdigest()  # tells others of equal size
    files.write_json(folder / shards.ABOUT, about | {"digest": digest})
    for file in [folder / UNFINISHED, *folder.glob("part-*.json")]:
        file.unlink()
    for unfinished in folder.glob(".part-*"):  # of a command that was killed
        shutil.rmtree(unfinished)
    if left_out := {path: reason for part in done for path, reason in part["left_out"].items()}:
        print(f"left out, unreadable: {some([f'{path} ({reason})' for path, reason in left_out.items()], 3)}")
    count = f"{len(entries):,} file{'s' * (len(entries) != 1)}"
    print(f"written: {folder}, {len(table):,} images in {count}, {sum(chunks) / 1e6:,.1f} MB")
    print(f"next: {command('fit', folder)}")
