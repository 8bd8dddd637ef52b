"""The README is true: its files exist, its commands and snippets run."""

import re
import shlex
from pathlib import Path

import pytest
from torchvision import datasets

from project import cli
from project.data import digits
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(program):
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.fixture
def as_in_the_readme(photos):
    """DIR is a folder of pictures, and the digits and a first run are there."""
    photos.rename("DIR")
    digits.write()
    (photos.parent / "configs").symlink_to(ROOT / "configs")
    assert cli.main(["fit", "--data.root", "DIR", *SMALL, "--trainer.max_epochs", "1"]) == 0


@pytest.mark.slow
def test_commands_run(as_in_the_readme):
    found = commands("python -m project.cli")
    assert {command[3] for command in found} == {
        "fit",
        "test",
        "predict",
        "check",
        "bench",
        "models",
        "report",
        "explain",
        "export",
    }
    for _, _, _, verb, *options in found:
        small = {"fit": [*SMALL, "--trainer.max_epochs", "1"], "bench": ["--count", "8", "--rounds", "1"]}
        assert cli.main([verb, *options, *small.get(verb, [])]) == 0, options


def test_python_snippet_runs(as_in_the_readme, capsys):
    for number, name in enumerate(("one.jpg", "two.png")):
        Path(name).write_bytes(sorted(Path("DIR").rglob("*.png"))[50 * number].read_bytes())
    (snippet,) = [text for text in blocks("python") if "import load" in text]
    exec(snippet, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["one.jpg", "two.png"]


def test_public_data_set_becomes_a_folder_that_fit_takes(workplace, monkeypatch):
    class Pictures(datasets.FakeData):  # what can be had without a download
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            super().__init__(size=30 if train else 10, image_size=(3, 32, 32), num_classes=2)

    monkeypatch.setattr(datasets, "CIFAR10", Pictures)
    (snippet,) = [text for text in blocks("python") if "torchvision" in text]
    exec(snippet, {})
    assert len(list(Path("cifar10").rglob("*.png"))) == 40
    assert cli.main(["fit", "--data.root", "cifar10", *SMALL, "--trainer.max_epochs", "1"]) == 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for _, target, *_ in commands("make") + [["make", t] for t in re.findall(r"`make ([\w-]+)`", README)]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_is_in_the_tree_and_the_tree_is_true():
    tree = next(block for block in blocks("") if block.startswith("project/"))
    named = set(re.findall(r"[\w.-]+\.(?:py|yaml|ipynb)", tree))
    written = {f.name for f in (ROOT / "project").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert written <= named
    assert named <= written | {f.name for f in [*(ROOT / "configs").iterdir(), *(ROOT / "notebooks").iterdir()]}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_a_run_leaves_what_the_tree_shows(tested):
    run = tested / "runs" / "photos" / "version_0"
    tree = next(block for block in blocks("") if block.startswith("runs/"))
    shown = {line.split()[0] for line in tree.splitlines()[1:]}
    there = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert {re.sub(r"tfevents.*", "tfevents…", name) for name in there} == shown
