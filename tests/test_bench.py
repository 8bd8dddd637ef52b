"""bench: it measures what it says, and its figures are of this run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from project import cli
from project.bench import pictures, rivals, serving, training
from project.bench.turns import Course, Over, Turn
from project.data import images


def test_table_of_readers_has_every_reader_and_its_ratio(photos, capsys):
    small = ["--root", str(photos), "--count", "24", "--rounds", "1"]
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


@pytest.mark.slow
def test_table_of_predicting_has_every_loop_and_all_give_the_same(photos, capsys):
    (photos / "red" / "000.png").write_bytes(b"no picture")
    assert cli.main(["bench", "predict", "--root", "photos", "--count", "5", "--rounds", "1", "--json", "b.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("b.json").read_text())
    names = list(result["speed"])
    assert names[0] == "a loop, one file at a time"
    assert names[1] == "a DataLoader, batches of 64"
    assert names[2].startswith("a DataLoader, ")
    assert names[3] == "ours: predict"
    for name, speed in result["speed"].items():
        ratio = result["speed"]["ours: predict"] / speed
        assert result["ratio"][name] == pytest.approx(ratio)
        line = next(line for line in out.splitlines() if line.strip().startswith(f"{name}  "))
        assert re.search(rf" {speed:,.1f} +{ratio:.2f} x$", line)
    assert {path.name for path in Path().iterdir()} == {"photos", "b.json"}


@pytest.mark.slow
def test_table_of_training_has_every_rival_and_the_parts_of_a_step(photos, capsys, monkeypatch):
    monkeypatch.setattr(training, "SIZE", 64)
    assert cli.main(["bench", "--root", "photos", "--count", "8", "--rounds", "1", "--json", "bench.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert list(result["speed"]) == [
        "the article's loop",
        "a usual Lightning loop",
        "tuned plain PyTorch",
        "ours: fit --data.cache off",
        "ours: fit, with its cache",
    ]
    for name, speed in result["speed"].items():
        line = next(line for line in out.splitlines() if line.strip().startswith(f"{name}  "))
        assert re.search(rf" {speed:,.1f} +{result['speed']['ours: fit, with its cache'] / speed:.2f} x$", line)
    parts = ["waiting for data", "transfer", "forward and loss", "backward", "optimiser", "logging and the rest"]
    assert list(result["step_seconds"]) == parts
    assert all(seconds >= 0 for seconds in result["step_seconds"].values())
    whole = 4 / result["speed"]["ours: fit, with its cache"]  # batches of four, and one measured epoch
    assert sum(result["step_seconds"].values()) == pytest.approx(whole, rel=0.3)
    assert "Advice:" in out
    assert "epoch 1" not in out  # what the contestants say of themselves is not shown
    assert {path.name for path in Path().iterdir()} == {"photos", "bench.json"}


def test_flops_of_a_picture_are_those_of_the_network(workplace):
    """torchvision counts 0.714 G multiply-adds forward; a step is three times that, but for the first layer's input."""
    assert 2 * 0.71 * 2.7 < training._ceiling(1000, 224)["gflop_per_picture"] < 2 * 0.72 * 3


class Two(Course):
    """Lets a rival train two epochs."""

    def __init__(self):
        super().__init__(None)
        self.epochs = 0

    def begin(self):
        if self.epochs == 2:
            raise Over

    def end(self):
        self.epochs += 1


@pytest.mark.parametrize("run", [rivals.article, rivals.usual, rivals.tuned], ids=lambda run: run.__name__)
@pytest.mark.filterwarnings("ignore")  # Lightning's advice to those who write such loops
def test_every_rival_trains(workplace, monkeypatch, run):
    """A rival that does not learn would be fast for nothing."""
    root = pictures.make_photographs(Path("made"), 8)
    rows = [(str(path), number % 2) for number, path in enumerate(sorted(root.rglob("*.jpg")))]
    changed = []
    step = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        before = self.param_groups[0]["params"][0].clone()
        step(self, *args, **kwargs)
        changed.append(not torch.equal(before, self.param_groups[0]["params"][0]))

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    course = Two()
    with pytest.raises(Over):
        run(rows, 2, 64, 4, course)
    assert course.epochs == 2
    assert changed == [True] * 4


def test_a_contestant_that_fails_is_not_silent(workplace):
    turn = Turn(rivals.article, [("nowhere.jpg", 0)], 2, 64, 1)
    with pytest.raises(RuntimeError, match=r"(?s)A contestant has failed.*nowhere\.jpg"):
        turn.epoch()
    turn.kill()


@pytest.mark.slow
def test_time_to_accuracy_names_both_and_their_ratio(photos, capsys):
    small = ["--root", "photos", "--image_size", "64", "--epochs", "3", "--target", "0.6", "--json", "bench.json"]
    assert cli.main(["bench", "accuracy", *small]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert result["target"] == 0.6
    for name in ("ours", "usual, Adam at its default 1e-3", "usual, Adam at 3e-4"):
        assert 0 <= result[name]["best"] <= 1
        assert (result[name]["seconds"] is None) == (result[name]["best"] < 0.6)
        assert re.search(rf"^{name}: validation accuracy 0.600: ", out, re.MULTILINE)
    assert not Path("runs").exists()


def test_made_photographs_are_of_the_stated_size_and_differ(workplace):
    root = pictures.make_photographs(Path("made"), 4)
    made = [images.read(file, 224) for file in sorted(root.rglob("*.jpg"))]
    assert len(made) == 4
    assert len({image.tobytes() for image in made}) == 4
    assert 40_000 < np.mean([file.stat().st_size for file in root.rglob("*.jpg")]) < 110_000


def test_usual_readers_give_what_torchvision_gives(workplace):
    root = pictures.make_photographs(Path("made"), 2)
    rows = [(str(path), 1) for path in sorted(root.rglob("*.jpg"))]
    plain, _ = pictures.Pictures(rows, pictures.resized(224, *pictures.floats(False)))[0]
    normalised, label = pictures.Pictures(rows, pictures.resized(224, *pictures.floats(True)))[0]
    assert tuple(plain.shape) == tuple(normalised.shape) == (3, 224, 224)
    assert plain.is_floating_point()
    assert 0 <= plain.min() < plain.max() <= 1
    assert normalised.min() < 0
    assert label == 1


@pytest.mark.slow
def test_table_of_answers_has_torch_and_both_bundles(workplace, capsys):
    small = ["--image_size", "64", "--count", "64", "--rounds", "1", "--json", "bench.json"]
    assert cli.main(["bench", "bundle", *small]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert list(result) == ["PyTorch", "ONNX Runtime, float32", "ONNX Runtime, int8"]
    predicts = {name: sizes.pop("predict_seconds") for name, sizes in result.items()}
    for name, sizes in result.items():
        ratio = predicts["PyTorch"] / predicts[name]
        assert re.search(rf"^{re.escape(name)} +{predicts[name]:.2f} s +{ratio:.2f}$", out, re.M)
        assert {size: entry["batches"] for size, entry in sizes.items()} == {"1": 64, "8": 8, "64": 1}
        for size, entry in sizes.items():
            assert 0 < entry["p50_seconds"] <= entry["p99_seconds"]
            ratio = entry["pictures_per_second"] / result["PyTorch"][size]["pictures_per_second"]
            assert re.search(
                rf"^{re.escape(name)} +{size} .* {entry['pictures_per_second']:,.0f} +{ratio:.2f}$", out, re.M
            )


@pytest.mark.slow
def test_table_of_serving_has_all_numbers_of_clients_and_both_bundles(workplace, capsys):
    assert cli.main(["bench", "serve", "--image_size", "64", "--seconds", "1", "--json", "bench.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("bench.json").read_text())
    assert list(result) == ["float32", "int8"]
    for found in result.values():
        assert list(found) == ["1", "8", "64", "memory", *serving.WAYS, *serving.LITSERVE, "crowded"]
        for name, figures in found.items():
            if name != "memory":
                assert 0 < figures["p50_seconds"] <= figures["p99_seconds"]
                assert f"{figures['requests_per_second']:,.1f}  " in out
                assert set(figures["others"]) == ({"503"} if name == "crowded" else set())
    assert {path.name for path in Path().iterdir()} == {"bench.json"}


def test_unknown_subject_and_existing_output_are_refused(workplace, refused):
    assert "it takes training or data or predict or accuracy or bundle or serve" in refused("bench", "dat")
    assert "--rounds is 0" in refused("bench", "data", "--rounds", "0")
    assert "--rounds is 0" in refused("bench", "--full", "--rounds", "0")
    assert "--count is 0" in refused("bench", "data", "--count", "0")
    assert "--target above 0" in refused("bench", "accuracy")
    Path("mine").write_text("x")
    assert "mine exists" in refused("bench", "data", "--json", "mine")
