"""A folder with everything that goes wrong in real ones trains, and each bad file is named once, with its reason."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import cli
from project.data.check import check_dataset
from tests.conftest import COLOURS, SMALL, make_images
from tests.data.test_images import bad_files

ODD_NAMES = ("name with spaces.jpg", "ünïcødé 图.png", "-dash.png", "new\nline.png")
BAD = bad_files() | dict.fromkeys(ODD_NAMES, (b"x", "not an image"))
GOOD = {
    "grey": (Image.new("L", (30, 40), 90), "PNG"),
    "grey and alpha": (Image.new("LA", (30, 40), (90, 100)), "PNG"),
    "palette": (Image.new("P", (30, 40), 3), "GIF"),
    "rgba": (Image.new("RGBA", (30, 40), (9, 9, 9, 9)), "WEBP"),
    "cmyk": (Image.new("CMYK", (30, 40), (9, 90, 9, 9)), "JPEG"),
    "bilevel": (Image.new("1", (30, 40)), "PNG"),
    "16 bit": (Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "float": (Image.fromarray(np.random.default_rng(0).random((30, 40), dtype=np.float32)), "TIFF"),
    "one pixel": (Image.new("RGB", (1, 1)), "BMP"),
    "thin": (Image.new("RGB", (1, 3000)), "PPM"),
}


@pytest.fixture
def hostile(workplace):
    root = make_images(Path("photos"), dict.fromkeys(COLOURS, 40))
    for name, (content, _) in BAD.items():
        (root / "red" / name).write_bytes(content)
    for name, (image, fmt) in GOOD.items():
        image.save(root / "blue" / f"{name}.{fmt.lower()}", fmt)
    (root / "green" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "green" / "pipe.png")
    (root / "green" / ".hidden.jpg").write_bytes(b"x")
    (root / ".ipynb_checkpoints").mkdir()
    return root


REASONS = {f"red/{name}": reason for name, (_, reason) in BAD.items()} | {
    "green/dangling.jpg": "no such file or directory",
    "green/pipe.png": "not a regular file",
}


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_it_trains_and_fit_and_check_name_each_bad_file_once_with_its_reason(hostile, workers, capfd):
    fit = ["fit", "--data.root", "photos", *SMALL, "--data.batch_size", "4", "--trainer.max_epochs", "6"]
    assert cli.main([*fit, "--data.workers", workers]) == 0
    assert cli.main(["test", "--data.workers", workers]) == 0
    out = capfd.readouterr().out
    for path, reason in REASONS.items():
        _, *after = out.split(f"unreadable: photos/{path}: ")
        assert len(after) == 1, path
        assert reason in after[0].splitlines()[0]
    assert "blue" not in "".join(line for line in out.splitlines() if "unreadable" in line)
    (unreadable,) = [finding for finding in check_dataset(hostile).findings if finding.kind == "unreadable"]
    assert {entry[0].split(": ")[0] for entry in unreadable.paths} == set(REASONS)


def test_predict_gives_each_bad_file_an_error_row_and_every_other_a_label(hostile, trained):
    run = str(trained / "runs" / "photos" / "version_0")
    assert cli.main(["predict", run, "photos", "--out", "labels.csv"]) == 0
    with Path("labels.csv").open(newline="", encoding="utf-8") as stream:
        rows = {row["path"].removeprefix("photos/"): row for row in csv.DictReader(stream)}
    assert len(rows) == 120 + len(REASONS) + len(GOOD)
    for path, row in rows.items():
        assert bool(row["error"]) == (path in REASONS) == (not row["label"])
        assert REASONS.get(path, "") in row["error"]
