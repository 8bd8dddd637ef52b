"""README.md and docs/ are true: their files, options and targets exist, their commands and snippets run."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from torchvision import datasets

from project import cli
from project.data import digits
from tests.conftest import SMALL, make_images, put_in_cache

ROOT = Path(__file__).parent.parent
PAGES = {file: file.read_text("utf-8") for file in (*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md")))}
README, RECIPE = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "recipe.md"]
SHORT = {"fit": [*SMALL, "--trainer.max_epochs", "1"], "tune": [*SMALL, "--steps", "30"]}
SHORT["bench"] = ["--count", "8", "--rounds", "1"]
SHORT["sweep"] = ["--trials", "1"]


def test_git_ignores_what_the_verbs_write_by_default_and_nothing_else(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    outputs = {"explanations/a.png", "explanations-2/a.png", "predictions.csv", "predictions-2.csv", "preview.png"}
    outputs |= {"runs/photos/lr-finder.png", "data/cache/x", ".predictions.csv.0123456789ab.tmp"}
    own = {"docs/preview.png", "labels.csv", "leave-out.csv", "tests/predictions.csv", "project/data/own.py", "a.png"}
    words = ["git", "-C", tmp_path, "check-ignore", *outputs, *own]
    assert set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()) == outputs


def blocks(language, *pages):
    text = "\n".join(pages or PAGES.values())
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(program, *pages):
    lines = "\n".join(blocks("sh", *pages)).replace("\\\n", "").splitlines()
    unique = dict.fromkeys(line for line in lines if line.startswith(program))
    return [shlex.split(line, comments=True) for line in unique]


def run(command):
    _, _, _, verb, *options = command
    assert cli.main([verb, *options, *SHORT.get(verb, [])]) == 0, command


@pytest.mark.slow
def test_commands_run(photos, hub):
    put_in_cache(hub, "squeezenet1_1")
    photos.rename("DIR")
    digits.write()
    for file in sorted(Path("data/digits/test/7").iterdir())[3:]:
        file.unlink()
    Path("configs").symlink_to(ROOT / "configs")
    found = commands("python -m project.cli", *(text for text in PAGES.values() if text != RECIPE))
    assert {command[3] for command in found} == set(cli.VERBS) - {"serve", "validate"}  # tests/serving serves
    # minutes, or a database; tests/commands and tests/training/test_repeats.py have them
    left_out = {"saving", "--seeds", "--folds", "--storage", "s3://bucket/photos"}
    found = [command for command in found if not left_out & {*command}]
    for command in sorted(
        found, key=lambda command: command[3] not in ("shard", "fit")
    ):  # the others use what these make
        run(command)


@pytest.mark.full
def test_the_recipes_commands_run(workplace):
    make_images(workplace / "photos", {"defective": 20, "functional": 40})
    Path("configs").symlink_to(ROOT / "configs")
    for snippet in blocks("python", RECIPE):
        exec(snippet, {})
    for command in commands("python -m project.cli", RECIPE):
        words = [re.sub(r"\bN\b", "0", word) for word in command]
        if "lite0.pth" in words:  # ImageNet's weights, on the digits; guessing gives 10 %
            kept = words[words.index("--model.name") - 2 * ("--config" in words) : words.index("--model.positive")]
            short = [] if "--config" in words else ["--data.image_size", "32", "--trainer.max_epochs", "1"]
            assert cli.main(["fit", *kept, *short, "--name", words[-1]]) == 0
        else:
            run(words)
    assert json.loads(Path("runs/probe-0/version_0/test_metrics.json").read_text())["test/accuracy"] > 0.85


def test_python_snippet_runs(trained, workplace, capsys):
    Path("runs").symlink_to(trained / "runs")
    for image, name in (("red/000.png", "one.jpg"), ("blue/000.png", "two.png")):
        shutil.copy(trained / "photos" / image, name)
    (snippet,) = blocks("python", README)
    exec(snippet, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["one.jpg", "two.png"]


def test_public_data_set_becomes_a_folder_that_fit_takes(workplace, monkeypatch):
    def without_download(root, train, download):
        images = datasets.FakeData(30 if train else 10, (3, 32, 32), num_classes=2)
        images.classes = ("cat", "dog")
        return images

    monkeypatch.setattr(datasets, "CIFAR10", without_download)
    (snippet,) = [text for text in blocks("python") if "CIFAR10" in text]
    exec(snippet, {})
    assert len(list(Path("cifar10").rglob("*.png"))) == 40
    assert cli.main(["fit", "--data.root", "cifar10", *SHORT["fit"]]) == 0


def test_make_targets_benchmarks_and_extras_exist():
    text, makefile = "\n".join(PAGES.values()), (ROOT / "Makefile").read_text()
    for target in [words[1] for words in commands("make")] + re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    source = (ROOT / "benchmarks" / "__main__.py").read_text()
    benchmarks = re.search(r"benchmarks: Any = \[(.*?)\]", source)[1].split(", ")
    assert set(re.findall(r'make bench ARGS="?(\w+)', text)) == set(benchmarks)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e \.\[(\w+)\]", text)) <= set(extras)


def test_options_exist(workplace, capsys):
    assert cli.main(["fit", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    for verb in (*cli.COMMANDS, "tune"):
        assert cli.main([verb, "--help"]) == 0
    options = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    for key, value in settings.items():
        options |= {f"--{key}.{name}" for name in value} if isinstance(value, dict) else {f"--{key}"}
    # of make bench, pip and docker
    foreign = {"--target", "--epochs", "--seconds", "--no", "--config", "--help", "--ckpt_path", "--shm", "--cpus"}
    foreign |= {"--model.optimizer.help", "--model.optimizer.betas", "--data.class_path", "--data.folder"}  # of a class
    foreign |= {
        "--recursive",
        "--nnodes",
        "--nproc_per_node",
        "--max_restarts",
        "--signal",
        "--requeue",
    }  # of torchrun and SLURM
    foreign |= {"--continue", "--hard"}  # of git

    for file, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w.]*\w", text)) <= options | foreign, file


def test_every_room_is_in_the_tree_and_the_tree_is_true():
    tree = next(block for block in README.split("```\n") if block.startswith("project/")).splitlines()
    parents, edited = [Path()], set()
    for line in tree:
        depth, (name, *words) = (len(line) - len(line.lstrip())) // 2, line.split()
        parents[depth + 1 :] = [parents[depth] / name]
        assert (ROOT / parents[-1]).exists(), line
        edited |= {str(parents[-1])} if "EDIT" in words else set()
    rooms = {path.name for path in (ROOT / "project").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {line.split()[0].rstrip("/") for line in tree}
    (sentence,) = re.findall(r"^Edit: (.*?)/?\. The rest", README, re.MULTILINE)
    shown = {name.removeprefix("project/").replace("models/alexnet.py", "models") for name in edited}
    assert {name.rstrip("/") for name in sentence.split(", ")} == shown


def test_files_and_links_exist_and_the_readmes_first_screen_says_what_to_do():
    assert README.count("\n") <= 250
    for words in ("make fit", "make test", "tensorboard.png", "data/──▶", "Edit: data/"):
        assert words in "\n".join(README.splitlines()[:30])
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith("https://") or (page.parent / target.partition("#")[0]).exists(), (page, target)
        for name in re.findall(r"`((?:[a-z_.]+/)+[\w.-]*\.(?:py|md|yaml|yml|ipynb))`", text):
            assert (ROOT / name).exists() or (ROOT / "project" / name).exists(), (page, name)


def test_a_run_leaves_what_the_tree_shows(tested):
    version = tested / "runs" / "photos" / "version_0"
    tree = next(block for block in README.split("```\n") if block.startswith("runs/"))
    shown = {line.split()[0] for line in tree.splitlines()[1:]}
    there = {str(file.relative_to(version)) for file in version.rglob("*") if file.is_file()}
    assert {re.sub(r"tfevents.*", "tfevents…", name) for name in there} == shown


def outline(text):
    """The sections of a README, each with the code, links and pictures that a translation must keep."""
    for section in re.split(r"^(?=#)", text, flags=re.MULTILINE)[1:]:
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```$", "", section, flags=re.DOTALL | re.MULTILINE)
        yield {
            "level": len(section) - len(section.lstrip("#")),
            "commands": [re.sub(r" +#.*", "", code) for language, code in fences if language],
            # of a tree or a drawing: the names at the beginnings of lines and within them
            "names": [re.findall(r"^ *\S+(?: +EDIT)?|--\w[\w.]*|\w+/\w*", code, re.MULTILINE) for _, code in fences],
            "code": Counter(re.findall(r"`([^`]+)`", prose)),
            "links": Counter(re.findall(r"\]\(([^)]+)\)", prose)) - Counter(["README.md", "README.zh-CN.md"]),
            "rows": len(re.findall(r"^\|", prose, re.MULTILINE)),
            "numbers": Counter(re.findall(r"\d[\d.,]*\d", re.sub(r"`[^`]+`| 11 月", "", prose))),
        }


def test_the_chinese_readme_has_the_same_sections_commands_links_pictures_and_figures():
    chinese = list(outline(PAGES[ROOT / "README.zh-CN.md"]))
    english = list(outline(README))
    assert len(chinese) == len(english)
    for own, other in zip(chinese, english, strict=True):
        assert own == other


def test_each_readme_links_to_the_other_in_its_first_lines():
    for name, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")):
        assert f"]({other})" in "".join(PAGES[ROOT / name].splitlines(True)[:4])
