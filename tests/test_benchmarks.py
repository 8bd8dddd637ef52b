"""The benchmarks that no test of what they compare runs: each to its end, on small images."""

import itertools
import math
from pathlib import Path

import pytest

from benchmarks.accuracy import accuracy
from benchmarks.recipes import recipes
from tests.conftest import SMALL, read_csv


@pytest.mark.full
@pytest.mark.parametrize("target", [0.1, 1.1])
def test_time_to_accuracy_counts_what_reached_it(photos, target, capsys):
    figures = accuracy(target, root="photos", epochs=1, image_size=64, seeds=1)
    assert set(figures["seconds"]) == {"fit", "0.001", "0.0003", "0.0001"}
    reached = [math.isfinite(times[0]) for times in figures["seconds"].values()]
    assert reached == [target < 1] * 4
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("seed 0, ") for line in lines) == 4
    assert lines[-1].startswith(f"to {target}: fit ")


@pytest.mark.full
def test_recipes_go_on_where_they_were(photos, workplace):
    data = {"small": " ".join(["--data.root", str(photos), *SMALL, "--trainer.max_epochs", "1"])}
    recipe = {"adam": "--model.optimizer adam", "sgd, none": "--model.optimizer sgd --data.augment none"}
    Path("recipes.csv").touch()  # as if it was killed in the first fit
    recipes(data, {"adam": recipe["adam"]}, seeds=1)
    first = read_csv("recipes.csv")
    recipes(data, recipe, seeds=2)
    rows = read_csv("recipes.csv")
    assert rows[:1] == first
    assert [(row["seed"], row["recipe"]) for row in rows] == [*itertools.product("01", recipe)]
    assert all(0 <= float(row["test/accuracy"]) <= 1 for row in rows)
