"""bench: it measures what it says, and its figures are of this run."""

import json
from pathlib import Path

import numpy as np
import pytest

from project import cli
from project.commands import bench
from project.data.images import read


@pytest.fixture
def measured(photos, capsys):
    """Runs bench on photos/ and returns its figures and its output; no file but those stays."""

    def run(*words):
        capsys.readouterr()
        assert cli.main(["bench", *words, "--root", "photos", "--rounds", "1", "--json", "bench.json"]) == 0
        assert {path.name for path in Path().iterdir()} == {"photos", "bench.json"}
        return json.loads(Path("bench.json").read_text()), capsys.readouterr().out

    return run


def test_readers_are_measured(photos, measured):
    (photos / "red" / "000.png").write_bytes(b"no image")
    figures, out = measured("data", "--count", "24")
    speed = figures["images_per_second"]
    assert list(speed)[:3] == ["first epoch", "from the cache", "from the cache, augment crop"]
    for name, value in speed.items():
        assert f"  {name:38}  {value:10,.0f}\n" in out


@pytest.mark.slow
def test_parts_of_a_step_make_the_step_and_the_limit_is_the_networks_own(measured):
    figures, out = measured("--count", "9")
    parts = ["waiting for data", "transfer", "forward and loss", "backward", "optimiser", "logging and the rest"]
    assert list(figures["step_seconds"]) == parts
    assert min(figures["step_seconds"].values()) > 0
    assert " 9 images to train on" in out  # one batch
    assert 9 / sum(figures["step_seconds"].values()) == pytest.approx(figures["images_per_second"])
    assert f"takes {figures['limit'] / figures['images_per_second']:.2f} times as long as the same network's" in out
    assert "epoch 1" not in out


@pytest.mark.full
@pytest.mark.timeout(900)
def test_cost_of_saving_is_that_of_a_fit_with_checkpoints(measured):
    figures, out = measured("saving")
    assert figures["cost"] == pytest.approx(figures["with_checkpoints"] / figures["without_checkpoints"] - 1)
    assert f"saving costs {figures['cost']:.1%} of its time" in out


def test_generated_photographs_are_of_the_stated_size_and_differ(workplace):
    files = list(bench.make_photographs(Path("photos"), 4).iterdir())
    assert len({read(file, 224).tobytes() for file in files}) == 4
    assert 40_000 < np.mean([file.stat().st_size for file in files]) < 110_000
