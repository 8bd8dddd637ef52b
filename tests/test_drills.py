"""The parts of docs/parts.md: the lines that stand there, in one file and one configuration, go through the verbs."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from project import cli
from project.inference.load import load
from tests.conftest import SMALL

PAGE = Path(__file__).parent.parent.joinpath("docs", "parts.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FILES = {
    title: dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for title, text in SECTIONS.items()
}
DRILLS = {title: files for title, files in FILES.items() if files}
FIT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]


@pytest.fixture
def drill(photos, monkeypatch, request):
    """Writes the files of a section into the current folder; the options that name them, and those that trust them."""
    files = DRILLS[request.param]
    for name, text in files.items():
        Path(name).write_text(text)
    monkeypatch.syspath_prepend(Path.cwd())
    config = next(name for name in files if name.endswith(".yaml"))
    modules = [name.removesuffix(".py") for name in files if name.endswith(".py")]
    paths = re.findall(rf"class_path: ((?:{'|'.join(modules) or '-'})\.\w+)", files[config])
    yield ["--config", config], [f"--trust={path}" for path in paths], yaml.safe_load(files[config])
    for module in modules:
        sys.modules.pop(module, None)


def words(config):
    """The options of a small fit on photos/, without those that the configuration has."""
    if "class_path" in config.get("data", {}):
        return SMALL[:2]
    return ["--data.root", "photos", *(SMALL[2:] if "network" in config.get("model", {}) else SMALL)]


@pytest.mark.slow
@pytest.mark.parametrize("drill", DRILLS, indirect=True)
def test_documented_lines_fit_test_predict_and_export(drill, capsys):
    options, trust, config = drill
    assert cli.main(["fit", *words(config), *FIT, *options]) == 0
    os.environ.pop("PROJECT_RUN", None)
    run = Path("runs/latest").resolve()
    for verb in (
        ["test", "runs/latest"],
        ["predict", "runs/latest", "photos/red"],
        ["export", "runs/latest", "--out", "bundle"],
    ):
        assert cli.main([*verb, *trust]) == 0, capsys.readouterr().err
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    for section, entries in config.items():
        for name, entry in (entries | entries.pop("init_args", {})).items():
            first = recorded[section][name]
            first, entry = (one[0] if isinstance(one, list) else one for one in (first, entry))
            assert first == entry or first["class_path"] == entry["class_path"]
    assert load("bundle").predict(["photos/red/000.png"])[0].label


def test_what_the_page_says_of_kappa_rotation_nadam_and_the_callback_is_so(photos, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path.cwd())
    for files in DRILLS.values():
        for name, text in files.items():
            Path(name).write_text(text)
    configs = [word for name in ("kappa", "rotation", "focal", "loggers") for word in ("--config", f"{name}.yaml")]
    assert cli.main(["fit", "--data.root", "photos", *SMALL, *FIT, *configs]) == 0
    assert "good morning" in capsys.readouterr().out
    run = Path("runs/latest").resolve()
    assert "val/cohen_kappa" in (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert list(Path("mine").rglob("metrics.csv"))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert "mu_product" in next(iter(state["optimizer_states"][0]["state"].values()))  # NAdam's
    assert state["optimizer_states"][0]["param_groups"][0]["betas"] == (0.9, 0.99)
    for module in ("losses", "callbacks"):
        sys.modules.pop(module, None)
