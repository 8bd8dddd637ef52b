"""Arrays become matplotlib figures; nothing here knows where they come from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from project.lettering import drawable, fitted, font_families, shortened
from project.scores import BINS, Ranked, Sample

INK, FAINT = "#222222", "#999999"  # of text and lines; a page may give them other colours


def image_grid(
    images: npt.NDArray[np.uint8], titles: Sequence[str], columns: int = 8, wrong: Sequence[bool] = ()
) -> Figure:
    """Pictures in rows, each under its title.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        titles: N texts, of as many lines each.
        columns: Pictures in a row.
        wrong: Which of the N are marked, in red; by default none.
    """
    rows, lines = max(1, math.ceil(len(images) / columns)), max((text.count("\n") + 1 for text in titles), default=1)
    height = 1.1 + 0.2 * lines  # of a row, where a picture is 1 wide
    figure = Figure(figsize=(1.1 * columns, height * rows))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: one for each picture takes five times as long
    axes.set_axis_off()
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(place, columns)
        left, top = 1.1 * column + 0.05, height * row + height - 1.05
        axes.imshow(image, extent=(left, left + 1, top + 1, top))
        marked = bool(wrong) and wrong[place]
        if marked:
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="tab:red", linewidth=3))
        style: Any = {"size": 11 if lines == 1 else 8, "color": "tab:red" if marked else INK}
        style |= {"family": font_families(), "parse_math": False}
        text = "\n".join(map(drawable, title.split("\n")))
        axes.text(left + 0.5, top - 0.04, text, ha="center", **style)
    axes.set(xlim=(0, 1.1 * columns), ylim=(height * rows, 0))
    return figure


def rate_finder(
    rates: npt.NDArray[np.floating[Any]], losses: npt.NDArray[np.floating[Any]], chosen: float | None
) -> Figure:
    """Loss over the learning rate, and the one that was chosen.

    Args:
        rates: (N,)
        losses: (N,)
        chosen: None where none could be.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.set_xscale("log")
    finite = losses[np.isfinite(losses)]
    if len(finite):
        axes.set_ylim(0, 2 * finite[0])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    if chosen is not None:
        axes.axvline(chosen, color="tab:red", label=f"suggested: {chosen:.2g}")
        axes.legend()
    return figure


# what a model learned: predictions (N, K) and the truth (N,)

READABLE = 20  # classes whose names still fit beside a figure


def confusion_matrix(counts: npt.NDArray[Any], class_names: Sequence[str]) -> Figure:
    """True classes in rows, predicted ones in columns; colour and percentage are shares of the row.

    Of many classes the names do not fit: the pairs that are confused most stand beside it.

    Args:
        counts: (K, K) pictures.
        class_names: K names.
    """
    counts = np.asarray(counts, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes, few = len(class_names), len(class_names) <= READABLE
    side = 0.55 * max(classes, 5) + 1.2 if few else 6.0
    figure = Figure(figsize=(side + 0.6, side) if few else (12.5, side), layout="constrained")
    axes, *beside = figure.subplots(1, 1 if few else 2, squeeze=False)[0]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if few:
        names = [shortened(name, 24) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=45 if max(map(len, names)) > 3 else 0, ha="right", fontsize=9)
        axes.set_yticks(range(classes), names, fontsize=9)
        for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
            label.set_parse_math(False)
        for row, column in zip(*np.nonzero(counts), strict=True):
            share, dark = shares[row, column], shares[row, column] > 0.55
            text = f"{counts[row, column]:.0f}\n{100 * share:.{0 if share >= 0.1 else 1}f} %"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=9 if classes < 6 else 7,
                color="white" if dark else "#08306b",
            )
        return figure
    wrong = np.where(np.eye(classes, dtype=bool), 0, counts)
    worst = [place for place in np.argsort(-wrong, axis=None, kind="stable")[:15] if wrong.flat[place]]
    pairs = [divmod(int(place), classes) for place in worst]
    beside[0].barh(range(len(pairs)), [wrong[pair] for pair in pairs], color="tab:blue")
    labels = [f"{shortened(class_names[true], 22)} → {shortened(class_names[said], 22)}" for true, said in pairs]
    beside[0].set_yticks(range(len(pairs)), labels, fontsize=9)
    for label in beside[0].get_yticklabels():
        label.set_parse_math(False)
    beside[0].invert_yaxis()
    beside[0].set_xlabel("pictures")
    beside[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    beside[0].set_title("confused most: true → predicted", fontsize=10)
    beside[0].spines[["top", "right"]].set_visible(False)
    return figure


def roc(
    true: npt.NDArray[Any], probabilities: npt.NDArray[Any], class_names: Sequence[str], positive: int | None = None
) -> Figure:
    """True over false positive rate of each class against the rest, and their mean.

    Of two classes only the positive one's curve, with some thresholds as operating points.

    Args:
        true: (N,) places of the true classes.
        probabilities: (N, K).
        class_names: K names.
        positive: Place of the class that is looked for, of two; by default the second.
    """
    figure = Figure(figsize=(6.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), linestyle=":", color=FAINT, linewidth=1)
    even = np.linspace(0, 1, 201)
    heights, areas, names = [], [], []
    for place in _columns(class_names, positive):
        ranked = Ranked(probabilities[:, place], true == place)
        if not np.isfinite(area := ranked.auroc()):
            continue
        alarms, hits, thresholds = ranked.roc()
        heights.append(np.interp(even, alarms, hits))
        areas.append(area)
        names.append(class_names[place])
        if len(class_names) == 2:
            axes.plot(*_thinned(alarms, hits), label=f"{shortened(names[0], 24)}, AUROC {area:.3f}")
            _operating_points(axes, alarms[1:], hits[1:], thresholds)
    if len(class_names) > 2 and areas:
        _curves_of_classes(axes, [(even, height) for height in heights], names, areas, "AUROC")
    return _square(figure, axes, "false positive rate", "true positive rate")


def precision_recall(
    true: npt.NDArray[Any], probabilities: npt.NDArray[Any], class_names: Sequence[str], positive: int | None = None
) -> Figure:
    """Precision over recall of each class against the rest, and their mean; arguments as those of `roc`."""
    figure = Figure(figsize=(6.2, 4.6), layout="constrained")
    axes = figure.subplots()
    even = np.linspace(0, 1, 201)
    heights, areas, names = [], [], []
    for place in _columns(class_names, positive):
        ranked = Ranked(probabilities[:, place], true == place)
        if not ranked.positive.any():
            continue
        recall, precision = ranked.precision_recall()
        first = np.searchsorted(recall, even)  # the precision at the first threshold that reaches a recall
        heights.append(precision[np.minimum(first, len(recall) - 1)])
        areas.append(ranked.average_precision())
        names.append(class_names[place])
        if len(class_names) == 2:
            axes.plot(*_thinned(recall, precision), label=f"{shortened(names[0], 24)}, AP {areas[0]:.3f}")
            axes.axhline(ranked.positive.mean(), linestyle=":", color=FAINT, linewidth=1, label="always positive")
            _operating_points(axes, recall, precision, ranked.score[ranked.last])
    if len(class_names) > 2 and areas:
        _curves_of_classes(axes, [(even, height) for height in heights], names, areas, "AP")
    return _square(figure, axes, "recall", "precision")


def reliability(
    true: npt.NDArray[Any], probabilities: npt.NDArray[Any], calibrated: npt.NDArray[Any] | None = None
) -> Figure:
    """How often the likeliest class is right, by how probable it was said to be; below, how often that was said.

    Args:
        true: (N,) places of the true classes.
        probabilities: (N, K).
        calibrated: (N, K) at the temperature that was found, if one was.
    """
    figure = Figure(figsize=(5.4, 4.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), linestyle=":", color=FAINT, linewidth=1)
    kinds = [("as trained", probabilities, "tab:blue"), ("at the temperature found", calibrated, "tab:orange")]
    edges = np.linspace(0, 1, BINS + 1)
    for name, given, colour in kinds:
        if given is None:
            continue
        sample = Sample(true, given)
        count, sure, right = sample.bins()
        filled = count > 0
        above.plot(
            sure[filled], right[filled], "o-", color=colour, markersize=4, label=f"{name}: ECE {sample.ece():.3f}"
        )
        below.stairs(count / count.sum(), edges, color=colour)
    above.set_ylabel("share that is right")
    above.set_ylim(0, 1.02)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    below.set_xlim(0, 1)
    below.set_xlabel("probability of the likeliest class")
    below.set_ylabel("share of\npictures")
    return _plain(figure)


def coverage(true: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> Figure:
    """Accuracy on the pictures that are answered, where those below a confidence are not; arguments as above."""
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    axes = figure.subplots()
    answered, accuracy, sure = Sample(true, probabilities).coverage()
    axes.plot(*_thinned(answered, accuracy))
    for threshold in (0.5, 0.7, 0.9, 0.99):
        if (kept := np.flatnonzero(sure >= threshold)).size and kept[-1] + 1 < len(sure):
            place = kept[-1]
            axes.plot(answered[place], accuracy[place], "o", color="tab:orange", markersize=5)
            axes.annotate(
                f"≥ {threshold:g}", (answered[place], accuracy[place]), (4, 5), textcoords="offset points", fontsize=9
            )
    axes.set_xlim(0, 1.02)
    lowest = float(accuracy[answered >= 0.05].min()) if len(accuracy) else 0.0
    axes.set_ylim(max(0.0, lowest - 0.05), 1.005)
    axes.set_xlabel("share of pictures answered")
    axes.set_ylabel("accuracy on them")
    return _plain(figure)


def learning_curves(runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Loss and accuracy over the epochs; training dashed, validation solid.

    Args:
        runs: For each run's name, for each figure's name like val/loss, epochs and values.
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, curves) in enumerate(runs.items()):
            for split, style in (("train", "--"), ("val", "-")):
                if f"{split}/{kind}" not in curves:
                    continue
                epochs, values = curves[f"{split}/{kind}"]
                label = split if len(runs) == 1 else shortened(name, 24) if split == "val" else None
                colour = f"C{number}" if len(runs) > 1 or split == "val" else "C1"
                marker = "o" if len(epochs) < 30 else None
                axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.05 if axes.dataLim.width else 1)  # also where there is a single epoch
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=9)
    return _plain(figure)


def _columns(class_names: Sequence[str], positive: int | None) -> list[int]:
    if len(class_names) == 2:
        return [1 if positive is None else positive]
    return list(range(len(class_names)))


def _curves_of_classes(
    axes: Axes,
    curves: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    names: Sequence[str],
    areas: Sequence[float],
    measure: str,
) -> None:
    """All classes' curves and their mean; of many only the three worst are named."""
    order = np.argsort(areas, kind="stable")
    named = set(order.tolist() if len(names) <= 10 else order[:3].tolist())
    for place, (x, y) in enumerate(curves):
        if place in named:
            label = f"{shortened(names[place], 24)}, {areas[place]:.3f}"
            axes.plot(x, y, linewidth=1, label=label, zorder=3)
        else:
            axes.plot(x, y, linewidth=0.5, color=FAINT, alpha=0.6)
    mean = np.mean([y for _, y in curves], axis=0)
    label = f"mean of {len(names)} classes, {measure} {np.mean(areas):.3f}"
    axes.plot(curves[0][0], mean, color=INK, linewidth=2, label=label, zorder=4)


def _operating_points(axes: Axes, x: npt.NDArray[Any], y: npt.NDArray[Any], thresholds: npt.NDArray[Any]) -> None:
    """Where some thresholds of the probability lie on a curve."""
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        if (above := np.flatnonzero(thresholds >= threshold)).size:
            place = (x[above[-1]], y[above[-1]])
            axes.plot(*place, "o", color="tab:orange", markersize=5)
            axes.annotate(f"{threshold:g}", place, (5, -9), textcoords="offset points", fontsize=9)


def _thinned(x: npt.NDArray[Any], y: npt.NDArray[Any], points: int = 400) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """So few points that a page stays small."""
    if len(x) <= points:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, points).astype(int))
    return x[kept], y[kept]


def _square(figure: Figure, axes: Axes, x: str, y: str) -> Figure:
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside right upper" if len(labels) > 3 else "outside lower center", fontsize=8
        )
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    """Without a frame's upper and right side; names are text, never formulas."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for legend in [axes.get_legend() for axes in figure.axes] + figure.legends:
        for text in legend.get_texts() if legend else []:
            text.set_parse_math(False)
    return figure


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """A picture in grey with heat in colour on it; the hotter, the less of the picture shows through.

    Args:
        image: (H, W, 3) uint8, RGB.
        heat: (H, W), 0 to 1.

    Returns:
        (H, W, 3) uint8, RGB; grey alone where the heat is 0.
    """
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as Pillow's mode L
    grey = 51 + 0.6 * grey  # black and white would change the colours
    colour = colormaps["inferno"](0.3 + 0.7 * heat)[..., :3] * 255  # without its dark end, which looks like a shadow
    share = (0.8 * np.sqrt(heat))[..., None]
    mixed: npt.NDArray[np.uint8] = np.rint((1 - share) * grey[..., None] + share * colour).astype(np.uint8)
    return mixed


def explanations(
    images: npt.NDArray[np.uint8],
    heats: npt.NDArray[np.floating[Any]],
    titles: Sequence[str],
    captions: Sequence[str],
    columns: int = 1,
    side: float = 3.0,
) -> Figure:
    """Pairs in rows: each picture under its title, and beside it the same under its heat and a caption.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        heats: (N, H, W), 0 to 1.
        titles: N texts.
        captions: N texts.
        columns: Pairs in a row.
        side: Of a picture, in inches.
    """
    size = 9 if side > 2 else 7  # of the letters, in points
    width = round(side * 72 / size / 0.7)  # letters in a line: wide ones of DejaVu are 0.7 of their size
    texts = [[fitted(text, width) for text in pair] for pair in zip(titles, captions, strict=True)]
    lines = max((text.count("\n") + 1 for pair in texts for text in pair), default=0)
    rows = max(1, math.ceil(len(images) / columns))
    height = side + (lines * size * 1.4 + 14) / 72
    figure = Figure(figsize=(2 * side * columns, height * rows), layout="constrained")
    places = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for axes in places.ravel():
        axes.set_axis_off()
        axes.set_anchor("S")  # what height is left over is the captions'
    for (left, right), image, heat, (title, caption) in zip(places, images, heats, texts, strict=False):
        for axes, pixels, text in ((left, image, title), (right, overlay(image, heat), caption)):
            axes.imshow(pixels)
            axes.set_title(text, fontsize=size, fontfamily=font_families(), parse_math=False)
    return figure


def filter_grid(filters: npt.NDArray[np.floating[Any]], most: int = 256) -> Figure:
    """A convolution's filters, each scaled by its largest weight; a weight of 0 is middle grey.

    Args:
        filters: (N, C, h, w); in colour where C is 3, else their mean over C in grey.
        most: How many are drawn at most.
    """
    shown = filters[:most] if filters.shape[1] == 3 else filters[:most].mean(axis=1, keepdims=True).repeat(3, axis=1)
    largest = np.abs(shown).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + shown / np.where(largest == 0, 1, 2 * largest)  # (N, 3, h, w), 0 to 1
    count, _, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = max(1, round(width / 8))
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for number, tile in enumerate(tiles):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    figure = Figure(figsize=(6, 6 * rows / columns + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(canvas, interpolation="nearest")
    of = "" if count == len(filters) else f"the first {count} of "
    axes.set_title(f"first layer: {of}{len(filters)} filters, {height}x{width}", fontsize=9)
    return figure
