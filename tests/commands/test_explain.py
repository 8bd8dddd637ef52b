"""The verb explain: the folder that it writes, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_folder_holds_one_image_each_a_contact_sheet_and_the_filters(explained, tmp_path, capsys):
    names = explained(IMAGE, "photos/blue/000.png", "--method", "ig")
    assert names == ["1-000.png", "2-000.png", "contact-sheet.png", "filters.png"]
    assert f"2 images explained by ig, 0 unreadable: {tmp_path / 'why'}" in capsys.readouterr().out
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "why" / name).convert("RGB"))
        assert pixels.shape[1] > 500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_after_24_images_a_second_contact_sheet_follows_and_unreadable_ones_are_listed(explained, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    shutil.copy(IMAGE, tmp_path / "a $red$ one\n大.png")
    names = explained(tmp_path, "photos/red/0[012]*.png")
    assert {"01-a_red_one_大.png", "31-029.png", "contact-sheet.png", "contact-sheet-2.png"} <= set(names)
    assert len(names) == 34
    assert f"left out, unreadable: {tmp_path}/bad.jpg: not an image" in capsys.readouterr().out


def test_target_is_explained_instead_of_the_predicted_class(explained, at_trained, monkeypatch):
    captions, draw = [], figures.explanations
    monkeypatch.setattr(figures, "explanations", lambda *args: captions.extend(args[3]) or draw(*args))
    (prediction,) = load(at_trained).predict([IMAGE])
    other = next(name for name in COLOURS if name != prediction.label)
    explained(IMAGE, "--target", other)
    share = prediction.probabilities[sorted(COLOURS).index(other)]
    assert captions[0].startswith(f"{other}\n{share:.1%}, predicted: {prediction.label}")


def test_mistakes_are_told_in_a_sentence_and_leave_nothing_behind(at_trained, tmp_path, refused, monkeypatch):
    run, images, out = str(at_trained), str(Path(IMAGE).resolve()), ["--out", "why"]
    monkeypatch.chdir(tmp_path)
    for name in ("bad.jpg", "foreign.ckpt"):
        Path(name).write_bytes(b"<html>")
    for words, message in (
        ([run, images, *out, "--method", "magic"], "--method is magic; it takes gradcam or ig or occlusion"),
        ([run, images, *out, "--target", "gren"], "not one of the classes blue, green, red. Did you mean green?"),
        (["none.ckpt", images, *out], "no checkpoint none.ckpt"),
        (["foreign.ckpt", images, *out], "no checkpoint"),
        ([run, "nowhere", *out], "no file or folder nowhere"),
        ([run, "bad.jpg", *out], "None of the 1 images can be read"),
        ([run, images, "--out", "no/why"], "no folder"),
        ([run, images, "--out", "bad.jpg/why"], "bad.jpg is no folder"),
        ([run, images, "--out", "bad.jpg"], "bad.jpg exists"),
    ):
        assert message in refused("explain", *words)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert "pip install -e .[explain]" in refused("explain", run, images, *out)
    monkeypatch.undo()
    full_disk(monkeypatch)
    assert "No space left on device" in refused("explain", run, images, "--out", str(tmp_path / "why"))
    assert sorted(os.listdir(tmp_path)) == ["bad.jpg", "foreign.ckpt"]


def test_bundle_is_explained_by_its_weights(explained, packed, tmp_path, refused):
    bundle = shutil.copytree(packed, tmp_path / "bundle")
    assert "1-000.png" in explained(IMAGE, source=bundle)
    (bundle / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused("explain", str(bundle), IMAGE, "--out", str(tmp_path / "more"))


def test_importing_the_verb_imports_nothing_heavy():
    code = "import sys, project.commands.explain; sys.exit(bool({'torch', 'matplotlib', 'captum'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
