import contextlib
import csv
import errno
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from project import calibration, cli, load, predictions
from project.predict import expand

ROOT = Path(__file__).parent.parent


def rows_of(file):
    with Path(file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_files_and_folders_in_any_mix_keep_their_order(at_trained, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    assert (
        cli.main(
            ["predict", str(at_trained), "photos/red/003.png", "photos/blue", "photos/green/000.png", "--out", str(out)]
        )
        == 0
    )
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [
        "photos/red/003.png",
        *(f"photos/blue/{n:03d}.png" for n in range(40)),
        "photos/green/000.png",
    ]
    assert "42 pictures labelled, 0 unreadable" in capsys.readouterr().out


def test_columns_are_the_contracts_with_nine_digits(at_trained, tmp_path):
    out = tmp_path / "labels.csv"
    assert cli.main(["predict", str(at_trained), "photos/red", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "true", "label", "probability", "error", "p:blue", "p:green", "p:red"]
    for row, expected in zip(rows, load(at_trained).predict([r["path"] for r in rows]), strict=True):
        numbers = [float(row[f"p:{name}"]) for name in ("blue", "green", "red")]
        assert sum(numbers) == pytest.approx(1, abs=1e-6)
        assert numbers == pytest.approx(expected.probabilities, rel=1e-6)
        assert row["probability"] == f"{max(expected.probabilities):.9g}"
        assert (row["true"], row["error"], row["label"]) == ("", "", expected.label)
        assert all(len(re.sub(r"e.*|^0\.0*|\.", "", row[c])) <= 9 for c in row if c.startswith("p:"))


def test_unreadable_file_gets_an_error_row_and_nothing_but_these_fails(at_trained, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("not a picture, and not in the list")
    out = tmp_path / "labels.csv"
    assert cli.main(["predict", str(at_trained), str(tmp_path), "--out", str(out)]) == 1
    assert f"failed: No picture can be read; the column error of {out} says why." in capsys.readouterr().err
    rows = rows_of(out)
    assert [(Path(row["path"]).name, row["error"]) for row in rows] == [
        ("bad.jpg", "not a picture, or of an unknown format"),
        ("dangling.png", "no such file or directory"),
    ]
    assert {row[c] for row in rows for c in ("true", "label", "probability", "p:red")} == {""}


def test_picture_names_that_are_hard_for_a_csv(at_trained, tmp_path, monkeypatch):
    source = Path("photos/red/000.png").read_bytes()
    names = ["-dash.png", 'a "quoted", one.png', "größe 大.png", "new\nline.png"]
    for name in names:
        (tmp_path / name).write_bytes(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", str(at_trained), "."]) == 0
    assert sorted(row["path"] for row in rows_of("predictions.csv")) == sorted(names)


def test_existing_output_is_not_overwritten(at_trained, tmp_path, refused):
    out = tmp_path / "labels.csv"
    out.write_text("mine")
    assert "or add --overwrite" in refused("predict", str(at_trained), "photos", "--out", str(out))
    assert out.read_text() == "mine"


def test_what_a_killed_one_has_left_is_taken_away(at_trained, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".o.csv.{ended.pid}@{platform.node()}.0.tmp").write_text("path,true\n")
    assert cli.main(["predict", str(at_trained), "photos/red/000.png", "--out", str(tmp_path / "o.csv")]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["o.csv"]


def test_mistakes_are_told_in_a_sentence(at_trained, tmp_path, refused):
    assert "no file or folder nowhere" in refused("predict", str(at_trained), "nowhere")
    assert "no pictures in" in refused("predict", str(at_trained), str(tmp_path))
    assert "no checkpoint none.ckpt" in refused("predict", "none.ckpt", "photos", "--out", str(tmp_path / "a.csv"))
    assert "no folder" in refused("predict", str(at_trained), "photos", "--out", str(tmp_path / "no" / "a.csv"))
    assert "Did you mean --out?" in refused("predict", str(at_trained), "photos", "--ou", "a.csv")
    assert "pictures" in refused("predict", str(at_trained))
    assert "pictures" in refused("predict", str(at_trained))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--workers", "-1"], "--workers is -1"),
        (["--top", "0"], "--top is 0"),
        (["--devices", "0"], "--devices is 0"),
        (["--min-confidence", "1.5"], "--min_confidence is 1.5; it must be a probability"),
        (["--min-confidence=-0.1"], "--min_confidence is -0.1"),
        (["--min-confidence", "nan"], "--min_confidence is nan"),
        (["--min-confidence", "much"], "--min_confidence is much; it takes float or null"),
        (["--min-confidense", "1"], "no option --min-confidense. Did you mean --min_confidence?"),
        (["--calibrated"], "No temperature is known for"),
        (["--top", "1", "--out", "-"], "--top prints on standard output"),
        (["--out", "file/a.csv"], "Cannot write --out file/a.csv: Not a directory"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "x" * 240 + ".csv"], "cannot be written: File name too long"),
        (["--out", "photos", "--overwrite"], "photos is not a file, which --overwrite could replace"),
        (["--out", "pipe", "--overwrite"], "pipe is not a file"),  # stands for every device; never name a real one
        (["--out", "photos"], "photos exists"),
    ],
)
def test_options_that_cannot_be_are_told_in_a_sentence(at_trained, monkeypatch, tmp_path, refused, options, said):
    (tmp_path / "photos").symlink_to(Path("photos").resolve())
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    assert said in refused("predict", str(at_trained.resolve()), "photos", *options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "photos", "pipe"]


def test_other_files_than_checkpoints_and_broken_lists_are_told_in_a_sentence(at_trained, tmp_path, refused):
    out = ["--out", str(tmp_path / "o.csv")]
    for name, content, said in (
        ("empty.csv", b"", "has no column path; it has nothing"),
        ("other.csv", b"file,label\na.png,x\n", "has no column path; it has file, label"),
        ("hole.csv", b"path,label\na.png,x\n,y\n", "line 3, has no path"),
        ("bytes.csv", b"path\na\x00b.png\n" + b'"' + b"x" * 200_000, "Cannot read"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in refused("predict", str(at_trained), str(tmp_path / name), *out)
    (tmp_path / "heads.csv").write_text("path,label\n")
    assert "no pictures in" in refused("predict", str(at_trained), str(tmp_path / "heads.csv"), *out)
    (tmp_path / "foreign.ckpt").write_bytes(b"PK nothing")
    assert "foreign.ckpt" in refused("predict", str(tmp_path / "foreign.ckpt"), "photos", *out)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pt")
    assert "was not written by this project" in refused("predict", str(tmp_path / "plain.pt"), "photos", *out)
    assert not (tmp_path / "o.csv").exists()


def test_mistakes_are_told_before_torch_is_there(trained):
    code = f"""import sys; from project import cli
code = cli.main(["predict", {str(trained / "runs" / "latest")!r}, "nowhere.png"])
print(code, "torch" in sys.modules)"""
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == "2 False\n"


def test_one_device_needs_no_lightning(trained, tmp_path):
    code = f"""import sys; from project import cli
code = cli.main(["predict", {str(trained / "runs" / "latest")!r}, {str(trained / "photos" / "red" / "000.png")!r},
    "--out", {str(tmp_path / "o.csv")!r}])
print(code, "lightning" in sys.modules)"""
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.splitlines()[-1] == "0 False"


def test_progress_goes_to_the_terminal_and_the_results_where_they_are_sent(trained, tmp_path):
    pty = pytest.importorskip("pty")
    main, other = pty.openpty()
    words = ["predict", str(trained / "runs" / "latest"), str(trained / "photos" / "red"), "--top", "1"]
    command = [sys.executable, "-m", "project.cli", *words, "--out", str(tmp_path / "o.csv")]
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=other, text=True) as process:
        os.close(other)
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while read := os.read(main, 4096):  # all along: a terminal that nobody reads from makes its writers wait
                shown += read
        printed = process.stdout.read().splitlines()
    os.close(main)
    assert process.returncode == 0, shown.decode()
    assert len(printed) == 40
    assert all("photos/red/" in line for line in printed)
    assert b"predict" in shown, shown
    assert b"photos/red" not in shown


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(trained, tmp_path):
    """Twenty times as many pictures take less than 10 MB more, which is what rows in a list would take."""
    source, peaks = trained / "photos" / "red" / "000.png", []
    for count in (500, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.link(source, folder / f"{number:06d}.png")
        words = ["predict", str(trained / "runs" / "latest"), str(folder), "--out", str(tmp_path / f"{count}.csv")]
        code = f"""import resource; from project import cli
assert cli.main({words!r}) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
        made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(made.stdout.split()[-1]) / 1024)
        assert len(rows_of(tmp_path / f"{count}.csv")) == count
    assert peaks[1] - peaks[0] < 10, peaks


def test_hidden_pictures_of_a_folder_are_passed_over(workplace):
    for name in ("a.png", ".b.png", ".c/d.png", "e/f.PNG"):
        Path("p", name).parent.mkdir(parents=True, exist_ok=True)
        Path("p", name).write_bytes(b"")
    Path("elsewhere").mkdir()
    Path("elsewhere", "g.png").write_bytes(b"")
    Path("p", "linked").symlink_to(Path("elsewhere").resolve())
    assert list(expand(["p"])) == ["p/a.png", "p/e/f.PNG", "p/linked/g.png"]


def test_patterns_csv_files_and_standard_input_mean_pictures(photos, monkeypatch):
    import io

    Path("lists").mkdir()
    Path("lists/some.csv").write_text("label,path\nx,../photos/red/001.png\n,../photos/red/000.png\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/blue/002.png\n\nphotos/gr*/003.png\n"))
    assert list(expand(["photos/*/00[01].png", "lists/some.csv", "-"])) == [
        *(f"photos/{c}/00{n}.png" for c in ("blue", "green", "red") for n in (0, 1)),
        "photos/red/001.png",
        "photos/red/000.png",
        "photos/blue/002.png",
        "photos/green/003.png",
    ]


def test_a_path_in_a_csv_file_that_is_not_there_gets_an_error_row(at_trained, tmp_path):
    (tmp_path / "some.csv").write_text("path\ngone.png\n")
    pictures = [str(tmp_path / "some.csv"), "photos/red/000.png"]
    assert cli.main(["predict", str(at_trained), *pictures, "--out", str(tmp_path / "o.csv")]) == 0
    assert [row["error"] for row in rows_of(tmp_path / "o.csv")] == ["no such file or directory", ""]


def test_csv_files_say_what_the_pictures_are(at_trained, tmp_path):
    photos, out = at_trained.parents[2] / "photos", tmp_path / "o.csv"
    (tmp_path / "l.csv").write_text(f"label,path,split\nred,{photos}/red/000.png,holdout\n,{photos}/red/001.png,\n")
    (tmp_path / "t.csv").write_text(f"path,true,label\n{photos}/red/002.png,,blue\n{photos}/red/003.png,green,red\n")
    pictures = [str(tmp_path / "l.csv"), str(tmp_path / "t.csv"), "photos/red/004.png"]
    assert cli.main(["predict", str(at_trained), *pictures, "--out", str(out)]) == 0
    assert [row["true"] for row in rows_of(out)] == ["red", "", "", "green", ""]


def test_likeliest_classes_are_printed_a_line_a_picture(lively, at_trained, tmp_path, capsys):
    source = Path("photos/red/000.png")
    (tmp_path / "two\nlines.png").write_bytes(source.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    names = [str(source), str(tmp_path / "bad.png"), str(tmp_path / "two\nlines.png")]
    (made,) = load(lively).predict([source])
    order = sorted(zip(made.probabilities, ("blue", "green", "red"), strict=True), key=lambda pair: -pair[0])
    for top, out in ((2, "2.csv"), (99, "99.csv")):
        capsys.readouterr()
        assert cli.main(["predict", str(lively), *names, "--top", str(top), "--out", str(tmp_path / out)]) == 0
        captured = capsys.readouterr()
        said = ", ".join(f"{name} {probability:.4f}" for probability, name in order[:top])
        assert captured.out.splitlines() == [
            f"{source}: {said}",
            f"{tmp_path}/bad.png: not a picture, or of an unknown format",
            f"{tmp_path}/two\\nlines.png: {said}",
        ]
        assert "2 pictures labelled, 1 unreadable" in captured.err
        assert len(rows_of(tmp_path / out)) == 3


@pytest.mark.parametrize("option", ["--min-confidence", "--min_confidence"])
def test_what_is_below_the_confidence_is_marked_and_keeps_its_label(lively, at_trained, tmp_path, option):
    (tmp_path / "bad.png").write_bytes(b"")
    plain, out = tmp_path / "plain.csv", tmp_path / "out.csv"
    pictures = ["photos", str(tmp_path / "bad.png")]
    assert cli.main(["predict", str(lively), *pictures, "--out", str(plain)]) == 0
    highest = sorted(float(row["probability"]) for row in rows_of(plain)[:-1])
    least = (highest[40] + highest[41]) / 2
    assert cli.main(["predict", str(lively), *pictures, "--out", str(out), f"{option}={least}"]) == 0
    rows = rows_of(out)
    assert list(rows[0])[:6] == ["path", "true", "label", "probability", "error", "abstained"]
    assert [row["abstained"] for row in rows[:-1]] == [
        str(int(float(row["probability"]) < least)) for row in rows_of(plain)[:-1]
    ]
    assert sum(row["abstained"] == "1" for row in rows) == 41
    assert rows[-1]["abstained"] == ""
    assert [row.pop("abstained") and row for row in rows[:-1]] == rows_of(plain)[:-1]


def test_options_of_the_predictor_reach_it(lively, at_trained, tmp_path):
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes((lively / "checkpoints" / "best.ckpt").read_bytes())
    calibration.write(checkpoint, 3.0, {})
    expected = load(checkpoint, calibrated=True).predict(["photos/red/000.png"], tta=True)[0].probabilities
    out = tmp_path / "o.csv"
    words = ["predict", str(checkpoint), "photos/red/000.png", "--tta", "--calibrated", "--out", str(out)]
    assert cli.main(words) == 0
    (row,) = rows_of(out)
    assert [float(row[f"p:{name}"]) for name in ("blue", "green", "red")] == pytest.approx(expected, rel=1e-6)
    for plain in (load(checkpoint), load(checkpoint, calibrated=True)):
        (other,) = plain.predict(["photos/red/000.png"], tta=plain.temperature == 1)
        assert other.probabilities != pytest.approx(expected, rel=1e-3)


def test_dash_writes_the_same_csv_to_standard_output(at_trained, tmp_path):
    (tmp_path / "größe\udcff\n.png").write_bytes(b"")
    pictures, out = ["photos/red", str(tmp_path)], tmp_path / "o.csv"
    assert cli.main(["predict", str(at_trained), *pictures, "--out", str(out)]) == 0
    words = [sys.executable, "-m", "project.cli", "predict", str(at_trained.resolve()), *pictures, "--out", "-"]
    made = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert made.stdout == out.read_bytes()
    assert b"40 pictures labelled, 1 unreadable" in made.stderr


def test_reader_that_has_enough_ends_it_without_a_traceback(at_trained, tmp_path):
    words = [sys.executable, "-m", "project.cli", "predict", str(at_trained.resolve()), *["photos"] * 20, "--out", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().startswith("path,true")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == "failed: Standard output was closed before all was written.\n"


def test_existing_output_is_replaced_when_that_is_asked_for_and_only_by_a_whole_one(at_trained, tmp_path, monkeypatch):
    out = tmp_path / "labels.csv"
    out.write_text("mine")
    words = ["predict", str(at_trained), "photos", "--out", str(out), "--overwrite", "--batch-size", "16"]
    for stop, code in ((KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2)):
        of, seen = predictions.Prediction.of, []

        def fail(*given, of=of, seen=seen, stop=stop):
            seen.append(given)
            if len(seen) == 50:
                raise stop
            return of(*given)

        with monkeypatch.context() as patch:
            patch.setattr(predictions.Prediction, "of", fail)
            assert cli.main(words) == code
        assert out.read_text() == "mine"
        assert [file.name for file in tmp_path.iterdir()] == ["labels.csv"]
    assert cli.main(words) == 0
    assert len(rows_of(out)) == 120
