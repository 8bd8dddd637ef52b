"""A wheel is whole, small and works outside a checkout; the files that a code host shows are true."""

import inspect
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import project
from project import cli, files
from project.commands.serve import serve
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
DISTRIBUTION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGE = Path(project.__file__).parent.name


def run(*command, **options):
    """The output of a command, which must succeed, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(*folders):
    """The files of the checkout that git does not ignore, as paths in it."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    return {name for name in run(*words, cwd=ROOT).split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An sdist, and the wheel that is built from it, as an index serves them."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in sources():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-c", build, cwd=folder / "checkout")
    (sdist,) = folder.glob("*.tar.gz")
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, sdist]
    run(sys.executable, "-m", "pip", "wheel", *words)
    return sdist, next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def script(archives, tmp_path_factory):
    """The console script of the wheel, in an environment of its own that sees the dependencies of this one."""
    environment = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    bin, packages = ("Scripts", "Lib/site-packages") if os.name == "nt" else ("bin", "lib/python*/site-packages")
    (packages,) = environment.glob(packages)
    # folders that a .pth file names come last, and their own .pth files, such as an editable install's, do not count
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    suffix = ".exe" if os.name == "nt" else ""
    install = ["--python", environment / bin / f"python{suffix}", "install", "--no-deps", "--no-index", archives[1]]
    run(sys.executable, "-m", "pip", *install)
    return environment / bin / f"{DISTRIBUTION['name']}{suffix}"


@pytest.mark.slow
def test_wheel_has_every_file_of_the_package_and_its_configurations_and_no_other_and_is_small(archives):
    sdist, wheel = archives
    configs = {f"{PACKAGE}/{name}" for name in sources("configs") if name.count("/") == 1}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for name in names:
            assert archive.read(name) == (ROOT / (name if name not in configs else name.partition("/")[2])).read_bytes()
    assert names == sources(PACKAGE) | configs
    assert len(configs) > 5
    assert wheel.stat().st_size <= 500_000
    with tarfile.open(sdist) as archive:
        packed = {name.split("/")[1] for name in archive.getnames() if "/" in name and ".egg-info" not in name}
    of_setuptools = {"PKG-INFO", "setup.cfg"}
    assert packed - of_setuptools == {
        PACKAGE,
        "configs",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
    }


@pytest.mark.slow
def test_console_script_of_the_wheel_runs_outside_the_checkout(script, tmp_path):
    assert run(script, "--version", cwd=tmp_path) == f"{DISTRIBUTION['name']} {DISTRIBUTION['version']}\n"
    assert set(cli.VERBS) <= set(run(script, "--help", cwd=tmp_path).split())
    (tmp_path / "nets.py").touch()  # in the current folder, where python -m finds modules, too
    done = subprocess.run([script, "fit", "--model.network", "nets.Tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert "nets has no Tiny." in done.stderr
    find = f"from {PACKAGE} import files; print(files.shipped('configs/quick.yaml'))"
    found = run(script.with_stem("python"), "-c", find, cwd=tmp_path).strip()
    assert Path(found).is_relative_to(script.parents[1])
    assert Path(found).read_bytes() == (ROOT / "configs" / "quick.yaml").read_bytes()


@pytest.mark.full
def test_wheel_trains_on_its_own_data_by_its_own_configuration_and_predicts_outside_the_checkout(script, tmp_path):
    run(script, "fit", "--config", "configs/quick.yaml", *SMALL, cwd=tmp_path)
    run(script, "test", cwd=tmp_path)
    assert (tmp_path / "runs" / "quick" / "version_0" / "report.html").exists()
    images = tmp_path / "data" / "digits" / "test" / "7"
    run(script, "predict", "runs/latest", images, cwd=tmp_path)
    assert (tmp_path / "predictions.csv").read_text().count("\n") == len(list(images.iterdir())) + 1


def test_configuration_of_the_package_is_found_by_its_name_unless_the_folder_has_one(photos, refused, capsys):
    assert files.shipped("configs/folder.yaml") == str(ROOT / "configs" / "folder.yaml")
    for other in ("folder.yaml", "configs/none.yaml", "../configs/folder.yaml", "configs/slurm/train.sh"):
        assert files.shipped(other) == other
    assert "configs" not in refused("check", "none", "--config", "configs/folder.yaml", "--preview", "a.png")
    assert cli.main(["fit", "--config=configs/quick.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "quick"
    Path("configs").mkdir()
    Path("configs/quick.yaml").write_text("name: own\n")
    assert cli.main(["fit", "--config", "configs/quick.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "own"


@pytest.mark.slow
def test_sweep_finds_the_packages_space_by_its_name(workplace, refused):
    assert "--storage none" in refused("sweep", "configs/sweep.yaml", "--storage", "none")  # the file was read before
    assert refused("sweep", "configs/none.yaml").startswith("Cannot read configs/none.yaml")


def test_version_is_the_same_everywhere_and_the_changelog_tells_of_it():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    released = re.findall(r"^## \[(.+?)\](.*)$", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert released[0] == ("Unreleased", "")
    assert released[1][0] == citation["version"]
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released[1:])
    assert project.__version__ == DISTRIBUTION["version"]
    if citation["title"] == DISTRIBUTION["name"]:  # in a renamed fork both files are about the template
        assert citation["version"] == DISTRIBUTION["version"]


def test_citation_has_what_its_format_asks_for_and_names_the_source_of_the_digits():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
    assert citation["references"][-1]["doi"] in (ROOT / PACKAGE / "data" / "digits.md").read_text("utf-8")


def test_development_container_has_the_oldest_python_and_runs_a_target_that_exists():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    assert container["image"].rpartition(":")[2] == DISTRIBUTION["requires-python"].removeprefix(">=")
    assert container["forwardPorts"] == [6006, 8000]
    assert has_target(container["postCreateCommand"])


def has_target(command):
    make, *targets = shlex.split(command, comments=True)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    names = [target for target in targets if "=" not in target]
    return make == "make" and all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in names)


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_commands_of_the_page_exist(page):
    text = PAGES[page]
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]+\.md)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    code = re.findall(r"`([^`\n]+)`", text) + "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    for name in (word for words in code for word in words.split() if re.fullmatch(r"[\w./-]+/[\w.-]*", word)):
        known = re.search("NAME|/bin/|healthz", name)  # /bin/ of the environment
        assert known or (ROOT / name).exists(), name
    for command in code:
        assert not command.startswith("make ") or has_target(command), command
        for verb in re.findall(r"-m project\.cli (\w+)", command):
            assert verb in cli.VERBS


def test_limits_of_the_server_are_its_options():
    options = {f"--{name}" for name in inspect.signature(serve).parameters}
    assert (
        {"--trust", "--max_body"}
        < set(re.findall(r"(?<![\w-])--[a-z]\w*", PAGES["SECURITY.md"]))
        <= options | {"--config"}
    )
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    assert inspect.signature(serve).parameters["port"].default in container["forwardPorts"]
