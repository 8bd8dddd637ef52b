"""The report: its scores against scikit-learn, its page, comparisons, bundles, and what is refused."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.nn import functional

from project import cli, files, load
from project.evaluation import report, results, scores
from project.inference import calibration, predictions
from project.inference.load import locate
from tests.conftest import COLOURS, SMALL, make_images, read_csv

RUN = Path("runs/photos/version_0")


class Page:
    """A page's source, text, images and addresses."""

    def __init__(self, file=RUN / "report.html"):
        self.source = file.read_text(encoding="utf-8")
        tags = [tag for tag in re.findall(r"<(/?\w+)", self.source) if tag not in ("meta", "img", "br", "wbr")]
        assert Counter(tag for tag in tags if tag[0] != "/") == Counter(tag[1:] for tag in tags if tag[0] == "/")
        text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", self.source.replace("<wbr>", ""), flags=re.DOTALL)
        self.text = " ".join(html.unescape(text).split())
        self.images = re.findall(r'<img [^>]*alt="([^"]*)"', self.source)
        self.addresses = re.findall(r'(?:src|href)="([^"]*)"', self.source)


def read(file=RUN / "predictions.csv"):
    return results.TestPredictions.read(file)


@pytest.fixture
def run(tested, tmp_path, monkeypatch):
    """A copy of the tested run, in the current folder."""
    shutil.copytree(tested, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return RUN


def test_page_is_self_contained_has_the_metrics_of_the_test_describes_the_run_and_begins_with_the_worst_errors(run):
    page, table = Page(), read()
    scored = table.scored(None)
    values = scored.scores()
    measured = json.loads((run / "test_metrics.json").read_text())
    assert 0.3 < values["accuracy"] < 1
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):  # test_scores.py has scikit-learn's
        assert values[name] == pytest.approx(measured[f"test/{name}"], abs=1e-6)
        shown = f"{scores.NAMES.get(name, name)} {scores.format_score(name, values[name])}"
        assert re.search(rf"\b{re.escape(shown)} [\d.]+ to [\d.]+", page.text), shown
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "<script" not in page.source
    assert len(page.images) >= 6 + 12
    assert all(len(text) > 10 for text in page.images)
    assert (run / "report.html").stat().st_size < 5e6
    rows = read_csv(run / "split.csv")
    splits = [row["split"] for row in rows]
    for part in (
        *("Test metrics", "Metrics per class", "Confusion matrix", "ROC and precision-recall curves", "Calibration"),
        *("Most confident errors", "Least certain predictions", "Learning curves", "Dataset", "Training"),
        f"train {splits.count('train')}, val {splits.count('val')}, test {splits.count('test')}",
        *("squeezenet1_1", "torch 2.", "always “blue”", "git commit", "lr: 0.001", "cores", " steps, finished"),
        f"Mean confidence {100 * scored.confidence.mean():.1f} %, accuracy",
    ):
        assert part in page.text, part

    errors = report.confident_errors(scored)
    assert len(errors)
    assert (scored.predicted[errors] != scored.true[errors]).all()
    assert (np.diff(scored.confidence[errors]) <= 0).all()
    positions = [page.source.index(table.paths[index].removeprefix("photos/")) for index in errors]
    assert positions == sorted(positions)
    index = report.least_certain(scored)[0]
    _, second, first = np.sort(scored.probabilities[index])
    shown = page.source[page.source.index('id="uncertain"') :].partition("</li>")[0]
    assert re.findall(r"(?:predicted:|runner-up:) .*?\((.*?)\)", shown) == [f"{first:.3f}", f"{second:.3f}"]
    val = read(run / "val_predictions.csv")
    expected = {f"photos/{row['path']}": row["label"] for row in rows if row["split"] == "val"}
    assert dict(zip(val.paths, [val.class_names[label] for label in val.true], strict=True)) == expected
    kept = json.loads((run / "checkpoints" / "best.temperature.json").read_text())
    assert kept["temperature"] == pytest.approx(calibration.fit_temperature(val.true, val.probabilities))


def test_figures_have_one_name_each_and_few_decimals_and_a_loss_of_ones_own_is_beside_the_cross_entropy(
    run, monkeypatch, capsys
):
    figure = f"{read().scored(None).scores()['cross-entropy']:.3f}"
    assert f"cross-entropy {figure} " in Page().text
    assert "computed from them, are raw." in Page().text
    assert not re.search(r"\bloss \d", Page().text)
    cross_entropy = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **options: 10 * cross_entropy(*args, **options))
    assert cli.main(["test"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("test, raw probabilities: "))
    measured = json.loads((run / "test_metrics.json").read_text())
    own = f"{measured['test/loss']:.4f}"
    assert float(own) == pytest.approx(10 * float(figure), abs=0.01)
    for shown in (line, Page().text):
        assert re.search(rf"\bcross-entropy {figure}\b", shown)
        assert re.search(rf"\bloss {own}(\s|$)", shown)
    assert f"  AUROC {measured['test/auroc']:.3f}  " in line
    assert cli.main(["validate"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^raw probabilities: val/loss \d+\.\d{4}  val/accuracy \d+\.\d %  ", said, re.MULTILINE)
    assert not re.search(r"\d\.\d{5}", line + said)


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ({0.9: 60}, {0.9: 30}, "It is not recommended: it was fitted on only 90 images."),
        ({0.9: 126}, {0.9: 14, 0.99999: 12}, "fitted on, it makes the ECE worse, 0.395 instead of 0.079."),
        ({0.9: 100}, {0.9: 50}, "predict, serve and export apply it with --calibrated."),
    ],
)
def test_temperature_is_recommended_unless_few_images_gave_it_or_it_makes_the_calibration_worse(
    run, right, wrong, sentence
):
    rows, names = [], sorted(COLOURS)
    for true, counts in (("blue", right), ("red", wrong)):
        for sure, count in counts.items():
            row = predictions.Prediction.of("", [sure, (1 - sure) / 2, (1 - sure) / 2], names)
            rows += [row._replace(true=true)] * count
    predictions.write(run / "val_predictions.csv", rows, names)
    assert cli.main(["report"]) == 0
    assert sentence in Page().text
    assert ("not recommended" in Page().text) != ("apply" in sentence)


def test_images_that_may_be_of_none_of_the_classes_are_shown_by_an_option_with_their_false_alarms(run):
    (run / "checkpoints" / "best.temperature.json").write_text("{}")  # as a run of before, which knows no logits
    assert cli.main(["report"]) == 0
    assert "none of the classes" not in Page().text
    (run / "checkpoints" / "best.temperature.json").unlink()
    assert cli.main(["report", "--unknown", "0.5"]) == 0
    val = [row.max_logit for row in predictions.read(run / "val_predictions.csv")]
    test = {"/".join(Path(row.path).parts[-2:]): row.max_logit for row in predictions.read(run / "predictions.csv")}
    threshold = sorted(val)[5]
    flagged = sorted((name for name in test if test[name] < threshold), key=test.get)
    assert 0 < len(flagged) < 24
    page = Page()
    assert f"flags {100 * 5 / 12:.1f} % of 12 validation images, on which it was chosen" in page.text
    assert f"and {100 * len(flagged) / 24:.1f} % of the 24 test images" in page.text
    section = page.source.partition('id="unknown"')[2].partition("</section>")[0]
    assert re.findall(r'alt="([^":]*): ', section) == flagged[: report.SHOWN]
    assert json.loads((run / "checkpoints" / "best.temperature.json").read_text())["max_logits"] == sorted(val)


def test_images_are_named_by_their_paths_in_the_data_set_which_break_between_folders(run):
    assert cli.main(["test", "--data.root", str(Path("photos").resolve())]) == 0
    page = Page()
    assert f"{Path.cwd()}/photos/" not in page.source
    assert re.search(r'alt="(blue|green|red)/\d+\.png: ', page.source)
    assert re.search(r"<p class=\"soft\">(blue|green|red)/<wbr>\d+\.png</p>", page.source)


@pytest.mark.slow
def test_untested_or_newer_checkpoint_is_tested_first_and_a_tested_one_is_reported_without_lightning(run):
    source = locate(run)
    assert results.is_tested(source.file)
    assert not results.is_tested(source.file.with_name("last.ckpt"))
    (run / "test_metrics.json").write_text("{")  # as good as none
    assert not results.is_tested(source.file)
    assert results.gather(source, source.load()).measured == {}
    for name in ("predictions.csv", "report.html", "val_predictions.csv"):
        (run / name).unlink()
    assert cli.main(["report"]) == 0
    assert results.is_tested(source.file)
    before = (run / "predictions.csv").stat()
    code = "import sys; from project import cli; cli.main(['report']); sys.exit('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {run}/report.html\n"), done.stderr
    assert (run / "predictions.csv").stat().st_mtime_ns == before.st_mtime_ns
    os.utime(source.file, (before.st_mtime + 10, before.st_mtime + 10))
    assert not results.is_tested(source.file)


def test_missing_and_unreadable_images_are_named_and_metrics_added_to_training_are_shown(run):
    victim = read().paths[0].removeprefix("photos/")
    Path("photos", victim).write_bytes(b"")
    assert cli.main(["test"]) == 0
    assert "1 test images could not be read" in Page().text
    assert f"unreadable: {victim}" in Page().text
    shutil.rmtree("photos")
    (run / "val_predictions.csv").unlink()
    measured = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").write_text(json.dumps(measured | {"test/kappa": 0.12345}))
    assert cli.main(["report"]) == 0
    assert "The test images are missing." in Page().text
    assert "kappa 0.123" in Page().text


def test_runs_are_compared_on_the_images_that_both_have_predicted_or_refused(run, refused):
    other = shutil.copytree(run, run.with_name("version_1"))
    file, names, table = other / "predictions.csv", sorted(COLOURS), read()
    rows = list(predictions.read(file))[:0:-1]  # in another order, without the first
    predictions.write(file, [row._replace(probabilities=(0.5, 0.3, 0.2)) for row in rows], names)
    compare = ["report", str(run), "--compare", str(other)]
    assert cli.main([*compare, "--out", "both.html"]) == 0
    first = (table.probabilities.argmax(axis=1) == table.true)[1:].mean()
    second = (table.true[1:] == 0).mean()  # all are predicted as blue
    text = Page(Path("both.html")).text
    assert f"accuracy {100 * first:.1f} % {100 * second:.1f} % {100 * (second - first):+.1f} [" in text
    assert f"On the {len(rows)} test images that all runs have predicted" in text
    assert "photos/version_1" in text
    text = file.read_text()
    os.utime(other / "checkpoints" / "best.ckpt")  # another one since
    assert "has not been tested; run: python -m project.cli test" in refused(*compare)
    os.utime(file)
    assert cli.main([*compare, "--out", "again.html"]) == 0
    file.unlink()
    assert "has not been tested; run: python -m project.cli test" in refused(*compare)
    for old, new, reason in (
        ("photos/", "elsewhere/", "no test image in common"),
        ("blue", "azure", "different classes"),
    ):
        file.write_text(text.replace(old, new))
        assert reason in refused(*compare)


@pytest.fixture
def bundle(run, packed):
    """A bundle in its run."""
    return shutil.copytree(packed, run / "bundle")


def test_bundle_is_reported_by_its_own_predictions(run, bundle, refused):
    before = sorted(bundle.iterdir())
    assert cli.main(["report", str(bundle), "--data", "photos", "--out", "page.html"]) == 0
    assert sorted(bundle.iterdir()) == before  # a predictions.csv of the user would stay
    predictor = load(bundle)
    table = results.gather(locate(bundle), predictor, "photos").test
    assert len(table.paths) == 24
    (prediction,) = predictor.predict(table.paths[3:4])
    assert prediction.probabilities == pytest.approx(tuple(table.probabilities[3]), abs=1e-8)
    text = Page(Path("page.html")).text
    assert f"{100 * table.scored(None).scores()['accuracy']:.1f} %" in text
    assert "Measured on 24 test images." in text
    assert "trained on some" not in text
    assert "heat maps (Grad-CAM) show" in text
    assert "No temperature is built in" in text
    assert "No test image of" in refused("report", str(bundle), "--data", "nowhere")
    assert "--data is for bundles" in refused("report", str(run), "--data", "photos")
    bundle.rename("moved")  # without split.csv beside it
    assert cli.main(["report", "moved", "--data", "photos"]) == 0
    assert "may have been trained on some of these test images" in Page(Path("moved/report.html")).text
    Path("split.csv").write_text("file,fold\na.png,1\n")
    assert "has no column label, path, split; it has file, fold" in refused("report", "moved", "--data", "photos")


def test_bundle_is_compared_with_its_run_which_cannot_be_written(run, bundle, monkeypatch):
    (run / "val_predictions.csv").unlink()
    write = files.replacing

    def refuse(file, *mode):
        if run.resolve() in file.resolve().parents:
            raise OSError(30, "Read-only file system", str(file))
        return write(file, *mode)

    monkeypatch.setattr(files, "replacing", refuse)
    assert cli.main(["report", str(run), "--compare", str(bundle), "--out", "both.html"]) == 0
    text = Page(Path("both.html")).text
    assert "photos/version_0 (raw)" in text
    assert "version_0/bundle (raw)" in text
    assert re.search(r"accuracy ([\d.]+ %) \1 \+0\.0 \[\+0\.0, \+0\.0\]", text)
    assert "a temperature fitted on the validation images" in text
    assert not (run / "val_predictions.csv").exists()


def test_damaged_predictions_and_existing_or_unwritable_outputs_are_refused(run, refused):
    Path("mine.html").write_text("mine")
    assert "mine.html" in refused("report", "--out", "mine.html")
    assert Path("mine.html").read_text() == "mine"
    assert "no/such" in refused("report", "--out", "mine.html/no/such.html")
    assert "nowhere" in refused("report", "nowhere")
    file = run / "predictions.csv"
    text = file.read_text()
    header, *rows = text.splitlines()
    for spoiled in (
        "",
        "a,b\n1,2\n",
        f"{header}\n",
        text.replace(",red,", ",crimson,"),
        "\n".join(line.rsplit(",", 1)[0] for line in [header, *rows]),  # a column less
        "\n".join([header, *(f"{row},0.5" for row in rows)]),  # a number more
        "\x00\x01",
    ):
        file.write_text(spoiled)
        assert "predictions.csv" in refused("report", str(run))


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
