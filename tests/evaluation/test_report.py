"""The report: its scores against scikit-learn, its page, comparisons, bundles, and what is refused."""

import csv
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
from sklearn import metrics as reference

from project import cli, load
from project.evaluation import comparison, report, results
from project.evaluation.comparison import ComparedRun
from project.inference import calibration, predictions
from project.inference.load import locate
from tests.conftest import COLOURS, SMALL, make_images, mislabel

RUN = Path("runs/photos/version_0")


class Page(HTMLParser):
    """A page's text, images and addresses."""

    def __init__(self, file=RUN / "report.html"):
        super().__init__()
        self.text, self.images, self.addresses, self.open = "", [], [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += f" {data}"


def read(file=RUN / "predictions.csv"):
    return results.TestPredictions.read(file)


def split_rows():
    with (RUN / "split.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def run(tested, tmp_path, monkeypatch):
    """A copy of the tested run, in the current folder."""
    shutil.copytree(tested, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return RUN


def test_metrics_are_those_of_scikit_learn_on_predictions_csv(run):
    with (run / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names, true, predicted = sorted(COLOURS), [row["true"] for row in rows], [row["label"] for row in rows]
    probabilities = np.array([[float(row[f"p:{name}"]) for name in names] for row in rows])
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # they have nine digits
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": f"{100 * reference.accuracy_score(true, predicted):.1f} %",
        "precision": f"{100 * reference.precision_score(true, predicted, **macro):.1f} %",
        "recall": f"{100 * reference.recall_score(true, predicted, **macro):.1f} %",
        "F1": f"{reference.f1_score(true, predicted, **macro):.3f}",
        "AUROC": f"{reference.roc_auc_score(true, probabilities, multi_class='ovr', labels=names):.3f}",
    }
    assert 0.3 < reference.accuracy_score(true, predicted) < 1
    text = Page().text
    for name, value in expected.items():
        assert re.search(rf"\b{name} {re.escape(value)} [\d.]+ to [\d.]+", text), (name, value)
    measured = json.loads((run / "test_metrics.json").read_text())
    values = read().scored(None).scores()
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        assert values[name] == pytest.approx(measured[f"test/{name}"], abs=1e-6)


def test_page_is_self_contained_and_describes_the_run_and_every_image(run):
    page = Page()
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "<script" not in page.source
    assert len(page.images) >= 6 + 12
    assert all(len(image["alt"]) > 10 for image in page.images)
    assert (run / "report.html").stat().st_size < 5e6
    splits = [row["split"] for row in split_rows()]
    headings = (
        "Test metrics",
        "Metrics per class",
        "Confusion matrix",
        "ROC and precision-recall curves",
        "Calibration",
    )
    headings += ("Most confident errors", "Least certain predictions", "Learning curves", "Dataset", "Training")
    for part in (
        *headings,
        f"train {splits.count('train')}, val {splits.count('val')}, test {splits.count('test')}",
        *("squeezenet1_1", "torch 2.", "always “blue”", "git commit", "lr: 0.001", "cores", " steps, finished"),
        f"Mean confidence {100 * read().scored(None).confidence.mean():.1f} %, accuracy",
    ):
        assert part in page.text, part


def test_errors_are_shown_the_most_confident_first(run):
    scored = read().scored(None)
    errors = report.confident_errors(scored)
    assert errors
    assert (scored.predicted[errors] != scored.true[errors]).all()
    assert (np.diff(scored.confidence[errors]) <= 0).all()
    source, paths = Page().source, read().paths
    positions = [source.index(paths[index]) for index in errors]
    assert positions == sorted(positions)


def test_temperature_is_fitted_on_the_validation_images(run):
    val = read(run / "val_predictions.csv")
    expected = {f"photos/{row['path']}": row["label"] for row in split_rows() if row["split"] == "val"}
    assert dict(zip(val.paths, [val.class_names[label] for label in val.true], strict=True)) == expected
    kept = json.loads((run / "checkpoints" / "best.temperature.json").read_text())
    assert kept["temperature"] == pytest.approx(calibration.fit_temperature(val.true, val.probabilities))
    assert kept["loss_after"] <= kept["loss_before"]


def test_untested_or_newer_checkpoint_is_tested_first_and_a_tested_one_is_not_tested_again(run, capsys):
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert results.is_tested(checkpoint)
    assert not results.is_tested(checkpoint.with_name("last.ckpt"))
    later = time.time() + 10
    os.utime(checkpoint, (later, later))
    assert not results.is_tested(checkpoint)
    os.utime(checkpoint, (0, 0))
    for name in ("predictions.csv", "test_metrics.json", "report.html", "val_predictions.csv"):
        (run / name).unlink()
    assert cli.main(["report"]) == 0
    assert (run / "test_metrics.json").exists()
    before = (run / "predictions.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    assert (run / "predictions.csv").stat().st_mtime_ns == before


def test_report_without_the_images_says_so_and_shows_metrics_added_to_training(run):
    shutil.rmtree("photos")
    (run / "val_predictions.csv").unlink()
    measured = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").write_text(json.dumps(measured | {"test/kappa": 0.12345}))
    assert cli.main(["report"]) == 0
    assert "The test images are missing." in Page().text
    assert "kappa 0.123" in Page().text


def test_auroc_just_below_1_is_not_written_as_1_and_ten_thousand_images_make_a_small_page(run):
    names = sorted(COLOURS)
    rows = [np.where(np.arange(3) == number % 3, 0.9, 0.05).tolist() for number in range(10_000)]
    rows[0], rows[2] = [0.5, 0.25, 0.25], [0.6, 0.1, 0.3]  # one red image is bluer than one blue one
    table = [predictions.Prediction.of(f"{n}.png", row, names, names[n % 3]) for n, row in enumerate(rows)]
    predictions.write(run / "predictions.csv", table, names)
    start = time.perf_counter()
    assert cli.main(["report"]) == 0
    assert time.perf_counter() - start < 60
    assert re.search(r"AUROC 0\.9{7}\d+ 0\.9{6}\d+ to 1\.0{7}", Page().text)
    assert (run / "report.html").stat().st_size < 5e6


def test_unreadable_test_image_is_named_and_not_counted(run):
    victim = read().paths[0]
    Path(victim).write_bytes(b"")
    assert cli.main(["test"]) == 0
    assert "1 test images could not be read" in Page().text
    assert f"unreadable: {victim}" in Page().text


def second_run():
    options = ["--data.split", f"{RUN}/split.csv", "--seed_everything", "3", "--trainer.max_epochs", "1"]
    assert cli.main(["fit", "--data.root", "photos", *SMALL, *options]) == 0
    assert cli.main(["test", "--report", "false"]) == 0
    return Path("runs/photos/version_1")


def test_runs_are_compared_on_the_same_images_or_refused(run, refused):
    other = second_run()
    assert not (other / "report.html").exists()
    compare = ["report", str(run), "--compare", str(other)]
    assert cli.main([*compare, "--out", "both.html"]) == 0
    first, second = (read(folder / "predictions.csv").scored(None).scores()["accuracy"] for folder in (run, other))
    expected = f"accuracy {100 * first:.1f} % {100 * second:.1f} % {100 * (second - first):+.1f} ["
    text = Page(Path("both.html")).text
    assert expected in text
    assert "photos/version_1" in text

    text = (other / "predictions.csv").read_text()
    (other / "predictions.csv").unlink()
    assert "has not been tested; run: python -m project.cli test" in refused(*compare)
    for old, new, reason in (
        ("photos/", "elsewhere/", "no test image in common"),
        ("blue", "azure", "different classes"),
    ):
        (other / "predictions.csv").write_text(text.replace(old, new))
        assert reason in refused(*compare)


def test_compared_predictions_are_of_the_same_images_in_the_same_order(run):
    table = read()
    order = np.argsort([path[::-1] for path in table.paths])[1:]
    shuffled = results.TestPredictions(
        table.class_names, [table.paths[p] for p in order], table.true[order], table.probabilities[order], {}
    )
    own, other = comparison.shared([ComparedRun("a", table, {}), ComparedRun("b", shuffled, {})], None)
    assert np.array_equal(own.probabilities, other.probabilities)
    assert len(own.true) == len(table.true) - 1


def test_bundle_is_reported_by_its_own_predictions(packed, at_trained, tmp_path, monkeypatch, refused):
    folder, out = tmp_path / "bundle", tmp_path / "page.html"
    shutil.copytree(packed, folder)
    shutil.copy(at_trained / "split.csv", tmp_path)
    shutil.copytree("photos", tmp_path / "photos")
    mislabel(tmp_path / "photos", tmp_path / "split.csv")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.iterdir())
    assert cli.main(["report", str(folder), "--data", "photos", "--out", str(out)]) == 0
    assert sorted(folder.iterdir()) == before  # a predictions.csv of the user would stay
    table = results.gather(locate(folder), load(folder), "photos").test
    assert len(table.paths) == 24
    (prediction,) = load(folder).predict(table.paths[3:4])
    assert prediction.probabilities == pytest.approx(tuple(table.probabilities[3]), abs=1e-8)
    text = Page(out).text
    assert f"{100 * table.scored(None).scores()['accuracy']:.1f} %" in text
    assert "Measured on 24 test images." in text
    assert "trained on some" not in text
    assert "heat maps (Grad-CAM) show" in text
    calibrated = load(folder).metadata.calibrated
    assert ("The temperature" if calibrated else "No temperature is built in") in text
    assert "test images of" in refused("report", str(folder), "--data", "nowhere")
    assert "--data is for bundles" in refused("report", str(at_trained), "--data", "photos")
    (tmp_path / "split.csv").unlink()
    assert cli.main(["report", str(folder), "--data", "photos"]) == 0
    assert "may have been trained on some of these test images" in Page(folder / "report.html").text
    (tmp_path / "split.csv").write_text("file,fold\na.png,1\n")
    assert "has no column label, path, split; it has file, fold" in refused("report", str(folder), "--data", "photos")


def test_bundle_is_compared_with_its_run(run):
    assert cli.main(["export", str(run)]) == 0
    assert cli.main(["report", str(run), "--compare", str(run / "bundle"), "--out", "both.html"]) == 0
    text = Page(Path("both.html")).text
    assert "photos/version_0" in text
    assert "version_0/bundle" in text
    assert re.search(r"accuracy ([\d.]+ %) \1 \+0\.0 \[\+0\.0, \+0\.0\]", text)


def test_validation_images_are_predicted_where_the_run_cannot_be_written(run, capsys, monkeypatch):
    (run / "val_predictions.csv").unlink()
    write = predictions.write

    def refuse(file, *rest):
        if file.parent == run:
            raise OSError(30, "Read-only file system", str(file))
        write(file, *rest)

    monkeypatch.setattr(predictions, "write", refuse)
    assert cli.main(["report", str(run), "--out", "page.html"]) == 0
    assert "val_predictions.csv cannot be written: Read-only file system" in capsys.readouterr().err
    assert "a temperature fitted on the validation images" in Page(Path("page.html")).text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "a,b\n1,2\n",
        lambda text: text.splitlines()[0] + "\n",
        lambda text: text.replace(",red,", ",crimson,"),
        lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines()),
        lambda text: text.splitlines()[0] + "\n" + "\n".join(f"{line},0.5" for line in text.splitlines()[1:]),
        lambda text: "\x00\x01",
    ],
    ids=["empty", "another table", "no rows", "an unknown class", "a column less", "a number more", "bytes"],
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


def test_two_classes_are_reported_for_the_positive_one_and_names_are_text_not_markup(workplace):
    name = "<script>alert(1)"
    make_images(Path("images"), {name: 30, "黒猫": 12})
    options = ["--model.positive", name, "--trainer.max_epochs", "1"]
    assert cli.main(["fit", "--data.root", "images", *SMALL, *options]) == 0
    assert cli.main(["test"]) == 0
    run = Path("runs/images/version_0")
    page = Page(run / "report.html")
    measured = json.loads((run / "test_metrics.json").read_text())
    assert f"are those of “{name}”" in page.text
    assert f"recall {100 * measured['test/recall']:.1f} %" in page.text
    assert "黒猫" in page.text
    assert "<script" not in page.source


def test_report_starts_without_lightning(run):
    code = (
        "import sys; from project import cli; code = cli.main(['report']); "
        "print('lightning' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("report.html\nFalse\n"), done.stdout + done.stderr
