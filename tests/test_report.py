"""The report: its numbers against scikit-learn, its page, its figures, and what it refuses."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

from project import calibration, cli, comparison, figures, gallery, load, page, results, runs
from project.scores import Sample
from tests.conftest import COLOURS, SMALL, make_pictures, mislabel


class Page(HTMLParser):
    """A page's text, pictures and addresses."""

    def __init__(self, file):
        super().__init__()
        self.text, self.pictures, self.addresses, self.open = "", [], [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.pictures.append(attributes)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture
def run(tested, tmp_path, monkeypatch):
    """A copy of it; the current folder."""
    shutil.copytree(tested, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return Path("runs/photos/version_0")


def test_headline_is_that_of_scikit_learn_on_predictions_csv(run):
    shown = Page(run / "report.html").text
    with (run / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = sorted(COLOURS)
    true = [row["true"] for row in rows]
    said = [row["label"] for row in rows]
    probabilities = np.array([[float(row[f"p:{name}"]) for name in names] for row in rows])
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # they have nine digits
    assert 0.3 < reference.accuracy_score(true, said) < 1
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": f"{100 * reference.accuracy_score(true, said):.1f} %",
        "precision": f"{100 * reference.precision_score(true, said, **macro):.1f} %",
        "recall": f"{100 * reference.recall_score(true, said, **macro):.1f} %",
        "F1": f"{reference.f1_score(true, said, **macro):.3f}",
        "AUROC": f"{reference.roc_auc_score(true, probabilities, multi_class='ovr', labels=names):.3f}",
    }
    for name, value in expected.items():
        assert re.search(rf"\b{name}\s*{re.escape(value)}\s*[\d.]+ to [\d.]+", shown), (name, value)
    measured = json.loads((run / "test_metrics.json").read_text())
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        sample = results.read(run / "predictions.csv").sample(None)
        assert sample.figures()[name] == pytest.approx(measured[f"test/{name}"], abs=1e-6)


def test_page_needs_nothing_else_and_every_picture_has_a_text(run):
    shown = Page(run / "report.html")
    assert shown.addresses
    assert all(address.startswith("data:image/") for address in shown.addresses)
    assert "<script" not in shown.source
    assert len(shown.pictures) >= 6 + 12
    assert all(len(picture["alt"]) > 10 for picture in shown.pictures)
    assert (run / "report.html").stat().st_size < 5e6


def test_page_tells_what_was_run_on_what_and_how(run):
    text = " ".join(Page(run / "report.html").text.split())
    with (run / "split.csv").open() as stream:
        splits = [row["split"] for row in csv.DictReader(stream)]
    assert f"train {splits.count('train')}, val {splits.count('val')}, test {splits.count('test')}" in text
    for part in (
        "squeezenet1_1",
        "torch 2.",
        "always “blue”",
        "git commit",
        "lr: 0.001",
        "cores",
        " steps, finished",
    ):
        assert part in text, part


def test_wrong_pictures_are_shown_the_surest_first(run):
    sample = results.read(run / "predictions.csv").sample(None)
    worst = gallery.worst_errors(sample)
    sure = sample.confidence[worst]
    assert len(worst)
    assert (sample.predicted[worst] != sample.true[worst]).all()
    assert (np.diff(sure) <= 0).all()
    shown = Page(run / "report.html")
    paths = results.read(run / "predictions.csv").paths
    positions = [shown.source.index(paths[place]) for place in worst]
    assert positions == sorted(positions)


def test_temperature_is_found_on_validation_pictures_and_predict_uses_it(run, capsys):
    val = results.read(run / "val_predictions.csv")
    with (run / "split.csv").open() as stream:
        mine = {f"photos/{row['path']}": row["label"] for row in csv.DictReader(stream) if row["split"] == "val"}
    assert dict(zip(val.paths, [val.class_names[place] for place in val.true], strict=True)) == mine
    kept = json.loads((run / "checkpoints" / "best.temperature.json").read_text())
    assert kept["temperature"] == pytest.approx(calibration.fit_temperature(val.true, val.probabilities))
    assert kept["loss_after"] <= kept["loss_before"]


def test_untested_run_is_tested_first_and_a_tested_one_is_not_tested_again(run, capsys):
    for name in ("predictions.csv", "test_metrics.json", "report.html", "val_predictions.csv"):
        (run / name).unlink()
    assert cli.main(["report"]) == 0
    assert (run / "test_metrics.json").exists()
    before = (run / "predictions.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    assert (run / "predictions.csv").stat().st_mtime_ns == before


def test_checkpoint_that_is_newer_than_its_predictions_is_tested_again(run):
    assert results.is_tested(runs.find(run))
    later = time.time() + 10
    os.utime(run / "checkpoints" / "best.ckpt", (later, later))
    assert not results.is_tested(runs.find(run))
    assert not results.is_tested(run / "checkpoints" / "last.ckpt")


def test_report_without_the_pictures_says_so_instead_of_showing_them(run):
    shutil.rmtree("photos")
    (run / "val_predictions.csv").unlink()
    assert cli.main(["report"]) == 0
    text = Page(run / "report.html").text
    assert "The test pictures are not there any more." in text


def test_metric_that_was_added_to_training_shows_in_the_report(run):
    measured = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").write_text(json.dumps(measured | {"test/kappa": 0.12345}))
    assert cli.main(["report"]) == 0
    assert re.search(r"kappa\s*0\.123", Page(run / "report.html").text)


def test_unreadable_test_picture_is_named_and_not_counted(run):
    victim = results.read(run / "predictions.csv").paths[0]
    Path(victim).write_bytes(b"")
    assert cli.main(["test"]) == 0
    text = " ".join(Page(run / "report.html").text.split())
    assert "1 test pictures could not be read" in text
    assert f"unreadable: {victim}" in text


def second_run(seed="3"):
    options = ["--data.split", "runs/photos/version_0/split.csv", "--seed_everything", seed]
    assert cli.main(["fit", "--data.root", "photos", *SMALL, *options, "--trainer.max_epochs", "1"]) == 0
    assert cli.main(["test", "--report", "false"]) == 0
    return Path("runs/photos/version_1")


def test_runs_side_by_side_show_differences_of_pairs(run):
    other = second_run()
    assert not (other / "report.html").exists()
    assert cli.main(["report", str(run), "--compare", str(other), "--out", "both.html"]) == 0
    text = " ".join(Page(Path("both.html")).text.split())
    first, second = (results.read(one / "predictions.csv").sample(None).figures()["accuracy"] for one in (run, other))
    expected = [f"{100 * first:.1f} %", f"{100 * second:.1f} %", f"{100 * (second - first):+.1f} ["]
    assert re.search(r"accuracy\s*" + r"\s*".join(map(re.escape, expected)), text)
    assert "photos/version_1" in text


def test_bundle_is_reported_by_its_own_answers(packed, at_trained, tmp_path, monkeypatch, refused):
    folder, out = tmp_path / "bundle", tmp_path / "page.html"
    shutil.copytree(packed, folder)
    shutil.copy(at_trained / "split.csv", tmp_path)
    shutil.copytree("photos", tmp_path / "photos")
    mislabel(tmp_path / "photos", tmp_path / "split.csv")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.iterdir())
    assert cli.main(["report", str(folder), "--data", "photos", "--out", str(out)]) == 0
    assert sorted(folder.iterdir()) == before  # whoever has a predictions.csv there keeps it
    table = results.of_bundle(folder, load(folder), "photos").test
    assert len(table.paths) == 24
    (made,) = load(folder).predict(table.paths[3:4])
    assert made.probabilities == pytest.approx(tuple(table.probabilities[3]), abs=1e-8)
    text = Page(out).text
    assert f"{100 * table.sample(None).figures()['accuracy']:.1f} %" in text
    assert "Measured on 24 test pictures." in text
    assert "learned from some" not in text
    assert "what speaks for the answer (Grad-CAM)" in text
    calibrated = load(folder).metadata["calibrated"]
    assert ("The temperature" if calibrated else "No temperature is built in") in text
    assert "test pictures of" in refused("report", str(tmp_path / "bundle"), "--data", "nowhere")
    assert "--data is for bundles" in refused("report", str(at_trained), "--data", "photos")
    (tmp_path / "split.csv").unlink()
    assert cli.main(["report", str(folder), "--data", "photos"]) == 0
    assert "it may have learned from some of these test pictures" in Page(folder / "report.html").text


def test_bundle_stands_beside_its_run(run, refused):
    assert cli.main(["export", str(run)]) == 0
    assert cli.main(["report", str(run), "--compare", str(run / "bundle"), "--out", "both.html"]) == 0
    text = " ".join(Page(Path("both.html")).text.split())
    assert "photos/version_0" in text
    assert "version_0/bundle" in text
    assert re.search(r"accuracy\s*([\d.]+ %)\s*\1\s*\+0\.0 \[\+0\.0, \+0\.0\]", text)


def test_validation_pictures_are_measured_where_the_run_cannot_be_written(run, capsys, monkeypatch):
    (run / "val_predictions.csv").unlink()
    write = results.predictions.write

    def refuse(file, *rest):
        if file.parent == run:
            raise OSError(30, "Read-only file system", str(file))
        write(file, *rest)

    monkeypatch.setattr(results.predictions, "write", refuse)
    assert cli.main(["report", str(run), "--out", "page.html"]) == 0
    assert "val_predictions.csv cannot be written: Read-only file system" in capsys.readouterr().err
    assert "a temperature fitted on the validation pictures" in Page(Path("page.html")).text


def test_split_that_is_another_programs_is_refused_in_a_sentence(packed, at_trained, tmp_path, refused):
    shutil.copytree(packed, tmp_path / "bundle")
    (tmp_path / "split.csv").write_text("file,fold\na.png,1\n")
    said = refused("report", str(tmp_path / "bundle"), "--data", "photos")
    assert "split.csv has no column label, path, split; it has file, fold" in said


def test_runs_that_cannot_be_compared_are_refused(run, refused):
    other = second_run()
    (other / "predictions.csv").unlink()
    assert "has not been tested; run: python -m project.cli test" in refused(
        "report", str(run), "--compare", str(other)
    )
    assert cli.main(["test", "--ckpt_path", str(other)]) == 0
    text = (other / "predictions.csv").read_text()
    (other / "predictions.csv").write_text(text.replace("photos/", "elsewhere/"))
    assert "no test picture in common" in refused("report", str(run), "--compare", str(other))
    (other / "predictions.csv").write_text(text.replace("p:blue", "p:azure").replace(",blue,", ",azure,"))
    assert "different classes" in refused("report", str(run), "--compare", str(other))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "a,b\n1,2\n",
        lambda text: text.splitlines()[0] + "\n",
        lambda text: text.replace(",red,", ",crimson,"),
        lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines()),
        lambda text: "\x00\x01",
    ],
    ids=["empty", "another table", "no rows", "an unknown class", "a column less", "bytes"],
)
def test_damaged_predictions_are_refused(run, refused, spoil):
    file = run / "predictions.csv"
    file.write_text(spoil(file.read_text()))
    assert "predictions.csv" in refused("report", str(run))


def test_existing_and_unwritable_outputs_are_refused(run, refused):
    Path("mine.html").write_text("mine")
    assert "mine.html" in refused("report", "--out", "mine.html")
    assert Path("mine.html").read_text() == "mine"
    assert "no/such" in refused("report", "--out", "mine.html/no/such.html")
    assert "nowhere" in refused("report", "nowhere")


def made(classes, count=400, absent=None, seed=0):
    random = np.random.default_rng(seed)
    true = random.integers(classes, size=count)
    if absent is not None:
        true[true == absent] = 0
    logits = random.normal(0, 1, (count, classes))
    logits[np.arange(count), true] += 2
    probabilities = np.exp(logits)
    return true, probabilities / probabilities.sum(axis=1, keepdims=True)


NAMES = ["ein sehr langer Name einer Klasse, der nirgends hineinpasst", "黒猫", "собака", "$x_1$", "<b>&amp;", "قط"]


@pytest.mark.parametrize(("classes", "absent"), [(2, None), (6, 1), (10, 3), (100, 5)])
def test_every_figure_is_drawn_at_any_number_of_classes_and_with_any_name(classes, absent):
    true, probabilities = made(classes, absent=absent)
    names = [NAMES[place] if place < len(NAMES) else f"class {place}" for place in range(classes)]
    counts = Sample(true, probabilities).confusion()
    drawings = [
        page.drawing(lambda: figures.confusion_matrix(counts, names), "alt", "caption"),
        page.drawing(lambda: figures.roc(true, probabilities, names), "alt", "caption"),
        page.drawing(lambda: figures.precision_recall(true, probabilities, names), "alt", "caption"),
        page.drawing(lambda: figures.reliability(true, probabilities, probabilities), "alt", "caption"),
        page.drawing(lambda: figures.coverage(true, probabilities), "alt", "caption"),
    ]
    assert all(len(drawing["source"]) < 400_000 for drawing in drawings)


def test_confusion_matrix_shows_counts_shares_and_the_worst_pairs():
    counts = np.diag(np.full(3, 9.0))
    counts[0, 1] = 1
    texts = [text.get_text() for text in figures.confusion_matrix(counts, ["a", "b", "c"]).axes[0].texts]
    assert texts == ["9\n90 %", "1\n10 %", "9\n100 %", "9\n100 %"]
    many = np.diag(np.full(40, 9.0))
    many[3, 7], many[8, 2] = 5, 2
    beside = figures.confusion_matrix(many, [f"k{place}" for place in range(40)]).axes[1]
    assert [label.get_text() for label in beside.get_yticklabels()] == ["k3 → k7", "k8 → k2"]
    assert [bar.get_width() for bar in beside.patches] == [5, 2]


def test_curve_of_two_classes_is_the_positive_ones_with_operating_points():
    true, probabilities = made(2)
    axes = figures.roc(true, probabilities, ["no", "yes"], 0).axes[0]
    alarms, hits, _ = reference.roc_curve(true == 0, probabilities[:, 0], drop_intermediate=False)
    line = axes.lines[1]
    corners = {(round(x, 9), round(y, 9)) for x, y in zip(alarms, hits, strict=True)}
    assert {(round(x, 9), round(y, 9)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)} <= corners
    assert len(line.get_xdata()) > 100
    point = next(line for line, note in zip(axes.lines[2:], axes.texts, strict=True) if note.get_text() == "0.5")
    said = probabilities[:, 0] >= 0.5
    assert point.get_xdata()[0] == pytest.approx((said & (true == 1)).sum() / (true == 1).sum())
    assert point.get_ydata()[0] == pytest.approx((said & (true == 0)).sum() / (true == 0).sum())


def test_names_in_the_page_are_text_not_markup(workplace):
    make_pictures(Path("pictures"), {"<script>alert(1)</script>": 12, "黒猫": 12, "red": 12})
    assert cli.main(["fit", "--data.root", "pictures", *SMALL, "--trainer.max_epochs", "1"]) == 0
    assert cli.main(["test"]) == 0
    shown = Page(Path("runs/pictures/version_0/report.html"))
    assert "<script" not in shown.source
    assert "<script>alert(1)</script>" in shown.text
    assert "黒猫" in shown.text


def test_two_classes_are_reported_for_the_positive_one(workplace):
    make_pictures(Path("pictures"), {"good": 30, "red": 12})
    options = ["--model.positive", "good", "--trainer.max_epochs", "1"]
    assert cli.main(["fit", "--data.root", "pictures", *SMALL, *options]) == 0
    assert cli.main(["test"]) == 0
    run = Path("runs/pictures/version_0")
    text = Page(run / "report.html").text
    measured = json.loads((run / "test_metrics.json").read_text())
    assert "are of “good”" in text
    assert re.search(rf"recall\s*{100 * measured['test/recall']:.1f} %", text)


def test_pictures_become_small_jpegs():
    address = page.picture(np.zeros((500, 300, 3), np.uint8))
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert picture.size == (134, 224)


def test_report_starts_without_lightning(run):
    code = (
        "import sys; from project import cli; code = cli.main(['report']); "
        "print('lightning' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("report.html\nFalse\n"), done.stdout + done.stderr


def test_compared_samples_are_the_same_pictures_in_the_same_order(run):
    table = results.read(run / "predictions.csv")
    order = np.argsort([path[::-1] for path in table.paths])[1:]
    shuffled = results.Table(
        table.class_names, [table.paths[p] for p in order], table.true[order], table.probabilities[order], {}
    )
    own, other = comparison.shared([comparison.Other("a", table, {}), comparison.Other("b", shuffled, {})], None)
    assert np.array_equal(own.probabilities, other.probabilities)
    assert len(own.true) == len(table.true) - 1


@pytest.mark.slow
def test_page_of_ten_thousand_test_pictures_takes_seconds(workplace, capsys):
    """pytest tests/test_report.py -m slow -s shows how long."""
    random = np.random.default_rng(0)
    for number in range(10):
        colour = random.integers(60, 200, 3)
        for split, count in (("train", 20), ("val", 50), ("test", 1000)):
            folder = Path("many", split, f"class {number}")
            folder.mkdir(parents=True)
            for place in range(count):
                pixels = np.clip(random.normal(colour, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(folder / f"{place}.png")
    assert cli.main(["fit", "--data.root", "many", *SMALL, "--trainer.max_epochs", "2"]) == 0
    assert cli.main(["test", "--report", "false"]) == 0
    run = Path("runs/many/version_0")
    start = time.perf_counter()
    results.gather(runs.find(run), load(run))
    predicted = time.perf_counter()
    assert cli.main(["report"]) == 0
    took = time.perf_counter() - predicted
    with capsys.disabled():
        print(f"\nreport of 10,000 pictures: {took:.1f} s, predicting {predicted - start:.1f} s")
    assert len(results.read(run / "predictions.csv").paths) == 10_000
    assert (run / "report.html").stat().st_size < 5e6
