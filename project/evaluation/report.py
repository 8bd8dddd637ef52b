"""report.html: a self-contained page on how good a classifier is and how it was trained."""

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from project import files, runs
from project.data import check, manifest
from project.data.images import Pixels
from project.data.splits import SPLITS
from project.errors import UserError
from project.evaluation import attribution, comparison, figures, html, results, run_split, scores
from project.evaluation.comparison import ComparedRun
from project.evaluation.fonts import shortened
from project.evaluation.results import Results
from project.evaluation.scores import Integers, ScoredPredictions
from project.inference import calibration
from project.inference.load import Source
from project.inference.predictor import Predictor

TEMPLATE = Path(__file__).with_name("templates") / runs.REPORT
SHOWN = 12  # images in a gallery


def write(
    source: Source,
    out: Path | None = None,
    others: Sequence[ComparedRun] = (),
    data: str | None = None,
    unknown: float | None = None,
    pooled: Results | None = None,
) -> Path:
    """Writes the report of a tested checkpoint, or of a bundle, which predicts the test images now.

    The page is `out`, by default report.html in the run or in the bundle. It compares with the runs `others`, and shows
    images that may be of none of the classes if `unknown` is a share of false alarms among the validation images. For
    `data` see `results.gather`; `pooled` are the results of `results.pool`, of folds the first of which is the source.
    UserError where predictions are missing or damaged, or the page cannot be written.
    """
    predictor = source.load()
    result = pooled or results.gather(source, predictor, data)
    text = html.render(TEMPLATE, **_content(result, predictor, others, unknown))
    target = out or (source.file if source.is_bundle else result.source.run) / runs.REPORT
    try:
        with files.replacing(target) as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; give another path by --out.") from error
    return target


def _content(
    result: Results, predictor: Predictor, others: Sequence[ComparedRun], unknown: float | None
) -> dict[str, Any]:
    threshold, alarms = (0.0, "") if unknown is None else result.metadata.unknown_below(unknown)
    names, scored, run = result.test.class_names, result.scored, result.source.run
    calibrated = None if result.temperature is None else scored.at_temperature(result.temperature)
    fits = {name: fold.curves for name, fold in (result.folds or {run.name: result}).items() if fold.curves}
    return {
        "result": result,
        "scores": scores,
        "splits": SPLITS,
        "name": run.parent.name if result.folds else runs.name_of(result.source.file),
        "time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "positive": None if scored.positive is None else names[scored.positive],
        "majority": shortened(names[result.majority], 24),
        "values": results.all_scores(scored, result.measured),
        "intervals": scores.intervals(scored),
        "baseline": scored.constant(result.majority).scores(),
        "classes": _classes(result),
        "calibrated": calibrated,
        "confusion": html.drawing(figures.confusion_matrix, scored.confusion(), names),
        "roc": html.drawing(figures.roc, scored, names),
        "precision_recall": html.drawing(figures.precision_recall, scored, names),
        "reliability": html.drawing(figures.reliability, scored, calibrated, result.metadata.calibration),
        "fewest": figures.FEWEST,
        "coverage": html.drawing(figures.coverage, scored),
        "curves": html.drawing(figures.learning_curves, fits) if fits else None,
        "folds": results.table(result.folds) if result.folds else None,
        "comparison": comparison.content(result, others) if others else None,
        "findings": _findings(result),
        "configuration": yaml.safe_dump(result.metadata.config, sort_keys=False, allow_unicode=True),
        "alarms": alarms,
        **_galleries(result, predictor, threshold),
    }


def _classes(result: Results) -> list[dict[str, Any]]:
    """The scores of each class against the rest, the lowest F1 first; classes without test images are the last."""
    scored = result.test.scored(None)
    table = scored.per_class() | {"auroc": scored.aurocs()}
    for name in ("precision", "recall", "f1"):
        table[name][table["support"] == 0] = np.nan
    order = np.argsort(table["f1"], kind="stable")  # nan is the last
    rows = [{name: float(column[index]) for name, column in table.items()} for index in order]
    return [{"name": result.test.class_names[index], **row} for index, row in zip(order, rows, strict=True)]


def _galleries(result: Results, predictor: Predictor, threshold: float) -> dict[str, Any]:
    """The most confident errors, the least certain and the flagged images, as far as they can be read."""
    scored, table = result.scored, result.test
    folder = manifest.folder_of(Path(str(result.measured.get("data", ""))))
    logits = calibration.max_logits(scored.probabilities)
    flagged = np.argsort(logits, kind="stable")[: np.sum(logits < threshold)]
    shown = {"errors": confident_errors(scored), "uncertain": least_certain(scored), "unknown": flagged[:SHOWN]}
    indices = np.unique(np.concatenate([*shown.values()])).tolist()
    (batch,) = predictor.batches([table.paths[index] for index in indices], len(indices))
    readable = [index for number, index in enumerate(indices) if number not in batch.failed]
    heats, heat_text = _heat_maps(batch.pixels, scored.predicted[readable].tolist(), result, predictor)
    items: dict[int, dict[str, Any]] = {}
    for index, pixels, heat in zip(readable, batch.pixels, heats, strict=True):
        predicted, second = np.argsort(-scored.probabilities[index], kind="stable")[:2]
        items[index] = {
            name: {"name": table.class_names[label], "probability": float(scored.probabilities[index, label])}
            for name, label in (("true", scored.true[index]), ("predicted", predicted), ("second", second))
        }
        items[index] |= {"path": os.path.relpath(table.paths[index], folder), "image": html.image(pixels)}
        items[index] |= {"heat": None if heat is None else html.image(figures.overlay(pixels, heat))}
    galleries = {name: [items[index] for index in chosen.tolist() if index in items] for name, chosen in shown.items()}
    return galleries | {"flagged": len(flagged), "heat_text": heat_text}


def confident_errors(scored: ScoredPredictions) -> Integers:
    """Indices of the misclassified images, the most confident first."""
    wrong = np.flatnonzero(scored.predicted != scored.true)
    confidence = scored.probabilities[wrong, scored.predicted[wrong]]
    return wrong[np.argsort(-confidence, kind="stable")][:SHOWN]


def least_certain(scored: ScoredPredictions) -> Integers:
    """Indices of the images whose two likeliest classes have the closest probabilities."""
    top = np.sort(scored.probabilities, axis=1)[:, -2:]
    return np.argsort(top[:, 1] - top[:, 0], kind="stable")[:SHOWN]


def _heat_maps(pixels: Pixels, labels: list[int], result: Results, predictor: Predictor) -> tuple[Iterable[Any], str]:
    """A heat map of each image's predicted class, or None, and a sentence about them."""
    nothing: list[Any] = [None] * len(pixels)
    if not len(pixels) or result.folds:  # whose networks differ
        return nothing, ""
    try:
        attribution.captum()
        from project.inference.checkpoint import TorchPredictor

        network = predictor if isinstance(predictor, TorchPredictor) else result.source.load_network(device="cpu")
        heats, note = attribution.heat_maps(network, pixels, labels)
    except UserError as error:  # no Captum, a network without maps for Grad-CAM, a bundle without model.safetensors
        return nothing, f" {error}"
    return heats, f" The heat maps (Grad-CAM) show the evidence for the predicted class{note and ': '}{note}."


def _findings(result: Results) -> list[str]:
    """Problems of the data that show without decoding; `check` inspects every image."""
    run, root = result.source.run, Path(str(result.measured.get("data", "")))
    folder = manifest.folder_of(root)
    lines = [finding.sentence for finding in check.classes(run_split.rows(run))]
    for table in (result.test, result.val):
        errors = list(table.errors.items())[:5] if table else []
        lines += [f"unreadable: {os.path.relpath(path, folder)}: {reason}" for path, reason in errors]
    if (run / run_split.FILE).is_file() and root.exists():
        try:
            lines += manifest.load(root, run / run_split.FILE).notices
        except UserError as error:
            lines.append(str(error))
    return lines
