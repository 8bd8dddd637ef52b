"""The model card of a bundle: what the network is for, how good it is, its limits, and how it is called."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from project import runs
from project.data import splits
from project.data.images import parse_resize
from project.data.splits import SPLITS
from project.evaluation import html, results, run_split, scores
from project.inference import bundle
from project.inference.metadata import Metadata
from project.metrics import positive_index

TEMPLATE = Path(__file__).with_name("templates") / "card.md"
MAX_NAMES = 40  # class names that the card lists


def write(file: Path, checkpoint: Path, metadata: Metadata) -> None:
    """Writes the card; if the run of the exported checkpoint has been tested, with its figures."""
    names, data = metadata.class_names, Path(metadata.config["data"].get("root") or "unknown").name
    text = html.render(
        TEMPLATE,
        title=_plain(f"{runs.name_of(checkpoint)}: {metadata.model}"),
        names=[_plain(name) for name in names[:MAX_NAMES]],
        data=_plain(data),
        header={"name": runs.name_of(checkpoint), "data": data},
        counts=_counts(runs.folder_of(checkpoint), names),
        splits=SPLITS,
        **_figures(checkpoint, metadata),
        metadata=metadata,
        resize=parse_resize(metadata.resize),
        checkpoint=_plain(checkpoint.name),
        date=f"{datetime.now().astimezone():%Y-%m-%d}",
        program=(file.parent / bundle.PROGRAM).exists(),
    )
    file.write_text(text + "\n", encoding="utf-8", errors="replace")


def _figures(checkpoint: Path, metadata: Metadata) -> dict[str, Any]:
    if not results.is_tested(checkpoint):
        return {"tested": 0, "positive": None}
    table = results.TestPredictions.read(runs.folder_of(checkpoint) / runs.PREDICTIONS)
    positive = positive_index(table.class_names, metadata.config["model"].get("positive"))
    scored = table.scored(positive)
    if metadata.calibrated:
        scored = scored.at_temperature(metadata.temperature)  # which is built into model.onnx
    measured = {"values": scored.scores(), "intervals": scores.intervals(scored), "scores": scores}
    return {**measured, "tested": len(table.paths), "positive": positive}


def _counts(run: Path, names: list[str]) -> list[tuple[str, list[int]]]:
    """Images of each class in each split; empty where the run has no split.csv."""
    if not (counts := splits.counts(run_split.rows(run))):
        return []
    rows = [(_plain(name), [counts.get(name, {}).get(split, 0) for split in SPLITS]) for name in names[:MAX_NAMES]]
    return [*rows, ("all classes", [sum(of[split] for of in counts.values()) for split in SPLITS])]


def _plain(text: str) -> str:
    """Escapes what Markdown would interpret."""
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", " ".join(text.split()))
