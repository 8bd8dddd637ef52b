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
HALF_A_LETTER = "\ud800"
INVALID = {
    "model": [None, 7],
    "class_names": [None, [1, 2, 3], ["only one"], ["a", "a", "b"], ["blue", "green", HALF_A_LETTER]],
    "image_size": [None, 10**9, 0, True, "32"],
    "resize": [None, "../../etc", ["crop"], "crop:hamming:0.9", "crop:bicubic:0", "crop:bicubic:1.5"],
    "mean": [None, [0.5, math.nan, 0.5], [0.5, "x", 0.5]],
    "std": [None, [0.0, 0.0, 0.0]],
    "config": [None, {"data": {}}, *({"data": d, "model": {}, "trainer": {}} for d in ({"root": 7}, {"fold": "1"}))],
    "versions": [["2.14"]],
    "git_commit": [7],
    "temperature": [0.0, "warm"],
    "calibrated": ["perhaps"],
}


def test_values_become_attributes_and_the_rest_has_defaults():
    metadata = Metadata.parse(VALID | {"versions": None, "unknown": 1}, "x")
    assert {name: value for name, value in asdict(metadata).items() if name in VALID} == VALID
    assert Metadata.parse(VALID | {"resize": "crop:bicubic:0.875"}, "x").resize == "crop:bicubic:0.875"
    assert (metadata.versions, metadata.git_commit, metadata.temperature, metadata.calibrated) == ({}, "", 1.0, None)


@pytest.mark.parametrize("key", INVALID)
def test_invalid_or_missing_value_is_refused(key):
    for value in INVALID[key]:
        with pytest.raises(UserError, match=rf"^x is not a checkpoint: its {key} is not [\w ,.-]+\.$"):
            Metadata.parse(VALID | {key: value}, "x is not a checkpoint")


def test_checkpoint_and_bundle_have_the_same_metadata_but_for_what_export_adds(lively, packed):
    run, bundle = (asdict(load(path).metadata) for path in (lively, packed))
    added = {"temperature", "calibrated", "precision", "export", "compared", "int8"}
    assert {key for key in run if run[key] != bundle[key]} <= added
