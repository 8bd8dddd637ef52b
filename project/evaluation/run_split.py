"""The images of a run's splits, as its split.csv lists them."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from project.data import manifest, shards
from project.data.splits import Row
from project.errors import UserError, some
from project.inference.metadata import Metadata

FILE = "split.csv"


class SplitImages(NamedTuple):
    """The images of one split."""

    pairs: list[tuple[str, str]]  # path and class of each image
    root: str  # the data set's folder or table
    notice: str  # a caveat for the user; empty if there is none


def images(run: Path, split: str, metadata: Metadata, data: str | None) -> SplitImages:
    """Finds the images of one split, by the run's split.csv, or by splitting the data again with the run's options.

    `data` is the data set's folder or table, by default the run's; UserError where it cannot be read, or has classes
    that the network does not have.
    """
    options, notice = metadata.config["data"], ""
    location = data or options.get("root") or ""
    root = shards.local(location)
    try:
        exists = bool(location) and root.exists()
    except OSError as error:
        raise UserError(f"Cannot read {root}: {error.strerror}; give the images' folder by --data.") from error
    if listed := rows(run):
        pairs = [(row.path, row.label) for row in listed if row.split == split]
    elif exists and "class_path" not in options:
        names = ("group", "folds", "fold", "layout", "keep")
        query: dict[str, Any] = {name: options[name] for name in names if name in options}
        query |= {name: Path(options[name]) for name in ("split", "exclude") if options.get(name)}
        data_set = manifest.load(root, seed=options.get("split_seed") or 0, **query)
        indices = data_set.rows(split).tolist()
        pairs = [(data_set.paths[index], data_set.class_names[data_set.labels[index]]) for index in indices]
        if not data_set.is_stored:
            notice = (
                f"There is no {FILE} in {run}: the data was split again with the options of the training. If files "
                f"were added or removed since, the network may have been trained on some of these {split} images."
            )
    else:
        pairs = []
    if unknown := sorted({label for _, label in pairs} - set(metadata.class_names)):
        raise UserError(
            f"The images of {location} have classes that the network does not have ({some(unknown)}); give "
            f"a folder with its classes by --data: {some(metadata.class_names)}."
        )
    folder = manifest.folder_of(root)
    return SplitImages([(str(folder / path), label) for path, label in pairs], location or "no known folder", notice)


def rows(run: Path) -> list[Row]:
    """The rows of a run's split.csv, or else of its shards; none where both are missing."""
    if (file := run / FILE).is_file():
        return manifest.read_rows(file, is_split_file=True)
    root = shards_of(run)
    return list(manifest.rows_of_shards(root)) if root else []


def shards_of(run: Path) -> Path | None:
    """The folder of shards that a run without a split.csv has the split of, if it is there or cached."""
    if not (file := run / "config.yaml").is_file():
        return None
    root = shards.place((yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}).get("root") or "")
    return root if shards.is_shards(root) and not shards.are_other(run, root) else None
