import csv
import re
from pathlib import Path

import pytest

from project import cli, load
from project.predict import expand


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


def test_unreadable_file_gets_an_error_row(at_trained, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("not a picture, and not in the list")
    out = tmp_path / "labels.csv"
    assert cli.main(["predict", str(at_trained), str(tmp_path), "--out", str(out)]) == 0
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
    assert "exists" in refused("predict", str(at_trained), "photos", "--out", str(out))
    assert out.read_text() == "mine"


def test_mistakes_are_told_in_a_sentence(at_trained, tmp_path, refused):
    assert "no file or folder nowhere" in refused("predict", str(at_trained), "nowhere")
    assert "no pictures in" in refused("predict", str(at_trained), str(tmp_path))
    assert "no checkpoint none.ckpt" in refused("predict", "none.ckpt", "photos", "--out", str(tmp_path / "a.csv"))
    assert "no folder" in refused("predict", str(at_trained), "photos", "--out", str(tmp_path / "no" / "a.csv"))
    assert "Did you mean --out?" in refused("predict", str(at_trained), "photos", "--ou", "a.csv")
    assert "pictures" in refused("predict", str(at_trained))
    assert "--batch_size is 0" in refused("predict", str(at_trained), "photos", "--batch_size", "0")
    assert "--workers is -1" in refused("predict", str(at_trained), "photos", "--workers", "-1")


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
    assert cli.main(["predict", str(at_trained), str(tmp_path / "some.csv"), "--out", str(tmp_path / "o.csv")]) == 0
    assert [row["error"] for row in rows_of(tmp_path / "o.csv")] == ["no such file or directory"]
