"""Metadata is validated, whoever wrote the file, and invalid values are refused in one sentence."""

import math
from dataclasses import asdict

import pytest

from project import load
from project.errors import UserError
from project.inference.metadata import Metadata

VALID = {
    "model": "alexnet",
    "class_names": ["blue", "green", "red"],
    "image_size": 32,
    "resize": "stretch",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "config": {"data": {"root": "photos", "split_seed": 0}, "model": {}, "trainer": {}},
}
INVALID = [
    ("model", 7),
    ("class_names", None),
    ("class_names", [1, 2, 3]),
    ("class_names", ["only one"]),
    ("class_names", ["a", "a", "b"]),
    ("class_names", ["blue", "green", "\ud800"]),  # half a letter
    ("image_size", 10**9),
    ("image_size", 0),
    ("image_size", True),
    ("image_size", "32"),
    ("resize", "../../etc"),
    ("resize", ["crop"]),
    ("mean", [0.5, math.nan, 0.5]),
    ("mean", [0.5, "x", 0.5]),
    ("std", [0.0, 0.0, 0.0]),
    ("config", {"data": {}}),
    ("config", {"data": {"root": 7}, "model": {}, "trainer": {}}),
    ("config", {"data": {"fold": "1"}, "model": {}, "trainer": {}}),
    ("versions", ["2.14"]),
    ("git_commit", 7),
    ("calibrated", "perhaps"),
]


def test_values_become_attributes_and_the_rest_has_defaults():
    metadata = Metadata.parse(VALID | {"versions": None, "unknown": 1}, "x")
    assert {name: value for name, value in asdict(metadata).items() if name in VALID} == VALID
    assert (metadata.versions, metadata.git_commit, metadata.temperature, metadata.calibrated) == ({}, "", 1.0, None)


@pytest.mark.parametrize(("key", "value"), INVALID)
def test_invalid_value_is_refused(key, value):
    with pytest.raises(UserError, match=rf"^x is not a checkpoint: its {key} is not [\w ,-]+\.$"):
        Metadata.parse(VALID | {key: value}, "x is not a checkpoint")


@pytest.mark.parametrize("key", [*VALID, "temperature", "calibrated"])
def test_missing_value_is_refused(key):
    values = VALID | {"temperature": 1.0, "calibrated": False}
    assert not Metadata.parse(values, "x", of_bundle=True).calibrated
    with pytest.raises(UserError, match=f"x: its {key} is not"):
        Metadata.parse({name: value for name, value in values.items() if name != key}, "x", of_bundle=True)


def test_run_and_its_checkpoint_and_its_bundle_have_the_same_metadata(lively, packed, at_trained):
    run, checkpoint, bundle = (load(path).metadata for path in (lively, lively / "checkpoints" / "best.ckpt", packed))
    assert run == checkpoint
    only_bundle = {"temperature", "calibrated", "precision", "export", "compared", "int8"}
    assert {k: v for k, v in asdict(bundle).items() if k not in only_bundle} == {
        k: v for k, v in asdict(run).items() if k not in only_bundle
    }
