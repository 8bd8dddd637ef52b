"""Figures of predictions and heat maps, and the names in them."""

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from project.evaluation import figures, fonts, html
from project.evaluation.scores import ScoredPredictions
from tests.evaluation.test_scores import drawn

LONG = "ein sehr langer Name einer Klasse, der nirgends hineinpasst"
NAMES = [LONG, "黒猫", "собака", "$x_1$", "<b>&amp;", "\udcff\x07"]


@pytest.mark.parametrize(("classes", "absent", "images"), [(2, None, 400), (6, 1, 10_000), (10, 3, 400), (100, 5, 400)])
def test_every_figure_is_drawn_small_with_any_number_of_classes_and_images_and_any_name(classes, absent, images):
    scored = ScoredPredictions(*drawn(classes, images, absent), 1 if classes == 2 else None)
    names = [*NAMES, *(f"class {index}" for index in range(len(NAMES), classes))][:classes]
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
    scored = ScoredPredictions(*drawn(2), positive=0)
    axes = figures.roc(scored, ["no", "yes"]).axes[0]
    is_positive, score = scored.true == 0, scored.probabilities[:, 0]
    assert np.allclose(axes.lines[1].get_data(), scored.ranked[0].roc())
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
    names = ["Comic Sans MS", "Noto Sans Tamil", "Noto Sans CJK SC"]
    monkeypatch.setattr(font_manager, "get_font_names", lambda: names)
    assert fonts.families() == ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans Tamil"]
    figure = figures.image_grid(np.zeros((1, 8, 8, 3), np.uint8), ["猫"])
    assert figure.axes[0].texts[0].get_family()[0] == "DejaVu Sans"


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
    image, heat = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))
    strange = "猫\u200d$\udcff$\x07 \\frac{$ " + 300 * "long name " + "\n" + 200 * "猫"
    for text in (strange, "name " * 60 + "\n12.3%, predicted: " + "other " * 60):
        for columns, side in ((1, 3.0), (3, 1.5)):
            note = "only 3 x 3 cells, too coarse to locate anything"
            figure = figures.explanations([(image, heat, text, text)], columns, side, note)
            figure.draw_without_rendering()
            grid, scale = figure.axes
            boxes = [text.get_window_extent() for text in grid.texts]
            assert min(box.y0 for box in boxes) >= grid.bbox.y0 >= scale.bbox.y1
            assert scale.get_tightbbox().x0 >= 0
            assert scale.get_tightbbox().y0 >= 0
            assert scale.get_tightbbox().x1 < (box := figure.texts[0].get_window_extent()).x0
            assert box.x1 < figure.bbox.width
            assert max(box.width for box in boxes) < side * figure.dpi * 1.05


def test_overlay_is_grey_where_there_is_no_heat_and_coloured_where_there_is():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    heat = np.zeros((16, 16), dtype=np.float32)
    heat[:, 8:] = 1
    pixels = figures.overlay(image, heat)
    assert (pixels.dtype, pixels.shape) == (np.uint8, image.shape)
    assert np.ptp(pixels[:, :8], axis=2).max() == 0
    assert np.ptp(pixels[:, 8:], axis=2).min() > 50
    grey = np.asarray(Image.fromarray(image[:, :8]).convert("L"))
    assert np.corrcoef(pixels[:, :8, 0].ravel(), grey.ravel())[0, 1] > 0.99


def test_filters_are_drawn_in_colour_where_they_have_three_channels_else_in_grey():
    for channels, coloured in ((3, True), (1, False), (5, False)):
        (axes,) = figures.filter_grid(torch.randn(300, channels, 5, 4)).axes
        canvas = axes.images[0].get_array()
        assert (np.ptp(canvas, axis=2).max() > 0.1) == coloured
        assert canvas.min() == 0 or canvas.max() == 1
        assert axes.get_title() == "first layer: the first 256 of 300 filters, 5x4"
    assert np.all(figures.filter_grid(torch.zeros(1, 3, 2, 2)).axes[0].images[0].get_array() == 0.5)
