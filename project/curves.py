"""metrics.csv: what a fit logged, read and written; curves of it."""

import csv
from pathlib import Path
from typing import Any

from project import files

METRICS = "metrics.csv"
Curve = tuple[list[float], list[float]]  # epochs and values


def read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a metrics.csv; one that was cut off while it was written is left out."""
    text = file.read_text(encoding="utf-8")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def write(file: Path, columns: list[str], rows: list[Any]) -> None:
    """Writes a metrics.csv, whole or not at all."""
    with files.replacing(file) as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def curves(file: Path) -> dict[str, Curve]:
    """Each logged figure over the epochs: for the name of a figure, epochs (the first is 1) and values."""
    found: dict[str, Curve] = {}
    for row in read(file)[1]:
        for name, value in row.items():
            if name.startswith(("train/", "val/")) and not name.endswith("_step") and value:
                epochs, values = found.setdefault(name, ([], []))
                epochs.append(float(row["epoch"]) + 1)
                values.append(float(value))
    return found
