"""What the tests share: a small made folder of pictures, and runs of a small network on it."""

import csv
import errno
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from project import cli, models
from project.data import images, workers

pytest.register_assert_rewrite("tests.same_run")
# No test may depend on the course of a training: TEST_SEED=7 OMP_NUM_THREADS=2 make test gives every fit another one.
SEED = ["--seed_everything", os.environ["TEST_SEED"]] if "TEST_SEED" in os.environ else []
SMALL = ["--model.name", "squeezenet1_1", "--data.image_size", "32", "--data.workers", "0", "--data.batch_size", "8"]
SMALL += SEED
# Its last ReLU leaves SqueezeNet without a gradient from many a start; what has to learn takes this network, which also
# is without dropout and batch norm.
ALIVE = ["--model.name", "timm/test_convnext"]
# The networks of the tests are so small that threads wait for each other longer than they work. Processes that a test
# starts compute with as many threads as this one, and so to the same bits. Threads that wait give the core away: where
# more threads than cores spin, two files of tests take over ten minutes instead of three.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes to come, those of pytest -n among them
THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def make_pictures(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Writes root/<class>/<number>.png: noise around the class's colour, 40x30."""
    random = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = COLOURS.get(name, (128, 128, 128))
        for number in range(count):
            pixels = np.clip(random.normal(colour, 30, (30, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def _worker_server():
    """DataLoaders' workers come from a process that starts here: a test's folder may be gone before it has started."""
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
    """photos/: three colours, 40 pictures of each."""
    return make_pictures(workplace / "photos", dict.fromkeys(COLOURS, 40)).relative_to(workplace)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with photos/ and one finished run of a small network; copy what you change."""
    place = tmp_path_factory.mktemp("trained")
    make_pictures(place / "photos", dict.fromkeys(COLOURS, 40))
    before = Path.cwd()
    os.chdir(place)
    try:
        assert (
            cli.main(["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "3", "--model.lr", "0.001"]) == 0
        )
    finally:
        os.chdir(before)
        os.environ.pop("PROJECT_RUN", None)
    return place


@pytest.fixture
def at_trained(trained, monkeypatch):
    """The current folder is the one with the finished run; its newest run is photos/version_0."""
    monkeypatch.chdir(trained)
    return trained / "runs" / "photos" / "version_0"


@pytest.fixture(scope="session")
def lively(trained, tmp_path_factory):
    """A copy of the finished run with another network, which was not trained but made: all its answers are right."""
    run = tmp_path_factory.mktemp("lively") / "runs" / "photos" / "version_0"
    shutil.copytree(trained / "runs" / "photos" / "version_0", run)
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    network = network_that_knows_colours(trained / "photos").state_dict()
    content["state_dict"] = {f"network.{key}": tensor for key, tensor in network.items()}
    torch.save(content, run / "checkpoints" / "best.ckpt")
    return run


def network_that_knows_colours(photos: Path) -> torch.nn.Module:
    """A random network with a head that gives the mean features of each class the logits of `wanted`.

    No course of a training decides what it answers: the right class with 0.5 to 0.8, and no two pictures alike.
    """
    wanted = torch.tensor([[2.0, 0.3, 0.6], [0.6, 2.0, 0.3], [0.3, 0.6, 2.0]])
    torch.manual_seed(0)
    network = models.build("squeezenet1_1", 3).eval()
    files = [file for name in sorted(COLOURS) for file in sorted((photos / name).iterdir())]
    image = torch.from_numpy(np.stack([images.read(file, 32) for file in files])).permute(0, 3, 1, 2)
    head = network[1].classifier[1]
    with torch.no_grad():
        features = network[1].features(network[0](image)).flatten(1).view(3, len(files) // 3, -1).mean(dim=1)
        weight = (wanted - wanted.mean(dim=0)).T @ torch.linalg.pinv(features - features.mean(dim=0)).T
        head.weight.copy_(weight[:, :, None, None])
        head.bias.copy_(wanted.mean(dim=0) - weight @ features.mean(dim=0))
    return network


def mislabel(photos: Path, split: Path) -> None:
    """Every third validation and test picture shows what is blue, so that not all of its labels are right."""
    with split.open() as stream:
        hard = [row["path"] for row in csv.DictReader(stream) if row["split"] in ("val", "test")][::3]
    blue = [file.read_bytes() for file in sorted((photos / "blue").iterdir())]
    for number, path in enumerate(hard):
        if "blue" not in path:
            (photos / path).write_bytes(blue[number])


@pytest.fixture(scope="session")
def tested(trained, lively, tmp_path_factory):
    """A folder with photos/, of which some labels are wrong, and a tested run; copy what you change."""
    place = tmp_path_factory.mktemp("tested")
    shutil.copytree(trained / "photos", place / "photos")
    run = shutil.copytree(lively, place / "runs" / "photos" / "version_0")
    run.parent.with_name("latest").symlink_to(Path("photos", run.name))
    mislabel(place / "photos", run / "split.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["test"]) == 0
    return place


@pytest.fixture(scope="session")
def packed(lively, trained, tmp_path_factory):
    """A bundle of it; copy what you change."""
    place = tmp_path_factory.mktemp("packed") / "bundle"
    before = Path.cwd()
    os.chdir(trained)
    try:
        assert cli.main(["export", str(lively), "--out", str(place)]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of downloaded weights, and no connection."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise urllib.request.URLError("no connection")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    return place


def put_in_cache(hub, name):
    """Random weights under the name of the published ones."""
    torch.manual_seed(3)
    network = torchvision.models.get_model(name)
    entry = torchvision.models.get_model_weights(name).DEFAULT
    torch.save(network.state_dict(), hub / entry.url.split("/")[-1])
    return network


def full_disk(monkeypatch, times=10**9):
    """The first writes that must reach the disk fail as on a full one, at the system call."""
    left, fsync = [times], os.fsync

    def fail(descriptor):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.fixture
def browser(tmp_path):
    """A real Chromium without a window."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-unsafe-swiftshader",  # WebGL without a graphics card, for the projector
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=1500,1100",
    ):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture
def scripted(monkeypatch):
    """Has fits follow a script: the probability of the true class in training and in validation, an epoch each.

    With `always`, that class has it, whatever is true. Loss, figures and all that looks at them are real; the gradients
    are 0, so the weights stay as they are.
    """

    def follow(train: list[float], val: list[float], always: int | None = None) -> None:
        from project.classifier import Classifier

        step = Classifier._step

        def by_script(self, batch, split):
            share, classes = (train if split == "train" else val)[self.trainer.current_epoch], len(self.class_names)
            answer = batch.label if always is None else torch.full_like(batch.label, always)
            probability = torch.full((len(answer), classes), (1 - share) / (classes - 1))
            probability[torch.arange(len(answer)), answer] = share
            hook = self.network.register_forward_hook(lambda _, __, logits: logits * 0 + probability.log())
            made = step(self, batch, split)
            hook.remove()
            return made

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
        assert "Traceback" not in captured.err
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture(autouse=True)
def _threads():
    """As many for every test, whatever the one before has set."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
