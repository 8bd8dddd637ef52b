"""Sweeps: trials are ordinary runs, the best one is a configuration, and a stopped or killed sweep goes on."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.storages import RDBStorage
from sqlalchemy.pool import NullPool
from torchmetrics.classification import MulticlassAccuracy

from project import cli, runs
from project.classifier import Classifier
from project.commands import sweep
from project.errors import FailedRun
from tests.conftest import read_csv

SPACE = {"model.lr": {"low": "1e-5", "high": "1e-2", "log": True}, "data.augment": ["none", "flip"]}
FIT = {
    "data": {"root": "photos", "image_size": 32, "workers": 0, "batch_size": 8},
    "model": {"name": "squeezenet1_1"},
    "trainer": {"max_epochs": 1},
}


class Broken(MulticlassAccuracy):
    def compute(self):
        return torch.tensor(torch.nan)


HAMMING = {"metrics": [{"class_path": "torchmetrics.HammingDistance", "init_args": {"task": "multiclass"}}]}


@pytest.fixture
def space(photos):
    """Writes a sweep's file, with other entries where they are given."""

    def write(space=SPACE, **fit):
        Path("search.yaml").write_text(yaml.safe_dump({"space": space, "fit": FIT | fit}))
        return "search.yaml"

    write()
    return write


def trials(name="search", database=None):
    storage = RDBStorage(database or f"sqlite:///runs/{name}/study.db", {"poolclass": NullPool})  # leaves nothing open
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def states():
    return [trial.state.name for trial in trials()]


@pytest.mark.slow
def test_sweep_leaves_runs_the_best_configuration_a_table_and_a_page_and_goes_on_from_there(space, capsys):
    assert cli.main(["sweep", "search.yaml", "--trials", "5"]) == 0
    out = capsys.readouterr().out
    assert "next: python -m project.cli test runs/search-" in out
    assert states() == ["COMPLETE"] * 5
    tried = [(trial.value, trial.params["model.lr"], trial.params["data.augment"]) for trial in trials()]
    for number, (value, rate, augment) in enumerate(tried):
        run = Path(f"runs/search-{number}/version_0")
        options = yaml.safe_load((run / "config.yaml").read_text())
        assert (options["model"]["lr"], options["data"]["augment"]) == (pytest.approx(rate), augment)
        assert runs.read_status(run)["state"] == "finished"
        logged = [float(row["val/loss"]) for row in read_csv(run / "metrics.csv") if row["val/loss"]]
        assert value == pytest.approx(min(logged))
    best = min(tried)
    config = yaml.safe_load(Path("runs/search/best.yaml").read_text())
    assert config["model"]["lr"] == pytest.approx(best[1])
    assert [float(row["val/loss"]) for row in read_csv(Path("runs/search/trials.csv"))] == sorted(t[0] for t in tried)
    page = Path("runs/search/sweep.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert cli.main(["fit", "--config", "runs/search/best.yaml"]) == 0
    again = [float(row["val/loss"]) for row in read_csv(Path("runs/photos/version_0/metrics.csv")) if row["val/loss"]]
    assert min(again) == pytest.approx(best[0])
    assert cli.main(["sweep", "search.yaml", "--trials", "5"]) == 0
    assert len(trials()) == 5
    assert cli.main(["sweep", "search.yaml", "--trials", "6"]) == 0
    assert len(trials()) == 6


@pytest.mark.slow
def test_run_of_another_sweep_is_no_trial_and_a_figure_that_is_no_number_ends_one(space, capsys, monkeypatch):
    space({"model.lr": [1e-3, 1e-4]})
    assert cli.main(["sweep", "search.yaml", "--trials", "1"]) == 0
    shutil.rmtree("runs/search")
    runs.write_status(Path("runs/search-0/version_0"), state="failed", job="5")
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}.items():  # fit would resume that run
        monkeypatch.setenv(name, value)
    space({"model.lr": [1e-3, 1e-4]}, monitor="val/broken", model=FIT["model"] | {"metrics": [f"{__name__}.Broken"]})
    capsys.readouterr()
    assert cli.main(["sweep", "search.yaml", "--trials", "1"]) == 1
    assert capsys.readouterr().out.count("has failed: val/broken of runs/search-0/version_1 is nan.") == 2
    assert states() == ["FAIL", "FAIL"]
    assert len(list(Path("runs").glob("search-*/version_*"))) == 2


@pytest.mark.full
def test_worse_trials_end_early_and_a_higher_figure_is_better_where_it_is(space):
    space({"model.lr": [1e-3, 1e-9]}, monitor="val/accuracy", trainer={"max_epochs": 4})
    assert cli.main(["sweep", "search.yaml", "--trials", "9"]) == 0
    rates = {state: {t.params["model.lr"] for t in trials() if t.state.name == state} for state in states()}
    assert rates["COMPLETE"] >= {1e-3}
    assert rates.get("PRUNED", {1e-9}) == {1e-9}
    assert yaml.safe_load(Path("runs/search/best.yaml").read_text())["model"]["lr"] == 1e-3


@pytest.mark.full
def test_failed_trial_is_tried_once_more_and_a_stopped_one_resumed(space, monkeypatch, capsys):
    step, calls = Classifier.training_step, []

    def sometimes(self, batch, batch_idx):
        calls.append(self.global_step)
        if len(calls) in (13, 15):
            raise FailedRun("The disk is full.")
        if len(calls) == 30:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", sometimes)
    assert cli.main(["sweep", "search.yaml", "--trials", "4"]) == 130
    assert capsys.readouterr().out.count("has failed: The disk is full.") == 2
    assert states() == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "FAIL", "WAITING"]
    before = len(calls)
    assert cli.main(["sweep", "search.yaml", "--trials", "4"]) == 0
    assert states() == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials()[5].params == trials()[4].params
    assert len(calls) - before < 8  # of ten steps, which a trial has
    assert not Path("runs/search-5").exists()


@pytest.mark.full
def test_killed_sweep_goes_on_where_it_was(space, monkeypatch):
    space(trainer={"max_epochs": 40}, save_every=0.001)
    words = ["sweep", "search.yaml", "--trials", "2"]
    process = subprocess.Popen([sys.executable, "-m", "project.cli", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("runs/search-0/version_0/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    monkeypatch.setattr(sweep, "GRACE", 1)
    assert cli.main(words) == 0
    assert sorted(states()) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert sorted(path.name for path in Path("runs").glob("search-*")) == ["search-0", "search-2"]
    rows = [row["step"] for row in read_csv(Path("runs/search-0/version_0/metrics.csv")) if row["val/loss"]]
    assert len(rows) == len(set(rows)) == 40


@pytest.mark.full
def test_workers_share_the_trials(space):
    command = [sys.executable, "-m", "project.cli", "sweep", "search.yaml", "--trials", "4", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert states().count("COMPLETE") in (4, 5)  # both may begin at the same moment
    assert Path("runs/search/best.yaml").exists()


@pytest.fixture
def database():
    """The address of a real PostgreSQL, from Debian's package."""
    if not (programs := sorted(Path("/usr/lib/postgresql").glob("*/bin"))):
        pytest.skip("needs Debian's postgresql")
    folder = Path(tempfile.mkdtemp())
    shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_postgres = {"user": "postgres", "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([programs[-1] / "initdb", "-D", "data", "-A", "trust", "-U", "sweep"], check=True, **as_postgres)
    options = ["-D", "data", "-k", folder, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen([programs[-1] / "postgres", *options], **as_postgres)
    try:
        deadline = time.monotonic() + 60
        ready = [programs[-1] / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, **as_postgres).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+psycopg2://sweep@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown
        server.wait()
        shutil.rmtree(folder)


@pytest.mark.full
def test_three_machines_share_a_postgresql_and_one_is_lost(space, database):
    space(trainer={"max_epochs": 12}, save_every=0.001)
    words = ["sweep", "search.yaml", "--trials", "6", "--storage", database]
    machines = [
        subprocess.Popen([sys.executable, "-m", "project.cli", *words], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 120
    while len(list(Path("runs").glob("search-*/version_0/checkpoints/last.ckpt"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    machines[1].kill()
    said = [machine.communicate(timeout=400)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, -signal.SIGKILL, 0], said
    found = trials(database=database)
    assert sorted(trial.state.name for trial in found)[-1] != "RUNNING"
    ended = [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]
    assert 6 <= len(ended) <= 8  # machines that begin their last trials at the same moment begin one too many
    assert sum(trial.state.name == "FAIL" for trial in found) == 1
    assert len({trial.user_attrs["run"] for trial in ended}) == len(ended)
    assert Path("runs/search/sweep.html").exists()


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        ({"space": {"model.lrr": [1e-3, 1e-4]}}, "", "There is no option --model.lrr. Did you mean --model.lr?"),
        ({"space": {"model.lr": 1e-3}}, "", "model.lr is 0.001; give a list of values, or low and high"),
        ({"space": {"model.lr": {"low": 1, "high": 0}}}, "", "give a list of values"),
        ({"space": {"model.lr": {"low": "a", "high": 0}}}, "", "give a list of values"),
        ({"space": {"model.lr": [1e-3]}}, "", "give a list of values"),
        ({"space": {"model.lr": {"low": None, "high": 1}}}, "", "give a list of values"),
        ({"space": {"model.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "", "give a list of values"),
        ({"space": {"trainer.max_epochs": {"low": 1, "high": 3, "step": 0}}}, "", "give a list of values"),
        ({"space": ["model.lr"]}, "", "needs the entries space"),
        ({"space": SPACE, "fit": "model"}, "", "needs the entries space"),
        ({"spaces": {}}, "", "needs the entries space"),
        ({"space": {"model.lr": [1e-3, "x"]}, "fit": {"model": {"lr": "y"}}}, "", "--model.lr is"),
        ({"space": {"model.lr": [1e-3, 1e-4]}, "fit": {"seeds": 2}}, "", "leave --seeds and --folds out"),
        ({"space": SPACE}, "--storage nosuch://x", "--storage nosuch://x cannot be used"),
        ({"space": SPACE}, "--trials 0", "--trials is 0"),
        (
            {"space": SPACE, "fit": FIT | {"monitor": "val/hamming_distance", "model": FIT["model"] | HAMMING}},
            "",
            "A sweep cannot look for the minimum of val/hamming_distance",
        ),
    ],
)
def test_mistakes_are_one_sentence(photos, refused, content, words, sentence):
    content = {"fit": FIT} | content
    Path("search.yaml").write_text(yaml.safe_dump(content))
    assert sentence in refused("sweep", "search.yaml", *words.split())
    assert not list(Path().glob("runs/search-*"))


def test_another_space_is_refused(space, refused):
    assert cli.main(["sweep", "search.yaml", "--trials", "1"]) == 0
    space(SPACE | {"data.augment": ["none", "crop"]})
    assert "give the sweep another --name" in refused("sweep", "search.yaml", "--trials", "2")
