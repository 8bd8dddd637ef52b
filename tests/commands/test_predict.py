import contextlib
import errno
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from project import cli, load
from project.data import manifest
from project.data.inputs import gather
from project.inference import calibration, predictions
from tests.conftest import read_csv

CLASSES = ("blue", "green", "red")


@pytest.fixture
def predict(at_trained, tmp_path):
    """Runs the verb with the trained run, or with another source, and returns the rows that it writes."""

    def run(*words, source=at_trained, out="labels.csv", code=0):
        assert cli.main(["predict", str(source), *map(str, words), "--out", str(tmp_path / out)]) == code
        return read_csv(tmp_path / out)

    return run


def gathered(images):
    return [path for path, _ in gather([str(image) for image in images])]


def in_a_process(*words, then="pass", **options):
    """Starts predict in a process of its own, which at its end also runs the code `then`."""
    code = f"import sys; from project import cli; code = cli.main(sys.argv[1:]); {then}; sys.exit(code)"
    return subprocess.Popen([sys.executable, "-c", code, "predict", *map(str, words)], **options)


def test_files_and_folders_keep_their_order_and_columns_are_the_contracts(predict, at_trained, capsys):
    rows = predict("photos/red/003.png", "photos/blue", "photos/green/000.png")
    blue = [f"photos/blue/{n:03d}.png" for n in range(40)]
    assert [row["path"] for row in rows] == ["photos/red/003.png", *blue, "photos/green/000.png"]
    assert "42 images labelled, 0 unreadable" in capsys.readouterr().out
    assert list(rows[0]) == ["path", "true", "label", "probability", "error", "p:blue", "p:green", "p:red"]
    for row, expected in zip(rows, load(at_trained).predict([r["path"] for r in rows]), strict=True):
        numbers = [float(row[f"p:{name}"]) for name in CLASSES]
        assert sum(numbers) == pytest.approx(1, abs=1e-6)
        assert numbers == pytest.approx(expected.probabilities, rel=1e-6)
        assert row["probability"] == f"{max(expected.probabilities):.9g}"
        assert (row["true"], row["error"], row["label"]) == ("", "", expected.label)
        assert all(len(re.sub(r"e.*|^0\.0*|\.", "", row[c])) <= 9 for c in row if c.startswith("p:"))


def test_unreadable_file_gets_an_error_row_and_only_such_files_fail(predict, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("not an image, and not in the list")
    rows = predict(tmp_path, code=1)
    assert "failed: No image can be read; the column error of" in capsys.readouterr().err
    assert [(Path(row["path"]).name, row["error"]) for row in rows] == [
        ("bad.jpg", "not an image, or of an unknown format"),
        ("dangling.png", "no such file or directory"),
    ]
    assert {row[c] for row in rows for c in ("true", "label", "probability", "p:red")} == {""}


@pytest.mark.slow
def test_hard_image_names_are_the_same_in_a_file_and_on_standard_output_and_only_progress_goes_to_the_terminal(
    predict, at_trained, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["-dash.png", 'a "quoted", one.png', "größe 大.png", "new\nline.png", "no\udcfftext.png"]
    for name in names:
        shutil.copy("photos/red/000.png", folder / name)
    (folder / "bad.png").write_bytes(b"")
    assert [row["path"] for row in predict(folder)] == [f"{folder}/{name}" for name in sorted([*names, "bad.png"])]
    (terminal, other), shown = os.openpty(), b""
    words, then = [at_trained, folder, "--out", "-"], "print('Lightning:', 'lightning' in sys.modules, file=sys.stderr)"
    with in_a_process(*words, then=then, stdout=subprocess.PIPE, stderr=other) as process:
        os.close(other)
        with contextlib.suppress(OSError):  # a terminal without writers
            while read := os.read(terminal, 4096):  # all along: writers wait for a terminal that nobody reads
                shown += read
        output = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0, shown
    assert output == (tmp_path / "labels.csv").read_bytes()
    for text in (b"predict", b"5 images labelled, 1 unreadable", b"Lightning: False"):
        assert text in shown
    assert b".png" not in shown


@pytest.mark.full
def test_memory_does_not_grow_with_the_number_of_images(at_trained, tmp_path):
    """Twenty times as many images take less than 10 MB more, which is what rows in a list would take."""
    peaks, then = [], "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    for count in (500, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.link("photos/red/000.png", folder / f"{number:06d}.png")
        words = [at_trained, folder, "--out", tmp_path / f"{count}.csv"]
        with in_a_process(*words, then=then, stdout=subprocess.PIPE, text=True) as process:
            peaks.append(int(process.communicate()[0].split()[-1]) / 1024)
        assert len(read_csv(tmp_path / f"{count}.csv")) == count
    assert peaks[1] - peaks[0] < 10, peaks


def test_hidden_images_are_left_out_and_patterns_csv_files_and_standard_input_mean_images(workplace, monkeypatch):
    for name in ("p/a.png", "p/.b.png", "p/.c/d.png", "p/e/f.PNG", "q/g.png", "lists/h.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("p", "linked").symlink_to(Path("q").resolve())
    folder = ["p/a.png", "p/e/f.PNG", "p/linked/g.png"]
    Path("lists/h.csv").write_text("label,path\nx,../q/g.png\n,../p/a.png\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("q/g.png\n\np/*.png\n"))
    expected = [*folder, "p/a.png", "p/e/f.PNG", "q/g.png", "p/a.png", "q/g.png", "p/a.png"]
    assert [path for path, _ in gather(["p", "p/[a]*", "p/**/f.*", "lists/h.csv", "-"])] == expected


def test_brackets_of_a_real_folder_are_no_pattern(workplace):
    for name in ("set1/a.png", "set[1]/a.png", "set[1]/b.png", "set[1]/[x]/c.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    found = gather(["set[1]/[a]*.png", "set[1]/[x]/*", "./set[12]/a.png", f"{workplace}/set[1]/b*"])
    expected = ["set[1]/a.png", "set[1]/[x]/c.png", "set1/a.png", f"{workplace}/set[1]/b.png"]
    assert [path for path, _ in found] == expected


def test_csv_files_hold_true_classes_and_may_name_missing_files(predict, tmp_path):
    photos = Path("photos").resolve()
    (tmp_path / "l.csv").write_text(f"label,path,split\nred,{photos}/red/000.png,holdout\n,{photos}/red/001.png,\n")
    (tmp_path / "t.csv").write_text(f"path,true,label\n{photos}/red/002.png,,blue\n{photos}/red/003.png,green,red\n")
    (tmp_path / "gone.csv").write_text("path\ngone.png\n")
    rows = predict(*(tmp_path / name for name in ("l.csv", "t.csv", "gone.csv")), "photos/red/004.png")
    assert [row["true"] for row in rows] == ["red", "", "", "green", "", ""]
    assert [row["error"] for row in rows] == ["", "", "", "", "no such file or directory", ""]


def test_likeliest_classes_are_printed_one_line_per_image(predict, lively, tmp_path, capsys):
    source = Path("photos/red/000.png")
    (tmp_path / "two\nlines.png").write_bytes(source.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    (prediction,) = load(lively).predict([source])
    order = sorted(zip(prediction.probabilities, CLASSES, strict=True), key=lambda pair: -pair[0])
    images = source, tmp_path / "bad.png", tmp_path / "two\nlines.png"
    for top in (2, 99):
        assert len(predict(*images, "--top", top, source=lively, out=f"{top}.csv")) == 3
        captured = capsys.readouterr()
        classes = ", ".join(f"{name} {probability:.4f}" for probability, name in order[:top])
        assert captured.out.splitlines() == [
            f"{source}: {classes}",
            f"{tmp_path}/bad.png: not an image, or of an unknown format",
            f"{tmp_path}/two\\nlines.png: {classes}",
        ]
        assert "2 images labelled, 1 unreadable" in captured.err


def test_predictions_below_the_confidence_are_marked_and_keep_their_label(predict, lively, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    images = ["photos", tmp_path / "bad.png"]
    *plain, _ = predict(*images, source=lively)
    highest = sorted(float(row["probability"]) for row in plain)
    threshold = (highest[40] + highest[41]) / 2
    *rows, unreadable = predict(*images, f"--min-confidence={threshold}", source=lively, out="marked.csv")
    assert list(rows[0])[:6] == ["path", "true", "label", "probability", "error", "abstained"]
    assert unreadable["abstained"] == ""
    marks = [row.pop("abstained") for row in rows]
    assert marks == [str(int(float(row["probability"]) < threshold)) for row in plain]
    assert marks.count("1") == 41
    assert rows == plain


def test_single_image_is_answered_without_a_file_and_more_get_the_first_default_file_that_is_free(
    trained, lively, workplace, capsys
):
    def run(*words):
        code = cli.main(["predict", str(lively), *map(str, words)])
        return code, capsys.readouterr().out

    photos = trained / "photos"
    Path("bad.png").touch()
    assert run(photos / "red" / "000.png")[1].startswith(f"{photos}/red/000.png: red 0.")
    assert run(photos / "red" / "000.png", "--min-confidence", "1")[1].endswith("; abstained\n")
    assert run("bad.png") == (1, "bad.png: not an image, or of an unknown format\n")
    assert os.listdir() == ["bad.png"]
    for name in ("predictions.csv", "predictions-2.csv", "predictions-3.csv"):
        assert run(photos / "red") == (0, f"40 images labelled, 0 unreadable: {name} (raw probabilities)\n")
        assert len(read_csv(name)) == 40
    run(photos / "blue", "--overwrite")
    assert read_csv("predictions.csv")[0]["label"] == "blue"
    run("bad.png", "--out", "asked.csv")
    assert Path("asked.csv").exists()


def test_own_output_is_read_back_from_any_folder_and_after_a_move_below_the_images(
    predict, lively, tmp_path, monkeypatch
):
    (tmp_path / "deep").mkdir()
    images = ["photos/red/000.png", str(Path("photos/blue/001.png").absolute())]
    first = predict(*images, source=lively, out="deep/first.csv")
    file = tmp_path / "deep" / "first.csv"
    again = predict(file, source=lively)
    assert [(Path(row["path"]).resolve(), row["label"]) for row in again] == [
        (Path(row["path"]).resolve(), row["label"]) for row in first
    ]
    assert all((file.parent / row.path).exists() for row in manifest.read_rows(file))
    (tmp_path / "photos").symlink_to(Path("photos").absolute())
    (below := file.parent / "er").mkdir()
    file.rename(below / "moved.csv")
    monkeypatch.chdir(below)
    assert [Path(row.path).exists() for row in manifest.read_rows(Path("moved.csv"))] == [True, True]


def test_options_of_the_predictor_reach_it(predict, lively, tmp_path):
    checkpoint, image = tmp_path / "best.ckpt", "photos/red/000.png"
    checkpoint.write_bytes((lively / "checkpoints" / "best.ckpt").read_bytes())
    calibration.write(checkpoint, 3.0)
    expected = load(checkpoint, calibrated=True).predict([image], tta=True)[0].probabilities
    (row,) = predict(image, "--tta", "--calibrated", source=checkpoint)
    assert [float(row[f"p:{name}"]) for name in CLASSES] == pytest.approx(expected, rel=1e-6)
    for plain in (load(checkpoint), load(checkpoint, calibrated=True)):
        (other,) = plain.predict([image], tta=plain.metadata.temperature == 1)
        assert other.probabilities != pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_images_of_none_of_the_classes_are_flagged_by_checkpoint_and_bundle_and_the_false_alarms_are_stated(
    predict, tested, packed, tmp_path, capsys, monkeypatch, refused
):
    monkeypatch.chdir(tested)
    run, images = tested / "runs" / "photos" / "version_0", ["photos", tmp_path / "bad.png"]
    (tmp_path / "bad.png").write_bytes(b"")
    values = [row.max_logit for row in predictions.read(run / "val_predictions.csv")]
    threshold = sorted(values)[int(0.3 * (len(values) - 1))]
    rate = f"unknown also flags {100 * sum(v < threshold for v in values) / 12:.1f} % of 12 validation images)"
    assert cli.main(["export", str(run), "--calibrated", "--out", str(tmp_path / "bundle")]) == 0
    expected = ["" if row.error else str(int(row.max_logit < threshold)) for row in load(run).predict(gathered(images))]
    assert {"", "0", "1"} == set(expected)
    for number, (source, *words) in enumerate([(run,), (run, "--calibrated"), (tmp_path / "bundle", "--devices", 2)]):
        rows = predict(*images, "--unknown", 0.3, *words, source=source, out=f"{number}.csv")
        assert [row["unknown"] for row in rows] == expected
        assert rate in capsys.readouterr().out
    rows = predict(*images, "--unknown", 0.3, "--min_confidence", 0.9, "--top", 1, source=run, out="both.csv")
    assert list(rows[0])[4:8] == ["error", "abstained", "unknown", "p:blue"]
    lines = capsys.readouterr().out.splitlines()
    assert [str(int("perhaps of none" in line)) for line in lines] == [flag or "0" for flag in expected]
    words = ["photos", "--out", str(tmp_path / "none.csv"), "--unknown", "0.3"]
    assert "have not been measured" in refused("predict", str(packed), *words)  # of a run that was not tested
    assert "not known with --tta" in refused("predict", str(run), *words, "--tta")
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.slow
def test_closed_standard_output_ends_it_quietly(at_trained):
    words = [at_trained, *["photos"] * 20, "--out", "-"]
    with in_a_process(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("path,true")
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors.strip()) == (141, "")  # rich before 14.3 ends a hidden bar with an empty line


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left"), 2)])
def test_existing_output_is_replaced_with_overwrite_and_only_by_a_complete_file_with_the_usual_permissions(
    predict, tmp_path, monkeypatch, stop, code
):
    def fail_once(*given):
        if next(number) == 50:
            raise stop
        return of(*given)

    number, of = itertools.count(), predictions.Prediction.of
    monkeypatch.setattr(predictions.Prediction, "of", fail_once)
    (tmp_path / "labels.csv").write_text("path\nmine")
    words = ["photos", "--overwrite", "--batch-size", "16"]
    assert predict(*words, code=code) == [{"path": "mine"}]
    assert os.listdir(tmp_path) == ["labels.csv"]
    assert len(predict(*words)) == 120
    (tmp_path / "usual").touch()
    assert (tmp_path / "labels.csv").stat().st_mode == (tmp_path / "usual").stat().st_mode
