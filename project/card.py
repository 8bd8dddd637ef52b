"""The model card of a bundle: what the network is for, how good it is, its limits, and how it is called."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from project import bundle, calibration, page, results, runs, scores
from project.data.splits import SPLITS

SHOWN = 40  # class names


def write(file: Path, checkpoint: Path, config: dict[str, Any]) -> None:
    """Writes the card.

    Args:
        file: Where.
        checkpoint: Whose figures are taken from its run, where it has been tested.
        config: Of the bundle.
    """
    run, names = runs.folder_of(checkpoint), config["class_names"]
    values = config["config"]["data"]
    text = page.render(
        "card.md",
        title=_plain(f"{runs.name_of(checkpoint)}: {config['model']}"),
        names=[_plain(name) for name in names[:SHOWN]],
        count=len(names),
        size=config["image_size"],
        resize=config["resize"],
        data=_plain(Path(values.get("root") or "unknown").name),
        counts=_counts(run, names),
        splits=SPLITS,
        **_figures(checkpoint, names, config),
        config={"git_commit": "", **config},
        trained_with=_versions(config),
        made_with=_versions(config["export"]),
        checkpoint=_plain(checkpoint.name),
        date=f"{datetime.now().astimezone():%Y-%m-%d}",
        program=(file.parent / bundle.PROGRAM).exists(),
    )
    file.write_text(text + "\n", encoding="utf-8", errors="replace")


def _figures(checkpoint: Path, names: list[str], config: dict[str, Any]) -> dict[str, Any]:
    if not results.is_tested(checkpoint):
        return {"measured": [], "tested": 0, "positive": None}
    table = results.read(runs.folder_of(checkpoint) / results.TEST)
    positive = results.positive(config)
    # as model.onnx gives them, temperature included
    probabilities = calibration.at_temperature(table.probabilities, config["temperature"])
    sample = scores.Sample(table.true, probabilities, positive)
    intervals = scores.intervals(sample)
    measured = [
        (page.NAMES.get(name, name), page.figure(name, value), page.interval(name, *intervals[name]))
        for name, value in sample.figures().items()
    ]
    return {
        "measured": measured,
        "tested": len(table.paths),
        "positive": None if positive is None else _plain(names[positive]),
    }


def _counts(run: Path, names: list[str]) -> list[tuple[str, list[int]]]:
    """Pictures of each class in each split; nothing where the run has no split.csv."""
    counts = results.counts(run)
    if not any(counts.values()):
        return []
    lines = [(_plain(name), [counts[part].get(name, 0) for part in SPLITS]) for name in names[:SHOWN]]
    return [*lines, ("all classes", [sum(counts[part].values()) for part in SPLITS])]


def _versions(origin: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items()) or "unknown versions"


def _plain(text: str) -> str:
    """Without what Markdown would read as something else."""
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", " ".join(text.split()))
