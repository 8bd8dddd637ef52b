"""Real processes: two ranks, Ctrl-C with workers, and the set-up script."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, "-m", "project.cli"]
FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "2"]
TWO_RANKS = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(run):
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        return json.loads((run / "test_metrics.json").read_text()), list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_ranks_make_one_run_and_test_like_one_process(photos, launcher):
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "project.cli"]
    else:
        start = CLI
    out = run(*start, *FIT, *TWO_RANKS)
    assert sorted(p.name for p in Path("runs/photos").iterdir()) == ["version_0"]
    assert out.count("best: epoch") == 1
    version = Path("runs/photos/version_0")
    # 24 test pictures; one is unreadable and 5 go into a batch, so that neither ranks nor batches come out even
    next(iter(Path("photos/red").glob("*.png"))).write_bytes(b"")
    figures = []
    for command in ([*CLI, "test"], [*start, "test", *TWO_RANKS]):
        run(*command, "--ckpt_path", str(version), "--data.batch_size", "5")
        figures.append(results(version))
    (one, one_rows), (two, two_rows) = figures
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key
    assert [row["path"] for row in one_rows] == [row["path"] for row in two_rows]
    for a, b in zip(one_rows, two_rows, strict=True):
        assert a["label"] == b["label"]
        assert a["error"] == b["error"]


@pytest.mark.slow
def test_ctrl_c_saves_exits_with_130_and_leaves_no_worker(photos):
    command = [*CLI, *FIT, "--data.workers", "2", "--trainer.max_epochs", "500"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    last = Path("runs/photos/version_0/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to every process of the group
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"--ckpt_path {last}" in out
    assert "Traceback" not in out
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.slow
def test_no_process_outlives_a_fit_that_is_killed(photos):
    process = psutil.Popen(
        [*CLI, *FIT, "--data.workers", "2", "--trainer.max_epochs", "500"], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not Path("runs/photos/version_0/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = process.children(recursive=True)
    assert len(children) >= 3
    process.kill()
    process.wait(20)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def set_up(tmp_path, python=None, **variables):
    """Runs the set-up script in an empty project with the given `python`."""
    place = tmp_path / "clone"
    (place / "scripts").mkdir(parents=True)
    for name in ("scripts/venv.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    environment = os.environ | {"PYTHON": str(python or sys.executable)} | variables
    command = ["sh", "scripts/venv.sh", "core"]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=120)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_set_up_says_what_is_missing(tmp_path):
    old = script(tmp_path / "old", 'case "$*" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    without_venv = script(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    for number, (python, variables, said) in enumerate(
        [
            (old, {}, "Python 3.11 or newer is needed; found Python 3.8.1"),
            (without_venv, {}, "has no venv module"),
            (None, {"SETUP_GIB": "999999"}, "GiB free here; torch and what it needs take about 6"),
        ]
    ):
        done = set_up(tmp_path / str(number), python, **variables)
        assert done.returncode == 1
        assert said in done.stderr


@pytest.mark.slow
def test_set_up_that_is_done_does_nothing():
    run("sh", "scripts/venv.sh", "dev", cwd=ROOT)
    assert run("sh", "scripts/venv.sh", "dev", cwd=ROOT) == ""  # it says whatever it does


def peak_memory(*command):
    """Highest Pss_Anon + Pss_Shmem in MB, summed over a command's process and its children while it runs."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    peak = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                rows = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            total += sum(int(row.split()[1]) for row in rows if row.startswith(("Pss_Anon", "Pss_Shmem")))
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_folder(photos):
    few = [*CLI, "fit", "--data.root", "photos", *SMALL, "--data.workers", "2", "--trainer.max_epochs", "2"]
    few += ["--data.batch_size", "32"]
    small = peak_memory(*few)
    for file in sorted(photos.rglob("*.png")):
        for copy in range(30):  # decoded, these are 130 MB
            os.link(file, file.with_name(f"{copy}-{file.name}"))
    assert peak_memory(*few) == pytest.approx(small, rel=0.05)
