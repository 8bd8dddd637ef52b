"""Figures of predictions, and the names in them."""

import os

import numpy as np
import pytest
from matplotlib import font_manager
from sklearn import metrics as reference

from project.evaluation import figures, fonts, html
from project.evaluation.scores import ScoredPredictions


def drawn(classes, count=400, absent=None, positive=None):
    random = np.random.default_rng(0)
    true = random.integers(classes, size=count)
    if absent is not None:
        true[true == absent] = 0
    logits = random.normal(0, 1, (count, classes))
    logits[np.arange(count), true] += 2
    probabilities = np.exp(logits)
    return ScoredPredictions(true, probabilities / probabilities.sum(axis=1, keepdims=True), positive)


NAMES = [
    "ein sehr langer Name einer Klasse, der nirgends hineinpasst",
    "黒猫",
    "собака",
    "$x_1$",
    "<b>&amp;",
    "\udcff\x07",
]


@pytest.mark.parametrize(("classes", "absent"), [(2, None), (6, 1), (10, 3), (100, 5)])
def test_every_figure_is_drawn_with_any_number_of_classes_and_any_name(classes, absent):
    scored = drawn(classes, absent=absent, positive=1 if classes == 2 else None)
    names = [NAMES[index] if index < len(NAMES) else f"class {index}" for index in range(classes)]
    for draw, *args in (
        (figures.confusion_matrix, scored.confusion(), names),
        (figures.roc, scored, names),
        (figures.precision_recall, scored, names),
        (figures.reliability, scored, scored),
        (figures.coverage, scored),
    ):
        assert len(html.drawing(draw, *args)["source"]) < 400_000


def test_confusion_matrix_shows_counts_shares_and_the_most_confused_pairs():
    counts = np.diag(np.full(3, 9.0))
    counts[0, 1] = 1
    texts = [text.get_text() for text in figures.confusion_matrix(counts, ["a", "b", "c"]).axes[0].texts]
    assert texts == ["9\n90 %", "1\n10 %", "9\n100 %", "9\n100 %"]
    many = np.diag(np.full(40, 9.0))
    many[3, 7], many[8, 2] = 5, 2
    beside = figures.confusion_matrix(many, [f"k{index}" for index in range(40)]).axes[1]
    assert [label.get_text() for label in beside.get_yticklabels()] == ["k3 → k7", "k8 → k2"]
    assert [bar.get_width() for bar in beside.patches] == [5, 2]


def test_roc_of_two_classes_is_that_of_the_positive_one_with_thresholds():
    scored = drawn(2, positive=0)
    axes = figures.roc(scored, ["no", "yes"]).axes[0]
    is_positive, score = scored.true == 0, scored.probabilities[:, 0]
    alarms, hits, _ = reference.roc_curve(is_positive, score, drop_intermediate=False)
    line = axes.lines[1]
    corners = {(round(x, 9), round(y, 9)) for x, y in zip(alarms, hits, strict=True)}
    assert {(round(x, 9), round(y, 9)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)} <= corners
    assert len(line.get_xdata()) > 100
    point = next(line for line, note in zip(axes.lines[2:], axes.texts, strict=True) if note.get_text() == "0.5")
    assert point.get_xdata()[0] == pytest.approx((score >= 0.5)[~is_positive].mean())
    assert point.get_ydata()[0] == pytest.approx((score >= 0.5)[is_positive].mean())


def test_reliability_draws_bins_of_ten_images_or_more_and_counts_all():
    confidence = np.repeat([0.95, 0.7, 0.55], [30, 9, 10])
    scored = ScoredPredictions(np.zeros(49, int), np.stack([confidence, 1 - confidence], axis=1))
    above, below = figures.reliability(scored).axes
    accuracy = np.asarray(above.lines[1].get_ydata())
    assert np.flatnonzero(np.isfinite(accuracy)).tolist() == [8, 14]  # of 15 bins; 0.7 is in the tenth, with 9 images
    counts = [text.get_text() for text in below.texts]
    assert [counts[index] for index in (8, 10, 14)] == ["10", "9", "30"]
    assert "".join(counts) == "10930"


def test_installed_fonts_for_other_scripts_follow_dejavu(monkeypatch):
    monkeypatch.setattr(
        font_manager, "get_font_names", lambda: ["Comic Sans MS", "Noto Sans Tamil", "Noto Sans CJK SC"]
    )
    assert fonts.families() == ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans Tamil"]
    assert (
        figures.image_grid(np.zeros((1, 8, 8, 3), np.uint8), ["猫"]).axes[0].texts[0].get_family()[0] == "DejaVu Sans"
    )


def test_long_and_strange_texts_are_drawn_in_their_lines():
    assert fonts.wrapped("a name\nsecond", 40) == "a name\nsecond"
    assert fonts.shortened("a\u200db\udcff\x07", 9) == "a\u200db??"
    for text in (50 * "many words " + "end", 300 * "x" + "end", 20 * "longer, lengthy words " + "end"):
        lines = fonts.wrapped(f"start {text}", 20).split("\n")
        assert len(lines) <= 3
        assert max(map(len, lines)) <= 20
        assert lines[0].startswith("start")
        assert lines[-1].endswith("end")
        assert "…" in "".join(lines)
    strange = ["猫\u200d$\udcff$\x07 \\frac{$ " + 300 * "long name " + "\n" + 200 * "猫"]
    figure = figures.explanations(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8)), strange, strange)
    figure.savefig(os.devnull, format="png")
