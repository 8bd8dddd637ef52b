"""Several processes and machines: what launchers start, ranks that differ or die, and elastic restarts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from project import cli
from project.training.distributed import launched
from tests.conftest import ALIVE, SMALL
from tests.same_run import logged
from tests.training.test_processes import CLI, FIT, ROOT, on, script, started

RUN = Path("runs/photos/version_0")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        (TORCHRUN, {"num_nodes": 2, "devices": 2}),
        (SLURM, {"num_nodes": 3, "devices": 2}),
        (SLURM | {"SLURM_NTASKS": "1"}, {}),  # a job of one task, which may use all GPUs of its machine
        ({}, {}),
    ],
)
def test_processes_of_a_launcher_are_counted(monkeypatch, variables, processes):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched(1, "auto") == processes


def test_devices_that_are_not_the_processes_that_were_started_are_refused(photos, monkeypatch, capsys):
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert cli.main([*FIT, *on(3)]) == 2
    sentence = "--trainer.devices 3 and --trainer.num_nodes 1 are 3 processes, but 4 were started; leave both out."
    assert sentence in capsys.readouterr().err
    assert not Path("runs").exists()


def ranks_of(process):
    """The processes of a fit by their ranks; the first is not started by Lightning."""
    ranks = {child.environ().get("LOCAL_RANK"): child for child in process.children()}
    return {"0": process} | {rank: child for rank, child in ranks.items() if rank}


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.full)])
def test_a_rank_that_dies_brings_the_others_down_in_a_sentence_and_the_fit_can_be_resumed(photos, rank):
    words = [*FIT, *ALIVE, *on(2), "--save_every", "0.001", "--trainer.max_epochs", "500"]
    process = started(*CLI, *words, until=(RUN / "checkpoints" / "last.ckpt").exists)
    ranks = ranks_of(process)
    killed = time.monotonic()
    ranks[rank].send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    psutil.wait_procs(ranks.values(), timeout=60)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks.values())
    assert time.monotonic() - killed < 60
    assert "Traceback" not in out
    assert out.count("failed: The processes of this command have lost each other (") == 1
    assert cli.main(["fit", "--resume", str(RUN), "--trainer.devices", "1", "--trainer.max_epochs", "1"]) in (0, 2)


def agent(folder, nodes, restarts, *words):
    """Starts torchrun's agent of one machine, with a folder of its own."""
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29577", "--rdzv-id=it", "--local-addr=127.0.0.1"]
    limits = "--rdzv-conf=join_timeout=60,last_call_timeout=3,timeout=60"
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, limits, f"--nnodes={nodes}"]
    command += ["--nproc-per-node=1", f"--max-restarts={restarts}", "-m", "project.cli"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return psutil.Popen([*command, *words], cwd=folder, env=environ, **pipes)


@pytest.fixture
def machines(photos):
    """Two folders, each with the photos and room for a cache; runs/ beside them is shared."""
    for name in ("a", "b"):
        shutil.copytree("photos", Path(name, "photos"))
    return Path("a"), Path("b")


MANY = [*FIT, *ALIVE, "--trainer.accelerator", "cpu", "--runs", "../runs", "--resume", "auto"]


@pytest.mark.slow
def test_machines_with_other_images_are_told_so_on_the_first_rank_and_nothing_is_left(machines):
    next((machines[1] / "photos" / "red").iterdir()).unlink()
    agents = [agent(folder, 2, 0, *MANY) for folder in machines]
    said = "".join(each.communicate(timeout=120)[0] for each in agents)
    assert [each.returncode for each in agents] == [1, 1]
    assert re.search(r"has other images than rank 0 on \S+: 1(19|20) images, names and labels \w+, not 1(19|20)", said)
    assert said.count("give every machine the same") == 1
    assert not list(Path("runs").rglob("version_*"))


@pytest.mark.full
def test_a_lost_machine_leaves_the_others_to_go_on_from_the_last_checkpoint_to_the_same_result(machines):
    words = [
        *MANY,
        "--trainer.max_epochs",
        "12",
        "--save_every",
        "0.001",
        "--config",
        str(ROOT / "configs/multinode.yaml"),
    ]
    agents = [agent(folder, "1:2", 2, *words) for folder in machines]
    deadline = time.monotonic() + 120
    while not (RUN / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lost = [agents[1], *agents[1].children(recursive=True)]
    for each in lost:
        each.send_signal(signal.SIGKILL)
    agents[1].communicate(timeout=30)
    out, _ = agents[0].communicate(timeout=240)
    assert agents[0].returncode == 0, out
    assert "have lost each other" in out
    assert [path.name for path in RUN.parent.iterdir()] == [RUN.name]
    assert not (Path("a") / "runs").exists()
    assert list(Path("a/data/cache").iterdir())
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "12", "--name", "other"]) == 0
    curves, others = logged(RUN)[1], logged(Path("runs/other/version_0"))[1]
    for tag in ("train/loss", "val/loss"):
        assert [step for step, _ in curves[tag]] == [step for step, _ in others[tag]]
        assert [value for _, value in curves[tag]] == pytest.approx([value for _, value in others[tag]], abs=5e-3)


@pytest.mark.slow
def test_the_slurm_script_runs_the_fit_on_each_machines_own_disk(photos, monkeypatch):
    disk = Path(tempfile.mkdtemp())  # a short name, as sockets need it
    script(Path("srun"), 'exec "$@"')
    for name in ("configs", "project"):
        Path(name).symlink_to(ROOT / name)
    Path(".venv/bin").mkdir(parents=True)
    script(Path(".venv/bin/python"), f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", f"{Path.cwd()}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setenv("USER", "someone")
    words = ["--data.root", str(photos.resolve()), *SMALL, "--trainer.max_epochs", "1"]
    done = subprocess.run(["bash", "configs/slurm/train.sh", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (RUN / "checkpoints" / "best.ckpt").exists()
    assert list((disk / "project-someone" / "data" / "cache").iterdir())
    assert not Path("data").exists()
    shutil.rmtree(disk)
