"""What TensorBoard shows: figures.py, what a fit writes, and a real TensorBoard in a real browser."""

import csv
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import answers, cli, figures, projector
from project.classifier import Classifier
from project.data.dataset import ImageDataset
from tests.conftest import ALIVE, COLOURS, SEED, SMALL, make_pictures
from tests.same_run import checkpoint

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "2"]
RUN = Path("runs/photos/version_0")
DRAWN = ("confusion_matrix", "precision_recall", "reliability", "roc", "samples")


def test_image_grid_has_a_title_over_each_picture():
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    titles = [f"class $_{n}" for n in range(10)]
    figure = figures.image_grid(images, titles, columns=4, wrong=[n == 3 for n in range(10)])
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == titles
    for shown, text, image in zip(axes.images, axes.texts, images, strict=True):
        assert (shown.get_array() == image).all()
        left, right, bottom, top = shown.get_extent()
        assert left < text.get_position()[0] < right
        assert top - 0.1 < text.get_position()[1] < top < bottom
    (mark,) = axes.patches
    assert mark.get_xy() == (axes.images[3].get_extent()[0], axes.images[3].get_extent()[3])


def events(run):
    """Everything in a run's event files."""
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}).Reload()


def test_each_class_has_the_figures_of_scikit_learn():
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 4, 200), random.integers(0, 3, 200)  # 3 is never the answer
    for place in range(4):
        measured = answers.figures_of_class(true, predicted, place)
        for name, function in (("recall", "recall_score"), ("precision", "precision_score"), ("f1", "f1_score")):
            expected = getattr(reference, function)(true == place, predicted == place, zero_division=0)
            assert measured[name] == pytest.approx(expected), (place, name)


def test_tags_of_classes_are_safe_and_of_one_class_each_and_not_more_than_fit():
    names = ["a b", "a/b", "猫", "ordinary", "never"]
    assert answers.shown_classes(np.array([0, 1, 2, 3]), names) == {0: "a_b_0", 1: "a_b_1", 2: "猫", 3: "ordinary"}
    many = answers.shown_classes(np.repeat(np.arange(80), np.arange(80)), [f"c{n}" for n in range(80)])
    assert list(many) == list(range(80 - answers.MOST_CLASSES, 80))


def test_every_validation_has_figures_of_each_class_and_the_last_one_is_drawn(at_trained):
    shown = events(at_trained)
    tags = shown.Tags()
    for name in ("recall", "precision", "f1"):
        every = [shown.Scalars(f"val_class/{name}/{colour}") for colour in COLOURS]
        means = [(points[0].step, np.mean([point.value for point in points])) for points in zip(*every, strict=True)]
        assert means == [(p.step, pytest.approx(p.value, abs=1e-6)) for p in shown.Scalars(f"val/{name}")]
        assert len(means) == 3
    last = shown.Scalars("val/loss")[-1].step
    assert sorted(tags["images"]) == ["train/first_batch", *(f"val/{name}" for name in DRAWN)]
    for name in DRAWN:
        assert [image.step for image in shown.Images(f"val/{name}")] == [last]
    for colour in COLOURS:
        assert [tensor.step for tensor in shown.Tensors(f"val_class/{colour}")] == [last]
    speeds = [point.value for point in shown.Scalars("speed/pictures_per_second")]
    assert len(speeds) == 3
    assert all(value > 0 for value in speeds)
    assert all(0 <= point.value < 1 for point in shown.Scalars("speed/waiting_for_pictures"))
    assert not tags["histograms"]
    with (at_trained / "metrics.csv").open() as stream:
        assert not [column for column in next(csv.reader(stream)) if column.startswith(("val_class", "speed"))]


def test_validations_are_drawn_while_there_is_time_for_it(photos, scripted, monkeypatch):
    """Those with the lowest loss so far, and the last one."""
    monkeypatch.setattr(answers, "SHARE", math.inf)
    scripted(train=[0.5] * 5, val=[0.4, 0.6, 0.5, 0.7, 0.6])
    assert cli.main([*FIT, "--trainer.max_epochs", "5"]) == 0
    shown = events(RUN)
    steps = [point.step for point in shown.Scalars("val/loss")]
    assert [image.step for image in shown.Images("val/samples")] == [steps[epoch] for epoch in (0, 1, 3, 4)]


def test_the_projector_has_a_point_a_label_and_a_thumbnail_for_each_picture(at_trained):
    points = np.loadtxt(at_trained / projector.POINTS, delimiter="\t")
    header, *labels = (at_trained / projector.LABELS).read_text().splitlines()
    with (at_trained / "split.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "val"]
    assert header.split("\t") == ["true", "predicted", "right"]
    assert [line.split("\t")[0] for line in labels] == [row["label"] for row in rows]
    for line in labels:
        true, predicted, right = line.split("\t")
        assert (true == predicted) == (right == "yes")
    assert len(points) == len(rows) == 12
    sheet = np.asarray(Image.open(at_trained / projector.THUMBNAILS))
    assert sheet.shape == (4 * 32, 4 * 32, 3)
    data = at_trained.parents[2] / "photos"
    for place, row in enumerate(rows):
        expected = ImageDataset(data, [row["path"]], None, 32)[0][0].permute(1, 2, 0).numpy()
        top, left = 32 * (place // 4), 32 * (place % 4)
        assert (sheet[top : top + 32, left : left + 32] == expected).all()


def test_principal_components_keep_the_distances():
    features = np.random.default_rng(0).normal(size=(30, 4)) @ np.random.default_rng(1).normal(size=(4, 200))
    reduced = projector.principal(features, 50)
    assert reduced.shape == (30, 30)
    for matrix in (features, reduced):
        matrix -= matrix.mean(axis=0)
    assert np.allclose(features @ features.T, reduced @ reduced.T, atol=1e-6)
    assert np.allclose(reduced[:, 4:], 0, atol=1e-4)


def test_principal_components_of_what_a_lost_training_gives_are_finite():
    features = 1e30 * np.random.default_rng(0).normal(size=(30, 200)).astype(np.float32)
    lengths = np.linalg.norm((features - features.mean(axis=0)).astype(np.float64), axis=1)
    assert np.linalg.norm(projector.principal(features, 50), axis=1) == pytest.approx(lengths, rel=1e-3)


def test_network_whose_answers_are_no_numbers_costs_the_points_and_not_the_fit(photos, monkeypatch):
    step = Classifier.validation_step

    def spoilt(self, batch, batch_idx):
        hook = self.network[1].features.register_forward_hook(lambda _, __, output: output * math.inf)
        made = step(self, batch, batch_idx)
        hook.remove()
        return made

    monkeypatch.setattr(Classifier, "validation_step", spoilt)
    assert cli.main(FIT) == 0
    assert not list(RUN.glob("*projector*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--model.freeze", "backbone", "--data.augment", "none", "--model.name", "resnet18"],
        ["--average", "0.9", "--trainer.val_check_interval", "5"],
        ["--trainer.max_steps", "15"],
    ],
    ids=lambda options: options[0],
)
def test_every_kind_of_fit_ends_with_figures_and_points(photos, options):
    assert cli.main([*FIT, *options]) == 0
    shown = events(RUN)
    assert [image.step for image in shown.Images("val/samples")] == [shown.Scalars("val/loss")[-1].step]
    assert (RUN / projector.CONFIG).exists()


def test_names_in_any_script_and_unreadable_pictures_are_no_obstacle(workplace):
    names = ["a b", "猫", "$x_1$", "ein langer Name, der nirgends Platz hat"]
    make_pictures(workplace / "photos", dict.fromkeys(names, 24))
    for place, file in enumerate(sorted((workplace / "photos").rglob("*.png"))):
        if place % 5 == 0:
            file.write_bytes(b"")
    assert cli.main(FIT) == 0
    shown = events(RUN)
    assert {"val_class/f1/a_b", "val_class/f1/猫", "val_class/f1/_x_1_"} <= set(shown.Tags()["scalars"])
    assert "猫" in (RUN / projector.LABELS).read_text()


def test_two_classes_are_drawn_for_the_positive_one(workplace):
    make_pictures(workplace / "photos", dict.fromkeys(("blue", "red"), 30))
    assert cli.main([*FIT, "--model.positive", "blue"]) == 0
    assert {f"val/{name}" for name in DRAWN} <= set(events(RUN).Tags()["images"])


def test_nothing_is_kept_or_written_without_a_logger(photos):
    assert cli.main([*FIT, "--trainer.logger", "false"]) == 0
    assert not [*RUN.glob("events*"), *RUN.glob("projector*")]


def test_histograms_are_of_every_layer_once_an_epoch_and_change_nothing(photos):
    fit = [*FIT, *ALIVE]
    assert cli.main(fit) == cli.main([*fit, "--histograms", "true"]) == 0
    other = RUN.with_name("version_1")
    shown = events(other)
    weights = checkpoint(other)["state_dict"]
    layers = {key.removeprefix("network.") for key in weights if not key.endswith(("mean", "std"))}
    assert set(shown.Tags()["histograms"]) == {f"{kind}/{name}" for kind in ("weights", "gradients") for name in layers}
    assert [h.step for h in shown.Histograms("weights/1.head.fc.weight")] == [9, 19]
    assert all(torch.equal(value, weights[key]) for key, value in checkpoint(RUN)["state_dict"].items())
    drawn = shown.Histograms("gradients/1.head.fc.weight")[-1].histogram_value
    assert drawn.num == weights["network.1.head.fc.weight"].numel()
    assert drawn.sum_squares > 0


def test_a_full_disk_costs_the_points_and_not_the_fit(photos, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(projector.np, "savetxt", full)
    assert cli.main(FIT) == 0
    assert f"{RUN}: No space left on device; TensorBoard's PROJECTOR tab" in capsys.readouterr().out
    assert not list(RUN.glob("*projector*"))


@pytest.mark.slow
@pytest.mark.skipif("TORTURE" not in os.environ, reason="a measurement that takes a minute: make torture")
def test_cost_of_what_is_shown_is_known(workplace):
    """Of the fit of the bundled digits; prints what takes how long, and its share of the whole."""
    profiler = {"": "SimpleProfiler", ".dirpath": ".", ".filename": "cost"}
    options = [word for key, value in profiler.items() for word in (f"--trainer.profiler{key}", value)]
    started = time.monotonic()
    assert cli.main(["fit", *options, *SEED]) == 0
    total = time.monotonic() - started
    spent = {}
    for line in Path("fit-cost.txt").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.match(r"\[Callback\](Answers|FirstBatch|Figures|Pace|Projector)\b", cells[0]):
            spent[cells[0]] = float(cells[3])
    for hook, seconds in sorted(spent.items(), key=lambda pair: -pair[1])[:8]:
        print(f"{seconds:8.3f} s  {hook}")
    print(f"{sum(spent.values()):.2f} s of {total:.1f} s: {sum(spent.values()) / total:.2%}")
    assert len({hook.split("{")[0].split(".")[0] for hook in spent}) == 5


@pytest.fixture
def board(photos, scripted):
    """A real TensorBoard on a run with everything in it; its address."""
    scripted(train=[1 / 3] * 5, val=[0.4, 0.5, 0.6, 0.7, 0.8])
    assert cli.main([*FIT, "--trainer.max_epochs", "5", "--histograms", "true"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["sh", str(Path(__file__).parent.parent / "scripts" / "board.sh"), "--port", str(port)],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_tab_of_tensorboard_has_what_belongs_there(board, browser):
    from selenium.common.exceptions import WebDriverException

    def page(address, *expected):
        """Opens a page and waits until it holds all of these texts."""
        deadline, missing = time.monotonic() + 60, list(expected)
        while True:
            try:
                browser.get(address)
                break
            except WebDriverException:  # it is still starting
                assert time.monotonic() < deadline, f"no answer from {address}"
                time.sleep(0.5)
        while missing:
            assert time.monotonic() < deadline, f"not on {address}: {missing}"
            text = browser.execute_script(TEXT_WITH_SHADOWS)
            missing = [word for word in expected if word not in text]
            time.sleep(0.5)
        if target := os.environ.get("KEEP_SCREENSHOTS"):  # to look at
            time.sleep(4)
            browser.save_screenshot(
                str(Path(target, address.split("?")[1].replace("/", "").replace("#", "-") + ".png"))
            )

    run = "photos/version_0"
    page(f"{board}/?tagFilter=train#timeseries", run, "train/accuracy", "train/loss", "train/first_batch")
    page(
        f"{board}/?tagFilter=val/(a|f|l|rec)#timeseries",
        "val/accuracy",
        "val/auroc",
        "val/f1",
        "val/loss",
        "val/recall",
    )
    page(f"{board}/?tagFilter=val_class/f1#timeseries", *(f"val_class/f1/{name}" for name in COLOURS))
    page(f"{board}/?tagFilter=speed#timeseries", "speed/pictures_per_second", "speed/waiting_for_pictures")
    page(f"{board}/?images#images", *(f"val/{name}" for name in DRAWN))
    page(f"{board}/?curves#pr_curves", *(f"val_class/{name}" for name in COLOURS))
    page(f"{board}/?histograms#histograms", "gradients/1.classifier.1.weight")
    page(f"{board}/?text#text", "watcher/stuck", "guessing gives")
    page(f"{board}/?projector#projector", "Points:12", "Dimension:12", "projector_labels.tsv")
    page(f"{board}/?hparams#hparams", "val_best/loss", "model/name", "flip")
    page(f"{board}/?graphs#graphs", "Main Graph", "Sequential", run)
    assert "latest" not in browser.execute_script(TEXT_WITH_SHADOWS)


TEXT_WITH_SHADOWS = """
function text(node) {
    let found = node.nodeType === Node.TEXT_NODE ? node.textContent.trim() : "";
    const inside = [node.shadowRoot, node.contentDocument && node.contentDocument.body].filter(Boolean);
    for (const child of [...inside, ...node.childNodes]) found += text(child);
    return found;
}
return text(document.body);
"""
