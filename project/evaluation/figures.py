"""Figures: arrays and predictions drawn with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from project.data.images import Pixels
from project.evaluation.fonts import families, shortened, wrapped
from project.evaluation.scores import BINS, Floats, ScoredPredictions, format_score

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.floating[Any]]
INK, FAINT = "#222222", "#999999"  # of text and lines; a page may replace them
STYLE: dict[Any, Any] = {  # matplotlib types the names of its settings
    "font.family": families(),
    "text.parse_math": False,  # a class may be called $x_1$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
DOTTED: dict[str, Any] = {"linestyle": ":", "color": FAINT, "linewidth": 1}  # a line to compare with
NAMED = 20  # classes whose names fit beside a figure
FEWEST = 10  # images in a bin of the reliability diagram whose accuracy is drawn


def _axes(width: float, height: float, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


@mpl.rc_context(STYLE)
def image_grid(
    images: Pixels, titles: Sequence[str], columns: int = 8, wrong: Sequence[bool] = (), side: float = 1.0
) -> Figure:
    """Images (N, H, W, 3) uint8 RGB in rows, each `side` inches wide above its title; `wrong` ones have a red frame."""
    rows, lines = max(1, math.ceil(len(images) / columns)), max((text.count("\n") + 1 for text in titles), default=1)
    height = 1.1 + 0.2 * lines / side  # of a row, where an image is 1 wide
    figure = Figure(figsize=(1.1 * columns * side, height * rows * side))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: one for each image takes five times as long
    axes.set_axis_off()
    for index, (image, title, is_wrong) in enumerate(zip(images, titles, wrong or [False] * len(images), strict=True)):
        row, column = divmod(index, columns)
        left, top = 1.1 * column + 0.05, height * row + 0.05
        axes.imshow(image, extent=(left, left + 1, top + 1, top))
        if is_wrong:
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="tab:red", linewidth=3))
        colour, size = "tab:red" if is_wrong else INK, 11 if lines == 1 else 8
        axes.text(left + 0.5, top + 1.04, title, ha="center", va="top", size=size, color=colour)
    axes.set(xlim=(0, 1.1 * columns), ylim=(height * rows, 0))
    return figure


def rate_finder(rates: Array, losses: Array, chosen: float | None) -> Figure:
    """N losses over N learning rates, and the suggested rate, if there is one."""
    figure, axes = _axes(7, 4, "learning rate", "training loss, smoothed")
    axes.plot(rates, losses)
    axes.set_xscale("log")
    if len(finite := losses[np.isfinite(losses)]):
        axes.set_ylim(0, 2 * float(np.median(finite)))
    if chosen is not None:
        axes.axvline(chosen, color="tab:red", label=f"suggested: {chosen:.2g}")
        axes.legend()
    return figure


@mpl.rc_context(STYLE)
def confusion_matrix(counts: npt.NDArray[Any], class_names: Sequence[str]) -> Figure:
    """Images (K, K) by true class (rows) and predicted class; colours and percentages are shares of the row."""
    counts = np.asarray(counts, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes, is_named = len(class_names), len(class_names) <= NAMED
    side = 0.55 * max(classes, 5) + 1.2 if is_named else 6.0
    figure = Figure(figsize=(side + 0.6, side) if is_named else (12.5, side), layout="constrained")
    axes, *beside = figure.subplots(1, 1 if is_named else 2, squeeze=False)[0]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(True)
    names = [shortened(name, 22) for name in class_names]
    if is_named:
        rotation = 45 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(classes), names, rotation=rotation, ha="right", fontsize=9)
        axes.set_yticks(range(classes), names, fontsize=9)
        for row, column in zip(*np.nonzero(counts), strict=True):
            share = shares[row, column]
            text = f"{counts[row, column]:.0f}\n{100 * share:.{0 if share >= 0.1 else 1}f} %"
            colour, size = "white" if share > 0.55 else "#08306b", 9 if classes < 6 else 7
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
        return figure
    wrong = np.where(np.eye(classes, dtype=bool), 0, counts)  # the most confused pairs stand beside the matrix
    order = np.argsort(-wrong, axis=None, kind="stable")[:15]
    pairs = [divmod(int(index), classes) for index in order if wrong.flat[index]]
    labels = [f"{names[true]} → {names[predicted]}" for true, predicted in pairs]
    beside[0].barh(range(len(pairs)), [wrong[pair] for pair in pairs], tick_label=labels)
    beside[0].invert_yaxis()
    beside[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    beside[0].set(xlabel="images")
    beside[0].set_title("most confused: true → predicted", fontsize=10)
    return figure


@mpl.rc_context(STYLE)
def roc(predictions: ScoredPredictions, class_names: Sequence[str]) -> Figure:
    """ROC curves of each class against the rest and their mean, or of the positive class with some thresholds."""
    figure, axes = _axes(6.2, 4.6, "false positive rate", "true positive rate")
    axes.plot((0, 1), (0, 1), **DOTTED)
    curves = [(class_names[i], r.auroc(), *r.roc(), r.thresholds) for i, r in predictions.ranked.items()]
    return _draw_curves(figure, axes, curves, "AUROC")


@mpl.rc_context(STYLE)
def precision_recall(predictions: ScoredPredictions, class_names: Sequence[str]) -> Figure:
    """Precision over recall of each class against the rest and their mean, or of the positive class; see `roc`."""
    figure, axes = _axes(6.2, 4.6, "recall", "precision")
    if predictions.positive is not None:
        axes.axhline((predictions.true == predictions.positive).mean(), label="always positive", **DOTTED)
    ranked = predictions.ranked.items()
    curves = [(class_names[i], r.average_precision(), *r.precision_recall(), r.thresholds) for i, r in ranked]
    return _draw_curves(figure, axes, curves, "AP")


def _draw_curves(
    figure: Figure, axes: Axes, curves: Sequence[tuple[str, float, Floats, Floats, Floats]], measure: str
) -> Figure:
    """Draws one curve (name, area, x, y, thresholds) with some thresholds, or many and their mean."""
    curves = sorted((curve for curve in curves if np.isfinite(curve[1])), key=lambda curve: curve[1])
    for rank, (name, area, x, y, _) in enumerate(curves):
        label = f"{shortened(name, 24)}, {measure} {format_score(measure, area)}"
        if len(curves) <= 10 or rank < 3:  # of many, the worst have names
            axes.plot(x, y, linewidth=1, label=label, zorder=3)
        else:
            axes.plot(x, y, linewidth=0.5, color=FAINT, alpha=0.6)
    if len(curves) == 1:
        _, _, x, y, thresholds = curves[0]
        _mark_thresholds(axes, x[-len(thresholds) :], y[-len(thresholds) :], thresholds)
    elif curves:
        even, area = np.linspace(0, 1, 201), float(np.mean([curve[1] for curve in curves]))
        mean = np.mean([np.interp(even, x, y) for _, _, x, y, _ in curves], axis=0)
        label = f"mean of {len(curves)} classes, {measure} {format_score(measure, area)}"
        axes.plot(even, mean, color=INK, linewidth=2, label=label, zorder=4)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    if labels := axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper" if len(labels) > 3 else "outside lower center", fontsize=8)
    return figure


@mpl.rc_context(STYLE)
def reliability(scored: ScoredPredictions, calibrated: ScoredPredictions | None = None, name: str = "raw") -> Figure:
    """Accuracy over confidence; below, how many images are in each bin of confidence.

    `calibrated` are the same predictions at the fitted temperature, if there is one; `name` says what the first are.
    """
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot((0, 1), (0, 1), **DOTTED)
    edges = np.linspace(0, 1, BINS + 1)
    for label, drawn, colour in ((name, scored, "tab:blue"), ("calibrated", calibrated, "tab:orange")):
        if drawn is not None:
            count, confidence, accuracy = drawn.bins()
            accuracy[count < FEWEST] = np.nan  # a gap in the line: it is chance
            above.plot(confidence, accuracy, "o-", color=colour, ms=4, label=f"{label}: ECE {drawn.ece():.3f}")
            below.stairs(count, edges, color=colour)
    count, _, _ = scored.bins()
    bars = below.bar(edges[:-1], count, 1 / BINS, align="edge", color="tab:blue", alpha=0.2, log=True)
    below.bar_label(bars, [f"{images:,.0f}" if images else "" for images in count], fontsize=7)
    below.axhline(FEWEST, **DOTTED)
    below.yaxis.set_major_formatter("{x:,.0f}")
    above.set(ylabel="accuracy", ylim=(0, 1.02))
    below.set(xlim=(0, 1), ylim=(0.5, 4 * max(count.max(), FEWEST)), xlabel="confidence", ylabel="images")
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@mpl.rc_context(STYLE)
def coverage(predictions: ScoredPredictions) -> Figure:
    """Accuracy on the images whose confidence reaches a threshold, over their share of all images."""
    figure, axes = _axes(5.4, 3.9, "coverage (share of images above a confidence)", "accuracy on these images")
    kept, accuracy, confidence = predictions.coverage()
    axes.plot(kept, accuracy)
    _mark_thresholds(axes, kept, accuracy, confidence)
    axes.set(xlim=(0, 1.02), ylim=(max(0.0, accuracy[kept >= 0.05].min() - 0.05), 1.005))
    return figure


@mpl.rc_context(STYLE)
def learning_curves(runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Loss and accuracy of runs by name, from epochs and values by metric; training dashed, validation solid."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, curves) in enumerate(runs.items()):
            for split, style in (("train", "--"), ("val", "-")):
                if f"{split}/{metric}" not in curves:
                    continue
                epochs, values = curves[f"{split}/{metric}"]
                label = split if len(runs) == 1 else shortened(name, 24) if split == "val" else None
                colour = f"C{number}" if len(runs) > 1 or split == "val" else "C1"
                marker = "o" if len(epochs) < 30 else None
                axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=3)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.05 if axes.dataLim.width else 1)  # also where there is a single epoch
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    return figure


def _mark_thresholds(axes: Axes, x: Floats, y: Floats, thresholds: Floats) -> None:
    """Marks some thresholds on a curve over all thresholds, from the highest."""
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        if 0 < (count := np.count_nonzero(thresholds >= threshold)) < len(thresholds):
            point = (x[count - 1], y[count - 1])
            axes.plot(*point, "o", color="tab:orange", markersize=5)
            offset = (5, -9 if y[-1] > y[0] else 4)  # beside a rising or falling curve
            axes.annotate(f"{threshold:g}", point, offset, textcoords="offset points", fontsize=9)


def overlay(image: Pixels, heat: Array) -> Pixels:
    """Lays a heat map (H, W), 0 to 1, in colour over an image (H, W, 3) uint8, in grey; heat hides the image."""
    luma = image @ np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601, as Pillow's mode L
    grey = 51 + 0.6 * luma[..., None]  # black and white would change the colours
    colour = mpl.colormaps["inferno"](0.3 + 0.7 * heat)[..., :3] * 255  # without its dark end, which is like shadow
    share = (0.8 * np.sqrt(heat))[..., None]
    return np.asarray(np.rint((1 - share) * grey + share * colour), np.uint8)


@mpl.rc_context(STYLE)
def explanations(shown: Sequence[tuple[Pixels, Array, str, str]], columns: int, side: float, note: str) -> Figure:
    """Pairs in rows: each image above its title, and beside it its `overlay` with the heat map above the caption.

    Below are the scale of the colours and the note. `columns` are pairs, `side` is that of an image in inches.
    """
    width = round(side * 72 / 8 / 0.7)  # letters in a line: wide ones of DejaVu are 0.7 of their size, 8 points
    pairs = [pixels for image, heat, *_ in shown for pixels in (image, overlay(image, heat))]
    texts = [wrapped(text, width) for _, _, *pair in shown for text in pair]
    figure = image_grid(np.stack(pairs), texts, 2 * columns, side=side)
    (wide, high), below = figure.get_size_inches(), 0.6  # inches, for the scale
    figure.set_size_inches(wide, high + below)
    figure.axes[0].set_position((0, below / (high + below), 1, high / (high + below)))
    scale = figure.add_axes((0.5 / wide, 0.3 / (high + below), 2 / wide, 0.15 / (high + below)))
    grey = np.full((1, 256, 3), 128, np.uint8)
    scale.imshow(overlay(grey, np.linspace(0, 1, 256)[None]), aspect="auto", extent=(0, 1, 0, 1))
    scale.set_xticks((0, 1), ("no evidence", "most in this image"), size=8)
    scale.set_yticks(())
    figure.text(3.2 / wide, 0.375 / (high + below), note, size=8, va="center")
    return figure


def filter_grid(filters: "Tensor") -> Figure:
    """A convolution's first 256 filters (N, C, h, w), in colour where C is 3, else the mean over C; 0 is mid-grey."""
    from torchvision.utils import make_grid

    shown = filters[:256] if filters.shape[1] == 3 else filters[:256].mean(dim=1, keepdim=True)
    largest = shown.abs().amax(dim=(1, 2, 3), keepdim=True)
    tiles = 0.5 + shown / (2 * largest).clamp(min=1e-12)  # (N, 3 or 1, h, w), 0 to 1
    count, _, height, width = tiles.shape
    grid = make_grid(tiles, math.ceil(math.sqrt(count)), padding=max(1, round(width / 8)), pad_value=1)
    figure, axes = _axes(6, 6 * grid.shape[1] / grid.shape[2] + 0.4)
    axes.set_axis_off()
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    prefix = "" if count == len(filters) else f"the first {count} of "
    axes.set_title(f"first layer: {prefix}{len(filters)} filters, {height}x{width}", fontsize=9)
    return figure
