"""bench: it measures what it says, and its figures are of this run."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from project import cli
from project.commands import bench
from project.data.images import read


def test_readers_are_measured_and_leave_nothing(photos, capsys):
    (photos / "red" / "000.png").write_bytes(b"no image")
    small = ["--root", "photos", "--count", "24", "--rounds", "1"]
    assert cli.main(["bench", "data", *small, "--json", "bench.json"]) == 0
    out = capsys.readouterr().out
    speed = json.loads(Path("bench.json").read_text())["images_per_second"]
    assert list(speed)[:3] == ["first epoch", "from the cache", "from the cache, augment crop"]
    for name, value in speed.items():
        assert f"  {name:38}  {value:10,.0f}\n" in out
    assert {path.name for path in Path().iterdir()} == {"photos", "bench.json"}


def test_parts_of_a_step_make_the_step_and_the_limit_is_the_networks_own(photos, capsys):
    small = ["--root", "photos", "--count", "9", "--rounds", "1", "--json", "bench.json"]
    assert cli.main(["bench", *small]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert list(result["step_seconds"]) == [
        "waiting for data",
        "transfer",
        "forward and loss",
        "backward",
        "optimiser",
        "logging and the rest",
    ]
    step = sum(result["step_seconds"].values())
    images = int(re.search(r"(\d+) training images", out)[1])  # one batch
    assert images >= 6  # nine less one of each class
    assert images / step == pytest.approx(result["images_per_second"])
    assert f"takes {result['limit'] / result['images_per_second']:.2f} times as long as the same network's" in out
    assert "epoch 1" not in out
    assert {path.name for path in Path().iterdir()} == {"photos", "bench.json"}


@pytest.mark.full
def test_cost_of_saving_is_that_of_a_fit_with_checkpoints(photos, capsys):
    assert cli.main(["bench", "saving", "--root", "photos", "--rounds", "1", "--json", "bench.json"]) == 0
    result = json.loads(Path("bench.json").read_text())
    assert result["cost"] == pytest.approx(result["with_checkpoints"] / result["without_checkpoints"] - 1)
    assert f"saving costs {result['cost']:.1%} of its time" in capsys.readouterr().out
    assert {path.name for path in Path().iterdir()} == {"photos", "bench.json"}


def test_made_photographs_are_of_the_stated_size_and_differ(workplace):
    root = bench.make_photographs(Path("made"), 4)
    made = [read(file, 224) for file in sorted(root.rglob("*.jpg"))]
    assert len({image.tobytes() for image in made}) == 4
    assert 40_000 < np.mean([file.stat().st_size for file in root.rglob("*.jpg")]) < 110_000


def test_what_has_moved_and_what_cannot_be_is_said(workplace, refused):
    assert "make bench ARGS=accuracy" in refused("bench", "accuracy", "--target", "0.9")
    assert "it takes training or data or saving" in refused("bench", "dat")
    assert "--rounds is 0; it must be above 0" in refused("bench", "data", "--rounds", "0")
    assert "--count is 0" in refused("bench", "--count", "0")
    Path("mine").write_text("x")
    assert "mine exists" in refused("bench", "data", "--json", "mine")
    for colour, number in itertools.product(("blue", "red"), range(3)):
        Path("photos", colour).mkdir(parents=True, exist_ok=True)
        Path(f"photos/{colour}/{number}.png").write_text("x")
    assert "photos, too few can be read; see: python -m project.cli check" in refused(
        "bench", "data", "--root", "photos"
    )
