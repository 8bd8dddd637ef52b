"""One page on what a classifier has learned: python -m project.cli report runs/digits/version_0."""

import platform
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from project import bundle, calibration, comparison, figures, files, gallery, lettering, page, results, runs, scores
from project.data import check, manifest
from project.data.splits import SPLITS, Row
from project.errors import UserError
from project.predictor import Predictor, load
from project.results import Results

PAGE = "report.html"


def report(
    checkpoint: str | None = None,
    /,
    out: str | None = None,
    compare: list[str] | None = None,
    data: str | None = None,
) -> int:
    """Writes one HTML page about a checkpoint.

    How good it is and how sure that is, what it confuses, whether its probabilities mean what they say, its worst
    errors, and how it was made. The page needs no network. Where the checkpoint has not been tested yet, it is now; a
    bundle is asked for its answers each time.

    Args:
        checkpoint: A checkpoint, a run's folder or a bundle; by default the newest run's best.ckpt.
        out: The HTML file to write; must not exist. By default report.html in the run, or in the bundle.
        compare: Runs to put beside it, which have been tested on the same pictures, or bundles.
        data: Where the pictures of bundles are; by default where those of their runs were.
    """
    target = None if out is None else Path(out)
    if target is not None:
        files.require_new(target, "out")
    others = [comparison.Other.of(name, data) for name in compare or []]
    if checkpoint is not None and bundle.is_bundle(checkpoint):
        predictor = load(checkpoint)
        found = results.of_bundle(Path(checkpoint), predictor, data)
        print(f"report: {_write(found, predictor, target, others)}")
        return 0
    path = runs.find(checkpoint)
    if data is not None and not any(map(bundle.is_bundle, compare or [])):
        raise UserError(f"--data is for bundles; run: python -m project.cli test --ckpt_path {path} --data.root {data}")
    if not results.is_tested(path):
        from project import training  # Lightning: only where its Trainer is needed

        training.run("test", ["--ckpt_path", str(path), "--report", "false"])
    print(f"report: {write(path, target, others)}")
    return 0


def write(checkpoint: Path, out: Path | None = None, others: Sequence[comparison.Other] = ()) -> Path:
    """Writes the page of a checkpoint that has been tested.

    Args:
        checkpoint: The file.
        out: The page; by default report.html in the run.
        others: Runs to put beside it.

    Returns:
        Where the page is.

    Raises:
        UserError: Predictions are missing or damaged, or the page cannot be written.
    """
    predictor = load(checkpoint)
    return _write(results.gather(checkpoint, predictor), predictor, out, others)


def _write(found: Results, predictor: Predictor, out: Path | None, others: Sequence[comparison.Other]) -> Path:
    target = out or found.run / PAGE
    text = page.render("report.html", **_content(found, predictor, others))
    try:
        with files.replacing(target) as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; give another place by --out.") from error
    return target


def _content(found: Results, predictor: Predictor, others: Sequence[comparison.Other]) -> dict[str, Any]:
    sample = found.test.sample(found.positive)
    names, count = found.test.class_names, len(sample.true)
    errors = ""
    if found.test.errors:
        errors = f"{len(found.test.errors):,} test pictures could not be read and are not counted."
    return {
        "title": f"{runs.name_of(found.checkpoint)}: {found.metadata['model']}, {len(names)} classes",
        "subtitle": f"{found.checkpoint}, {datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "headline": _headline(found, sample),
        "majority": lettering.shortened(names[found.majority], 24),
        "measured_on": f"Measured on {count:,} test pictures. {found.notice}".strip()
        + ("" if found.positive is None else f" Precision, recall, F1 and AUROC are of “{names[found.positive]}”."),
        "errors": errors,
        "compared": comparison.content(found, others) if others else None,
        "classes": _classes(found, sample),
        **_drawings(found, sample),
        **gallery.content(found, predictor),
        "calibration_text": _calibration(found, sample),
        "data": _data(found),
        "splits": SPLITS,
        "counts": [(name, [found.counts[split].get(name, 0) for split in SPLITS]) for name in names]
        if any(found.counts.values())
        else [],
        "findings": _findings(found),
        "made": _made(found),
        "configuration": yaml.safe_dump(found.metadata["config"], sort_keys=False, allow_unicode=True),
    }


def _headline(found: Results, sample: scores.Sample) -> list[dict[str, str]]:
    values = sample.figures() | {"ece": sample.ece()} | _added(found)
    baseline = sample.majority(found.majority).figures()
    intervals = scores.intervals(sample)
    return [
        {
            "name": page.NAMES.get(name, name),
            "value": page.figure(name, value),
            "interval": page.interval(name, *intervals[name]) if name in intervals else "",
            "baseline": page.figure(name, baseline[name]) if name in baseline and name != "loss" else "",
        }
        for name, value in values.items()
    ]


def _added(found: Results) -> dict[str, float]:
    """Figures that metrics.py has and scores.py does not, as `test` has measured them."""
    measured = {name.removeprefix("test/"): value for name, value in found.measured.items() if "test/" in name}
    known = found.test.sample(found.positive).figures()
    return {name: float(value) for name, value in measured.items() if name not in known}


def _classes(found: Results, sample: scores.Sample) -> list[dict[str, str]]:
    each = scores.Sample(sample.true, sample.probabilities)
    table, aurocs = each.per_class(), each.aurocs()
    order = sorted(range(each.classes), key=lambda place: (table["support"][place] == 0, table["f1"][place]))
    return [
        {
            "name": found.test.class_names[place],
            "support": f"{table['support'][place]:,.0f}",
            "auroc": page.figure("auroc", aurocs[place]),
            **{
                name: page.figure(name, table[name][place] if table["support"][place] else np.nan)
                for name in ("precision", "recall", "f1")
            },
        }
        for place in order
    ]


def _drawings(found: Results, sample: scores.Sample) -> dict[str, Any]:
    names, given = found.test.class_names, (sample.true, sample.probabilities)
    warm = None if found.temperature is None else calibration.at_temperature(sample.probabilities, found.temperature)
    value = sample.figures()
    of = "each class against the rest" if found.positive is None else f"“{names[found.positive]}”"
    made: dict[str, Any] = {
        "curves": None,
        "confusion": page.drawing(
            lambda: figures.confusion_matrix(sample.confusion(), names),
            f"Confusion matrix of {len(names)} classes; {value['accuracy']:.1%} of the pictures are on its diagonal.",
            "Rows are the true classes; colour and percentage are shares of the row.",
        ),
        "roc": page.drawing(
            lambda: figures.roc(*given, names, found.positive),
            f"ROC curves of {of}, area {value['auroc']:.3f}.",
            f"ROC: {of}. Dotted: guessing.",
        ),
        "precision_recall": page.drawing(
            lambda: figures.precision_recall(*given, names, found.positive),
            f"Precision over recall of {of}.",
            f"Precision and recall: {of}.",
        ),
        "reliability": page.drawing(
            lambda: figures.reliability(*given, warm),
            f"Reliability diagram, calibration error {sample.ece():.3f}.",
            "On the dotted line a probability of 0.8 is right 8 times in 10.",
        ),
        "coverage": page.drawing(
            lambda: figures.coverage(*given),
            "Accuracy over the share of pictures that are answered.",
            "Dots: abstaining below that probability (predict --min-confidence).",
        ),
    }
    fit = {name: curve for name, curve in found.curves.items() if name.endswith(("/loss", "/accuracy"))}
    if fit:
        epochs = max(epoch for curve in fit.values() for epoch in curve[0])
        made["curves"] = page.drawing(
            lambda: figures.learning_curves({found.run.name: fit}),
            f"Loss and accuracy over {epochs:.0f} epochs of training.",
            "Loss and accuracy, of the training pictures while they were learned and of the validation pictures.",
        )
    return made


def _calibration(found: Results, sample: scores.Sample) -> str:
    sure = float(sample.confidence.mean())
    right = sample.figures()["accuracy"]
    text = (
        f"On average it gives its answer {sure:.1%} and is right {right:.1%} of the time; "
        f"the expected calibration error is {sample.ece():.3f} (15 bins)."
    )
    if "calibrated" in found.metadata:  # a bundle
        built_in = f"The temperature {found.metadata['temperature']:.3f} is built in."
        return f"{text} {built_in if found.metadata['calibrated'] else 'No temperature is built in.'}"
    if found.temperature is None:
        why = (
            "the validation pictures are not there"
            if found.val is None
            else "no validation picture is answered wrongly"
        )
        return f"{text} No temperature was fitted: {why}."
    warm = scores.Sample(sample.true, calibration.at_temperature(sample.probabilities, found.temperature))
    return (
        f"{text} Dividing the logits by {found.temperature:.3f}, a temperature fitted on the validation pictures, "
        f"makes that {warm.ece():.3f} on the test pictures. predict --calibrated uses it."
    )


def _data(found: Results) -> list[tuple[str, str]]:
    options = found.metadata["config"]["data"]
    rows = [
        ("data", str(found.measured.get("data") or options.get("root", ""))),
        ("tested", f"{len(found.test.true):,} pictures"),
    ]
    rows += [("split", ", ".join(f"{split} {sum(found.counts[split].values()):,}" for split in SPLITS))]
    rows.append(
        (
            "seen as",
            f"{found.metadata['image_size']} x {found.metadata['image_size']} pixels, {found.metadata['resize']}",
        )
    )
    chosen = {
        name: options[name] for name in ("group", "folds", "fold", "exclude", "balance", "augment") if options.get(name)
    }
    return rows + [(name, str(value)) for name, value in chosen.items() if value != "none"]


def _findings(found: Results) -> list[str]:
    """What can be said of the data without decoding all of it; `check` looks at every picture."""
    rows = [
        Row("", name, split) for split in SPLITS for name, count in found.counts[split].items() for _ in range(count)
    ]
    lines = [finding.sentence for finding in check.classes(rows)]
    for table in (found.test, found.val):
        lines += [f"unreadable: {path}: {reason}" for path, reason in list(table.errors.items())[:5]] if table else []
    root = Path(str(found.measured.get("data", "")))
    if (split := found.run / results.SPLIT).is_file() and root.exists():
        try:
            lines += manifest.load(root, split).notices
        except UserError as error:
            lines.append(str(error))
    return lines


def _made(found: Results) -> list[tuple[str, str]]:
    metadata, status = found.metadata, found.status
    versions = ", ".join(f"{name} {version}" for name, version in metadata.get("versions", {}).items())
    seconds = status.get("seconds")
    took = f"{seconds:,.0f} s, {status.get('step', 0):,} steps, {status.get('state')}" if seconds else "not recorded"
    machine = metadata.get("machine", "not recorded")
    rows = [("network", str(metadata["model"])), ("training", took), ("machine", machine)]
    rows += [("git commit", metadata.get("git_commit") or "none"), ("versions", versions)]
    return [*rows, ("this page", f"made with Python {platform.python_version()}")]
