"""The verb explain: the folder that it writes, and what is refused."""

import os
import shutil
import sys

import pytest
from PIL import Image

from project import cli, load
from project.evaluation import figures
from tests.conftest import COLOURS, full_disk

IMAGE = "photos/red/000.png"


@pytest.fixture
def explained(at_trained, tmp_path):
    """Runs the verb with the trained run, or with another source; returns the names of the files that it writes."""

    def run(*words, source=at_trained):
        assert cli.main(["explain", str(source), *map(str, words), "--out", str(tmp_path / "why")]) == 0
        return sorted(os.listdir(tmp_path / "why"))

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of each drawing."""
    calls, draw = [], figures.explanations
    monkeypatch.setattr(figures, "explanations", lambda *args: calls.append(args) or draw(*args))
    return calls


def test_folder_holds_one_image_each_contact_sheets_and_the_filters_and_unreadable_ones_are_listed(
    explained, tmp_path, capsys
):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    shutil.copy(IMAGE, tmp_path / "a $red$ one\n大.png")
    names = explained(tmp_path, "photos/red/0[012]*.png")
    others = {"01-a_red_one_大.png", "contact-sheet.png", "contact-sheet-2.png", "filters.png"}
    assert set(names) == others | {f"{number + 2:02d}-{number:03d}.png" for number in range(30)}
    out = capsys.readouterr().out
    assert f"left out, unreadable: {tmp_path}/bad.jpg: not an image" in out
    assert f"31 images explained by gradcam, 1 unreadable: {tmp_path / 'why'}" in out
    for name in {"02-000.png"} | others:
        with Image.open(tmp_path / "why" / name) as image:
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(10**7)) > 100


def test_target_is_explained_instead_of_the_predicted_class_by_the_method_of_choice(
    explained, at_trained, drawn, capsys
):
    (prediction,) = load(at_trained).predict([IMAGE])
    other = next(name for name in COLOURS if name != prediction.label)
    explained(IMAGE, "--target", other, "--method", "ig")
    out = capsys.readouterr().out
    assert "1 image explained by ig, 0 unreadable" in out
    assert "cells" not in out
    share = prediction.probabilities[sorted(COLOURS).index(other)]
    predicted = f"predicted: {prediction.label}, {prediction.probability:.1%}"
    assert drawn[0][0][0][3].startswith(f"{predicted}\nexplained: {other}, {share:.1%}")


def test_sheet_tells_the_true_class_where_it_is_known_and_where_the_map_is_too_coarse(
    explained, drawn, tmp_path, capsys
):
    shutil.copy(IMAGE, tmp_path / "loose.png")
    (tmp_path / "given.csv").write_text("path,label\nloose.png,green\n")
    explained(IMAGE, tmp_path / "given.csv")
    assert [title for _, _, title, _ in drawn[-1][0]] == ["000.png\ntrue: red", "loose.png\ntrue: green"]
    assert drawn[-1][-1] == "only 3 x 3 cells, too coarse to locate anything"
    assert f"gradcam: {drawn[-1][-1]}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "why")
    explained(tmp_path / "loose.png")
    assert [title for _, _, title, _ in drawn[-1][0]] == ["loose.png"]


def test_missing_captum_and_a_full_disk_are_told_in_a_sentence_and_nothing_is_left(
    at_trained, tmp_path, refused, monkeypatch
):
    words = ["explain", str(at_trained), IMAGE, "--out", str(tmp_path / "why")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "captum", None)
        assert "pip install -e .[explain]" in refused(*words)
    full_disk(monkeypatch)
    assert "No space left on device" in refused(*words)
    assert not os.listdir(tmp_path)


def test_bundle_is_explained_by_its_weights(explained, packed, tmp_path, refused):
    bundle = shutil.copytree(packed, tmp_path / "bundle")
    assert explained(IMAGE, source=bundle) == ["1-000.png", "contact-sheet.png", "filters.png"]
    (bundle / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused("explain", str(bundle), IMAGE, "--out", str(tmp_path / "more"))
