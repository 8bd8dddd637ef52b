"""bench: it measures what it says, and its figures are of this run."""

import json
import re
from pathlib import Path

import numpy as np

from project import bench, cli
from project.data import images


def test_table_has_every_reader_and_its_ratio(photos, capsys):
    small = ["--data.root", str(photos), "--data.count", "24", "--rounds", "1"]
    (photos / "red" / "000.png").write_bytes(b"no picture")
    assert cli.main(["bench", "data", *small, "--json", "bench.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert list(result["one_core"]) == [
        "decoding alone (Pillow)",
        "the article's reader",
        "torchvision's reference reader",
        "ours, first epoch",
        "ours, from the cache",
        "ours, from the cache, crop",
    ]
    beside = result["one_core"]["torchvision's reference reader"]
    for name, speed in result["one_core"].items():
        line = next(line for line in out.splitlines() if line.strip().startswith(f"{name}  "))
        assert re.search(rf"{speed:,.0f} +{speed / beside:.2f}$", line)
    assert result["gap_seconds"] > 0
    assert len(result["check"]) == 2
    assert "One core reads" in out
    assert not Path("data").exists()


def test_made_photographs_are_of_the_stated_size_and_differ(workplace):
    root = bench.make_photographs(Path("made"), 4)
    made = [images.read(file, 224) for file in sorted(root.rglob("*.jpg"))]
    assert len(made) == 4
    assert len({image.tobytes() for image in made}) == 4
    assert 40_000 < np.mean([file.stat().st_size for file in root.rglob("*.jpg")]) < 110_000


def test_usual_readers_give_what_torchvision_gives(workplace):
    root = bench.make_photographs(Path("made"), 2)
    paths = [str(path) for path in sorted(root.rglob("*.jpg"))]
    for kind in ("article", "reference"):
        tensor, _ = bench.Usual(paths, kind)[0]
        assert tuple(tensor.shape) == (3, 224, 224)
        assert tensor.is_floating_point()
    assert bench.Usual(paths, "article")[0][0].min() >= 0
    assert bench.Usual(paths, "reference")[0][0].min() < 0  # normalised


def test_unknown_subject_and_existing_output_are_refused(workplace, refused):
    assert "it takes data" in refused("bench", "dat")
    assert "--rounds is 0" in refused("bench", "data", "--rounds", "0")
    assert "--data.count is 0" in refused("bench", "data", "--data.count", "0")
    Path("mine").write_text("x")
    assert "mine exists" in refused("bench", "data", "--json", "mine")
