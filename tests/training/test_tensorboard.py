"""What a fit writes for TensorBoard, and a real TensorBoard in a real browser."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli
from project.classifier import Classifier
from project.data.dataset import ImageDataset
from project.evaluation import figures
from project.training import tensorboard
from tests.conftest import ALIVE, COLOURS, SMALL, make_images, read_csv
from tests.same_run import checkpoint

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "2"]
RUN, PROJECTOR = Path("runs/photos/version_0"), Path("projector", "validation")
DRAWN = ("confusion_matrix", "precision_recall", "reliability", "roc", "samples")


def test_image_grid_has_a_title_under_each_image():
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
        assert top < bottom < text.get_position()[1] < bottom + 0.1
    (mark,) = axes.patches
    assert mark.get_xy() == (axes.images[3].get_extent()[0], axes.images[3].get_extent()[3])


def events(run):
    """Everything in a run's event files."""
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}).Reload()


def test_tags_of_classes_are_safe_unique_and_at_most_fifty():
    names = ["a b", "a/b", "猫", "ordinary", "never"]
    assert tensorboard.class_tags(np.arange(4), names) == {0: "a_b_0", 1: "a_b_1", 2: "猫", 3: "ordinary"}
    many = tensorboard.class_tags(np.repeat(np.arange(80), np.arange(80)), [f"c{n}" for n in range(80)])
    assert list(many) == list(range(80 - tensorboard.MOST_CLASSES, 80))


def test_every_validation_has_metrics_of_each_class_and_the_last_one_is_drawn(at_trained):
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
    speeds = [point.value for point in shown.Scalars("speed/images_per_second")]
    assert [value > 0 for value in speeds] == [True] * 3
    assert all(0 <= point.value < 1 for point in shown.Scalars("speed/data_wait_share"))
    assert not tags["histograms"]
    columns = (at_trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert not [column for column in columns if column.startswith(("val_class", "speed"))]


def test_the_projector_has_a_point_a_label_and_a_thumbnail_for_each_image(at_trained):
    points = np.loadtxt(at_trained / PROJECTOR / "tensors.tsv", delimiter="\t")
    header, *labels = (at_trained / PROJECTOR / "metadata.tsv").read_text().splitlines()
    split = read_csv(at_trained / "split.csv")
    rows = [row for row in split if row["split"] == "val"]
    assert header.split("\t") == ["true", "predicted", "right"]
    assert [line.split("\t")[0] for line in labels] == [row["label"] for row in rows]
    for line in labels:
        true, predicted, right = line.split("\t")
        assert (true == predicted) == (right == "yes")
    assert len(points) == len(rows) == 12
    sheet = np.asarray(Image.open(at_trained / PROJECTOR / "sprite.png"))
    assert sheet.shape == (4 * 32, 4 * 32, 3)
    shown = ImageDataset(Path("photos"), [row["path"] for row in rows], None, 32)
    for index in range(len(rows)):
        expected = shown[index][0].permute(1, 2, 0).numpy()
        top, left = 32 * (index // 4), 32 * (index % 4)
        assert (sheet[top : top + 32, left : left + 32] == expected).all()


def test_earlier_validations_are_drawn_while_there_is_time_and_a_resumed_fit_replaces_the_points(
    workplace, monkeypatch, capsys
):
    monkeypatch.setattr(tensorboard, "SHARE", math.inf)
    make_images(workplace / "photos", dict.fromkeys(("blue", "red"), 30))
    assert cli.main([*FIT, "--model.positive", "blue"]) == 0
    before = (RUN / PROJECTOR / "tensors.tsv").read_text()
    assert cli.main(["fit", "--resume", str(RUN), "--trainer.max_epochs", "3"]) == 0
    shown, out = events(RUN), capsys.readouterr().out
    assert "positive class: blue" in out
    assert {f"val/{name}" for name in DRAWN} <= set(shown.Tags()["images"])
    assert [image.step for image in shown.Images("val/samples")] == [p.step for p in shown.Scalars("val/loss")]
    assert (RUN / PROJECTOR / "tensors.tsv").read_text() != before
    assert {path.name for path in RUN.iterdir() if path.is_dir()} == {"checkpoints", "projector"}
    assert "Embedding dir exists" not in out


@pytest.mark.parametrize("scale", [1.0, 1e30])  # the square of the second is more than a float32 holds
def test_principal_components_keep_the_distances(scale):
    features = np.random.default_rng(0).normal(size=(30, 4)) @ np.random.default_rng(1).normal(size=(4, 200))
    reduced = tensorboard.principal_components((scale * features).astype(np.float32), 50) / scale
    assert reduced.shape == (30, 30)
    for matrix in (features, reduced):
        matrix -= matrix.mean(axis=0)
    assert np.allclose(features @ features.T, reduced @ reduced.T, atol=1e-3)
    assert np.allclose(reduced[:, 4:], 0, atol=1e-2)


def test_outputs_that_are_not_finite_cost_the_embedding_and_not_the_fit(photos, monkeypatch):
    step = Classifier.validation_step

    def broken(self, batch, batch_idx):
        with self.network[1].features.register_forward_hook(lambda _, __, output: output * math.inf):
            return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "validation_step", broken)
    assert cli.main(FIT) == 0
    assert not list(RUN.glob("projector*"))


def test_names_in_any_script_and_unreadable_images_are_no_obstacle(workplace):
    names = ["a b", "猫", "$x_1$", "ein langer Name, der nirgends Platz hat"]
    make_images(workplace / "photos", dict.fromkeys(names, 24))
    for file in sorted((workplace / "photos").rglob("*.png"))[::5]:
        file.write_bytes(b"")
    assert cli.main(FIT) == 0
    shown = events(RUN)
    assert {"val_class/f1/a_b", "val_class/f1/猫", "val_class/f1/_x_1_"} <= set(shown.Tags()["scalars"])
    assert "猫" in (RUN / PROJECTOR / "metadata.tsv").read_text()


@pytest.mark.full
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


@pytest.fixture
def board(photos, scripted):
    """The address of a real TensorBoard that shows a run with everything in it."""
    scripted(train=[1 / 3] * 3, val=[0.4, 0.5, 0.6])
    assert cli.main([*FIT, "--trainer.max_epochs", "3", "--histograms", "true"]) == 0
    script = Path(__file__).parents[2] / "scripts" / "board.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    with subprocess.Popen(["sh", script, "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        process.terminate()


TABS = {
    "tagFilter=train#timeseries": ("photos/version_0", "train/accuracy", "train/loss", "train/first_batch"),
    "tagFilter=val/(a|f|l|rec)#timeseries": [f"val/{name}" for name in ("accuracy", "auroc", "f1", "loss", "recall")],
    "tagFilter=val_class/f1#timeseries": [f"val_class/f1/{name}" for name in COLOURS],
    "tagFilter=speed#timeseries": ("speed/images_per_second", "speed/data_wait_share"),
    "images#images": [f"val/{name}" for name in DRAWN],
    "curves#pr_curves": [f"val_class/{name}" for name in COLOURS],
    "histograms#histograms": ["gradients/1.classifier.1.weight"],
    "text#text": ("diagnostics/stuck", "guessing gives"),
    "projector#projector": ("Points:12", "Dimension:12", "metadata.tsv"),
    "hparams#hparams": ("val_best/loss", "model/name", "flip"),
    "graphs#graphs": ("Main Graph", "Sequential", "photos/version_0"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_tab_of_tensorboard_has_what_belongs_there(board, browser):
    for tab, texts in TABS.items():
        browser.get(f"{board}?{tab}")
        deadline, shown = time.monotonic() + 60, ""
        while missing := [text for text in texts if text not in shown]:
            assert time.monotonic() < deadline, f"not in {tab}: {missing}"
            time.sleep(0.1)
            shown = browser.execute_script(TEXT_WITH_SHADOWS)
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
