"""docs/parts.md and docs/drills.md: the lines and the diffs that stand there are what runs here."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli
from project.inference.load import load
from tests.conftest import COLOURS, SMALL, make_images, read_csv, require_no_dead_code

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sections(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))


FILES = {
    title: dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for title, text in sections("parts.md").items()
}
DRILLS = {title: files for title, files in FILES.items() if files}
FIT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]


@pytest.fixture
def drill(photos, monkeypatch, request):
    """Writes the files of a section into the current folder; the options that name them, and those that trust them."""
    files = DRILLS[request.param]
    for name, text in files.items():
        Path(name).write_text(text)
    if request.param == "List of images":
        Path("flat").mkdir()
        for file in Path("photos").glob("*/*.png"):
            shutil.copy(file, f"flat/{file.parent.name}_{file.name}")
    monkeypatch.syspath_prepend(Path.cwd())
    config = next(name for name in files if name.endswith(".yaml"))
    modules = [name.removesuffix(".py") for name in files if name.endswith(".py")]
    paths = re.findall(rf"class_path: ((?:{'|'.join(modules) or '-'})\.\w+)", files[config])
    yield ["--config", config], [f"--trust={path}" for path in paths], yaml.safe_load(files[config])
    for module in modules:
        sys.modules.pop(module, None)


def mark_of(title):
    """Half of the sections are rare ones, which have other tests, too."""
    return pytest.mark.full if title in ("Data", "Logger and callbacks", "Module") else pytest.mark.slow


def words(config):
    """The options of a small fit on photos/, without those that the configuration has."""
    if "class_path" in config.get("data", {}):
        return SMALL[:2]
    return ["--data.root", "photos", *(SMALL[2:] if "network" in config.get("model", {}) else SMALL)]


@pytest.mark.parametrize("drill", [pytest.param(title, marks=mark_of(title)) for title in DRILLS], indirect=True)
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


CHANGES = sections("drills.md")
DIFFS = {
    title: "".join(re.findall(r"^```diff\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for title, text in CHANGES.items()
}


def changed(diff):
    """The files that a diff changes, and those that it adds."""
    files = re.findall(r"^--- (\S+)\n\+\+\+ b/(\S+)$", diff, re.MULTILINE)
    return {new for old, new in files if old != "/dev/null"}, {new for old, new in files if old == "/dev/null"}


def checkout(folder, *titles):
    """A copy of the files that git has or would add, with the diffs of these sections."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q", folder], check=True)
    for title in titles:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=DIFFS[title], text=True, check=True)
    return folder


def python(folder, *words, code=0):
    """Runs the Python of the tests in a checkout, on its own package; returns what is printed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout


def follow(folder, title):
    """Runs the commands of a section in a checkout, fits as small ones; returns what they print."""
    printed = []
    for line in re.findall(r"^\$ (.+)$", CHANGES[title], re.MULTILINE):
        program, *words = shlex.split(line)
        if program != "python":
            printed.append(
                subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, check=True).stdout
            )
            continue
        if "fit" in words:
            words[3:3] = SMALL[2:] if "--model.network" in words else SMALL
            words += ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
        printed.append(python(folder, *words))
    return printed


def test_diffs_apply_are_short_and_clean_and_touch_the_files_that_the_page_and_the_readme_name(tmp_path):
    folder, touched, source = checkout(tmp_path, *DIFFS), set(), Path(__file__).read_text(encoding="utf-8")
    for title, diff in DIFFS.items():
        (row,) = re.findall(rf"^\| {title.lower()} \| (.+) \|$", README, re.MULTILINE)
        before, (old, new) = CHANGES[title].partition("```diff")[0], changed(diff)
        assert 0 < len(re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)) <= 15, title
        for name in (Path(file).relative_to("project") for file in old):
            assert f"`{name}`" in before, (title, name)
            assert name.name in row, (title, name)
        for name in (Path(file).relative_to("project") for file in new):
            assert f"new file in `{name.parent}/`" in before, (title, name)
            assert " file" in row, (title, name)
        assert {*old, *new}
        assert not touched & {*old, *new}
        assert f'("{title}")' in source or f', "{title}")' in source, "a test follows the section"
        touched |= {*old, *new}
    for words in (["format", "--check"], ["check"]):
        python(folder, "-m", "ruff", *words, "--no-cache", *touched)


@pytest.mark.slow
def test_a_new_verb_is_listed_and_runs(tmp_path):
    folder = checkout(tmp_path, "Add a verb")
    shutil.copytree(folder / "tests" / "contracts" / "run", folder / "runs" / "photos" / "version_0")
    (folder / "runs" / "latest").symlink_to("photos/version_0")
    verbs, classes = follow(folder, "Add a verb")
    assert "  classes   list the classes" in verbs
    assert classes.split() == sorted(COLOURS)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_diffs_keep_the_types_the_layers_and_the_limits_but_that_of_lines(tmp_path):
    folder = checkout(tmp_path, *DIFFS)
    test = folder / "tests" / "test_architecture.py"
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in folder.glob("project/**/*.py"))
    names, values = re.search(r"^(ENTRIES.*) = (.*)$", test.read_text(), re.MULTILINE).groups()
    raised = values.split(", ")
    raised[names.split(", ").index("LINES")] = str(lines)
    test.write_text(test.read_text().replace(values, ", ".join(raised)))
    assert " passed" in python(folder, "-m", "pytest", "-q", str(test))
    assert "Success" in python(folder, "-m", "mypy", "--cache-dir", os.devnull, "project")
    require_no_dead_code(folder)


@pytest.fixture
def followed(tmp_path, request):
    """A checkout in which the commands of a section have run, and what they have printed."""
    folder = make_images(checkout(tmp_path, request.param) / "DIR", dict.fromkeys(COLOURS, 40)).parent
    for example in re.findall(r"^```json\n(.*)\n```$", CHANGES[request.param], re.MULTILINE):
        rows = [str(file.relative_to(folder)) for file in sorted(folder.glob("DIR/*/*"))]
        lines = [example.replace("DIR/red/000.png", row).replace('"red"', f'"{row.split("/")[1]}"') for row in rows]
        (folder / "photos.jsonl").write_text("\n".join(lines))
    return folder, follow(folder, request.param)


def of(title):
    return pytest.mark.parametrize("followed", [title], indirect=True)


@pytest.mark.full
@of("Use another network")
def test_a_new_network_is_listed_and_trained_and_a_network_of_torchvision_is_a_flag(followed):
    _, (_, table, _, recorded) = followed
    assert "--model.network project.models.small.Small" in table
    assert "class_path: project.models.small.Small" in recorded


@pytest.mark.full
@of("Use other data")
def test_a_new_source_is_checked_and_trained_on(followed):
    folder, (_, checked, _, split) = followed
    assert "photos.jsonl: 120 images, 3 classes" in checked
    assert split.splitlines()[:1] == ["path,label,split"]
    rows = read_csv(folder / "runs" / "latest" / "split.csv")
    assert [row["path"] for row in rows] == [str(file.relative_to(folder)) for file in sorted(folder.glob("DIR/*/*"))]
    assert all(row["path"].split("/")[1] == row["label"] for row in rows)


@pytest.mark.full
@of("Change the loss")
def test_a_new_loss_is_trained_and_is_what_its_docstring_says(followed):
    folder, printed = followed
    assert "loss: poly" in printed[-1]
    program = """if True:
        import torch
        from project import losses
        logits, label = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
        wrong = 1 - logits.softmax(dim=1)[range(5), label]
        wanted = (torch.nn.functional.cross_entropy(logits, label, reduction="none") + wrong).sum()
        torch.testing.assert_close(losses.LOSSES["poly"](logits, label, None, 0.0), wanted)"""
    python(folder, "-c", program)


@pytest.mark.full
@of("Change the optimiser or its schedule")
def test_a_new_schedule_falls_in_a_line_after_the_warm_up(followed):
    _, printed = followed
    rates = [float(line.split(",")[0]) for line in printed[-1].splitlines()[1:] if line.split(",")[0]]
    steps = [second - first for first, second in itertools.pairwise(rates)]
    assert len(rates) == 10
    assert steps[0] > 0
    assert steps[1:] == pytest.approx([steps[1]] * (len(steps) - 1))
    assert steps[1] < 0


@pytest.mark.full
@of("Augment otherwise")
def test_a_new_augmentation_is_drawn_and_trained_with(followed):
    folder, _ = followed
    assert (folder / "preview.png").stat().st_size > 10_000
    assert yaml.safe_load((folder / "runs" / "latest" / "config.yaml").read_text())["data"]["augment"] == "turn"
    program = """if True:
        import numpy as np
        from project.data.transforms import AUGMENTATIONS
        image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        seen = {AUGMENTATIONS["turn"].apply(image, np.random.default_rng(seed), 2).tobytes() for seed in range(99)}
        assert len(seen) == 8"""  # four turns of the image and of its mirror image
    python(folder, "-c", program)


@pytest.mark.full
@of("Add a metric")
def test_a_new_metric_is_in_validation_test_tensorboard_and_the_report(followed):
    folder, printed = followed
    run = (folder / "runs" / "latest").resolve()
    assert '"test/top2"' in printed[-1]
    assert 0 <= json.loads((run / "test_metrics.json").read_text())["test/top2"] <= 1
    assert any(row["val/top2"] for row in read_csv(run / "metrics.csv"))
    events = EventAccumulator(str(run))
    events.Reload()
    assert "val/top2" in events.Tags()["scalars"]
    assert "top2" in (run / "report.html").read_text(encoding="utf-8")
