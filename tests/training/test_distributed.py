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
from typing import NamedTuple

import psutil
import pytest

from project import cli
from project.training.distributed import launched
from tests.conftest import ALIVE, SMALL
from tests.same_run import logged
from tests.training.test_processes import CLI, FIT, TORCHRUN, on, script, started

ROOT = Path(__file__).parents[2]
RUN = Path("runs/photos/version_0")
TORCHELASTIC = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        (TORCHELASTIC, {"num_nodes": 2, "devices": 2}),
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
    for name, value in (TORCHELASTIC | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}).items():
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


@pytest.mark.full
def test_a_mistake_in_the_options_is_said_once(photos):
    two = [word.replace("--nproc_per_node=3", "--nproc_per_node=2") for word in TORCHRUN]
    done = subprocess.run([*two, *FIT, "--model.lr", "high"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("error: --model.lr") == 1


class Machine(NamedTuple):
    """A folder of its own, an address, and where permitted a network namespace, as `ip netns` calls it."""

    folder: Path
    address: str
    name: str | None = None

    def agent(self, nodes, restarts, *words):
        """Starts torchrun's agent; the first machine has the rendezvous."""
        first = self.address.replace(".2", ".1")
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29577", f"--local-addr={self.address}"]
        is_host = int(self.folder.name == "a")
        limits = f"--rdzv-conf=is_host={is_host},join_timeout=60,last_call_timeout=3,timeout=60"
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--rdzv-id=it", limits]
        command += [f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}", "-m", "project.cli"]
        inside = ["ip", "netns", "exec", self.name] if self.name else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environ = os.environ | {"PYTHONPATH": str(ROOT)} | ({"GLOO_SOCKET_IFNAME": self.name} if self.name else {})
        return psutil.Popen([*inside, *command, *words], cwd=self.folder, env=environ, **pipes)


def ip(command):
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture
def machines(photos):
    """Two folders, each with the photos and room for a cache; runs/ beside them is shared, all else is not."""
    names = [f"m{os.getpid()}{side}" for side in "ab"]
    for side in ("a", "b"):
        shutil.copytree("photos", Path(side, "photos"))
    try:
        ip(f"link add {names[0]} type veth peer name {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"netns add {name}")
            ip(f"link set {name} netns {name}")
            ip(f"-n {name} addr add 10.99.0.{number}/24 dev {name}")
            for device in ("lo", name):
                ip(f"-n {name} link set {device} up")
    except (OSError, subprocess.CalledProcessError):  # not permitted
        yield [Machine(Path(side), "127.0.0.1") for side in ("a", "b")]
    else:
        yield [Machine(Path(side), f"10.99.0.{number}", names[number - 1]) for number, side in ((1, "a"), (2, "b"))]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


MANY = [*FIT, *ALIVE, "--trainer.accelerator", "cpu", "--runs", "../runs", "--resume", "auto"]


@pytest.mark.full
def test_machines_with_other_images_are_told_so_on_the_first_rank_and_nothing_is_left(machines):
    next((machines[1].folder / "photos" / "red").iterdir()).unlink()
    agents = [machine.agent(2, 0, *MANY) for machine in machines]
    said = "".join(each.communicate(timeout=120)[0] for each in agents)
    assert [each.returncode for each in agents] == [1, 1]
    assert re.search(r"has other images than rank 0 on \S+: 1(19|20) images, names and labels \w+, not 1(19|20)", said)
    assert said.count("give every machine the same") == 1
    assert not list(Path("runs").rglob("version_*"))


@pytest.mark.full
def test_a_lost_machine_leaves_the_others_to_go_on_from_the_last_checkpoint_to_the_same_result(machines):
    words = [*MANY, "--trainer.max_epochs", "12", "--save_every", "0.001"]
    words += ["--config", str(ROOT / "configs/multinode.yaml")]
    agents = [machine.agent("1:2", 2, *words) for machine in machines]
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


@pytest.mark.full
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
