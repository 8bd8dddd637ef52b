"""Shared by the tests: a small generated folder of images, and runs of a small network on it."""

import contextlib
import csv
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from project import cli, models
from project.data import images, workers

pytest.register_assert_rewrite("tests.same_run")
# No test may depend on the course of a training, which TEST_SEED=7 OMP_NUM_THREADS=2 make test changes for every fit.
SEED = ["--seed_everything", os.environ["TEST_SEED"]] if "TEST_SEED" in os.environ else []
SMALL = ["--model.name", "squeezenet1_1", "--data.image_size", "32", "--data.workers", "0", "--data.batch_size", "8"]
SMALL += SEED
# SqueezeNet's last ReLU leaves it without a gradient after some initialisations. Tests that have to learn use this
# network, which also has neither dropout nor batch norm.
ALIVE = ["--model.name", "timm/test_convnext"]
# The networks of the tests are so small that threads wait for each other longer than they work. Processes that a test
# starts use as many threads as this one, and so compute the same bits. Waiting threads yield the core: if more threads
# than cores spin, two files of tests take over ten minutes instead of three.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for child processes, those of pytest -n among them
# Processes that a test starts in another folder import the same project.
IMPORTED = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, IMPORTED))
THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def make_images(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Writes root/<class>/<number>.png: noise around the class's colour, 40x30."""
    random = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = COLOURS.get(name, (128, 128, 128))
        for number in range(count):
            pixels = np.clip(random.normal(colour, 30, (30, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def read_csv(file: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with Path(file).open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="session", autouse=True)
def _worker_server():
    """Starts the process that forks DataLoader workers outside any test's folder, which may be removed too early."""
    workers.start_server()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder; no run or checkpoint is inherited from another test."""
    monkeypatch.chdir(tmp_path)
    for name in ("PROJECT_RUN", "PROJECT_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def photos(workplace):
    """photos/: three colours, 40 images of each."""
    return make_images(workplace / "photos", dict.fromkeys(COLOURS, 40)).relative_to(workplace)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with photos/ and one finished run of a small network; copy what you change."""
    folder = tmp_path_factory.mktemp("trained")
    make_images(folder / "photos", dict.fromkeys(COLOURS, 40))
    with contextlib.chdir(folder):
        fit = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "3", "--model.lr", "0.001"]
        assert cli.main(fit) == 0
    os.environ.pop("PROJECT_RUN", None)
    return folder


@pytest.fixture
def at_trained(trained, monkeypatch):
    """The current folder is the one with the finished run; its newest run is photos/version_0."""
    monkeypatch.chdir(trained)
    return trained / "runs" / "photos" / "version_0"


@pytest.fixture(scope="session")
def lively(trained, tmp_path_factory):
    """A copy of the finished run with a constructed instead of a trained network: all its predictions are right.

    The head of a random network maps the mean features of each class to the logits in `wanted`. The right class has a
    probability of 0.5 to 0.8, no two images alike, whatever the processor.
    """
    wanted = torch.tensor([[2.0, 0.3, 0.6], [0.6, 2.0, 0.3], [0.3, 0.6, 2.0]])
    torch.manual_seed(0)
    network = models.build("squeezenet1_1", 3).eval()
    files = sorted((trained / "photos").rglob("*.png"))
    image = torch.from_numpy(np.stack([images.read(file, 32) for file in files])).permute(0, 3, 1, 2)
    head = network[1].classifier[1]
    with torch.no_grad():
        features = network[1].features(network[0](image)).flatten(1).view(3, len(files) // 3, -1).mean(dim=1)
        weight = (wanted - wanted.mean(dim=0)).T @ torch.linalg.pinv(features - features.mean(dim=0)).T
        head.weight.copy_(weight[:, :, None, None])
        head.bias.copy_(wanted.mean(dim=0) - weight @ features.mean(dim=0))
    run = tmp_path_factory.mktemp("lively") / "runs" / "photos" / "version_0"
    shutil.copytree(trained / "runs" / "photos" / "version_0", run)
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"] = {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
    torch.save(content, run / "checkpoints" / "best.ckpt")
    return run


def mislabel(photos: Path, split: Path) -> None:
    """Replaces every third validation and test image by a blue one, so that not all labels are right."""
    replaced = [row["path"] for row in read_csv(split) if row["split"] in ("val", "test")][::3]
    blue = [file.read_bytes() for file in sorted((photos / "blue").iterdir())]
    for path, content in zip(replaced, blue, strict=False):
        if "blue" not in path:
            (photos / path).write_bytes(content)


@pytest.fixture(scope="session")
def tested(trained, lively, tmp_path_factory):
    """A folder with photos/, some of them with wrong labels, and a tested run; copy what you change."""
    folder = tmp_path_factory.mktemp("tested")
    shutil.copytree(trained / "photos", folder / "photos")
    run = shutil.copytree(lively, folder / "runs" / "photos" / "version_0")
    run.parent.with_name("latest").symlink_to(Path("photos", run.name))
    mislabel(folder / "photos", run / "split.csv")
    with contextlib.chdir(folder):
        assert cli.main(["test"]) == 0
    return folder


def require_no_dead_code(folder: Path) -> None:
    """Looks for dead code in a copy of the project as `make check` does."""
    makefile = (folder / "Makefile").read_text()
    lines = re.search(r"^\t@(\$\(VENV\) -c [^\n]* import VERBS.*?vulture.*?)$", makefile, re.DOTALL | re.MULTILINE)[1]
    (folder / ".venv").mkdir(exist_ok=True)
    words = ["sh", "-ec", lines.replace("$(VENV)", sys.executable)]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def packed(lively, trained, tmp_path_factory):
    """A bundle of the run `lively`; copy what you change."""
    folder = tmp_path_factory.mktemp("packed") / "bundle"
    with contextlib.chdir(trained):
        assert cli.main(["export", str(lively), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of downloaded weights, and no connection."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=urllib.request.URLError("no connection")))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_in_cache(hub, name):
    """Writes random weights under the name of the published ones; returns the network."""
    torch.manual_seed(3)
    network = torchvision.models.get_model(name)
    entry = torchvision.models.get_model_weights(name).DEFAULT
    torch.save(network.state_dict(), hub / entry.url.split("/")[-1])
    return network


def full_disk(monkeypatch, times=10**9):
    """Makes the first `times` renames of finished files fail as on a full disk."""
    left = iter(range(times))

    def fail_or_rename(rename, *words):
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(*words)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, partial(fail_or_rename, getattr(os, name)))


@pytest.fixture
def browser(tmp_path):
    """A real Chromium without a window."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument(f"--user-data-dir={tmp_path}/profile")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a graphics card, for the projector
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1100"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def scripted(monkeypatch):
    """Scripts the probability of the true class in each epoch of training and of validation.

    With `always`, that class gets the probability instead. The loss, the metrics and everything computed from them are
    real; the gradients are 0, so that the weights do not change.
    """

    def follow(train: list[float], val: list[float], always: int | None = None) -> None:
        from project.classifier import Classifier

        step = Classifier._step

        def by_script(self, batch, split):
            share, classes = (train if split == "train" else val)[self.trainer.current_epoch], len(self.class_names)
            label = batch.label if always is None else torch.full_like(batch.label, always)
            probability = torch.full((len(label), classes), (1 - share) / (classes - 1))
            probability[torch.arange(len(label)), label] = share
            with self.network.register_forward_hook(lambda _, __, logits: logits * 0 + probability.log()):
                return step(self, batch, split)

        monkeypatch.setattr(Classifier, "_step", by_script)

    return follow


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with exit code 2 and one sentence, which is returned."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert cli.main(list(argv)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture(autouse=True)
def _reset(monkeypatch):
    """Resets what the test before may have set, and the words of pytest's own command line."""
    torch.set_num_threads(THREADS)
    if torch.distributed.is_initialized():  # of a fit with DDP in this process
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
