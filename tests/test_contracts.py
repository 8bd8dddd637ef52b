"""What users rely on: options, files and columns, and that what earlier releases wrote is still read.

`contracts/` holds a finished run, its bundle and some images as commit c26ad9c wrote them, what that commit predicted
for the images, and the options that its verbs had.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from project import cli, load
from project.inference import bundle
from tests.conftest import COLOURS, read_csv

CONTRACTS = Path(__file__).parent / "contracts"
OPTIONS = json.loads((CONTRACTS / "options.json").read_text())


@pytest.fixture
def released(workplace):
    """The run of c26ad9c and its images, in the current folder as they were there."""
    shutil.copytree(CONTRACTS / "run", "runs/photos/version_0")
    shutil.copytree(CONTRACTS / "photos", "photos")
    return Path("runs/photos/version_0")


@pytest.mark.parametrize(
    ("path", "word"), [("checkpoints/best.ckpt", "raw"), ("bundle", "raw"), ("bundle", "calibrated")]
)
def test_checkpoint_and_bundle_of_an_earlier_release_predict_the_same(released, path, word, capsys):
    if word == "calibrated":  # export built in every temperature that was known
        metadata = dataclasses.replace(load(released / "bundle").metadata, temperature=1.5, calibrated=True)
        bundle.seal(released / "bundle", metadata)
    assert cli.main(["predict", str(released / path), "photos", "--out", "now.csv"]) == 0
    assert f"now.csv ({word} probabilities)" in capsys.readouterr().out
    for now, then in zip(read_csv("now.csv"), read_csv(CONTRACTS / "predicted.csv"), strict=True):
        assert list(now) == list(then)
        probabilities = {key: pytest.approx(float(then[key]), abs=2e-5) for key in then if key.startswith("p:")}
        assert {key: float(now[key]) for key in probabilities} == probabilities  # other processors, other last bits
        assert (now["path"], now["label"]) == (then["path"], then["label"])
    assert load(released / path).metadata.git_commit.startswith("c26ad9c")


def test_verbs_take_a_run_of_an_earlier_release(released, capsys):
    """Its configuration is the lowest layer of test and of fit --ckpt_path; its split and its predictions are read."""
    assert cli.main(["report"]) == 0
    assert (released / "report.html").exists()
    listed = [f"{name}/000.png,{name},train\n{name}/009.png,{name},val" for name in COLOURS]
    Path("own.csv").write_text("\n".join(["path,label,split", *listed]))
    assert cli.main(["validate", "--data.workers", "0", "--data.split", "own.csv"]) == 0
    assert "val/accuracy" in capsys.readouterr().out


def test_configuration_of_an_earlier_release_is_valid(released, capsys):
    assert cli.main(["fit", "--config", str(released / "config.yaml"), "--print_config"]) == 0
    now = flat(yaml.safe_load(capsys.readouterr().out))
    then = flat(yaml.safe_load((released / "config.yaml").read_text()))
    assert {key: now[key] for key in then} == then


def flat(options, prefix=""):
    found = {}
    for key, value in options.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("verb", sorted(set(OPTIONS) - {"tune"}))  # it has those of fit
def test_options_of_every_verb_stay(verb, workplace, capsys):
    is_trainers = verb in cli.TRAINER_VERBS
    assert cli.main([verb, "--print_config" if is_trainers else "--help"]) == 0
    text = capsys.readouterr().out
    assert set(OPTIONS[verb]) <= set(flat(yaml.safe_load(text)) if is_trainers else re.findall(r"--([\w.]+)", text))


@pytest.mark.parametrize("file", ["metrics.csv", "split.csv"])
def test_columns_of_a_runs_files_stay(at_trained, file):
    then, now = (list(read_csv(folder / file)[0]) for folder in (CONTRACTS / "run", at_trained))
    assert [name for name in now if name in then] == then
