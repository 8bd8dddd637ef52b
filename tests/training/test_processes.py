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

from project import runs
from tests.conftest import ALIVE, SMALL, make_images
from tests.same_run import assert_the_same, checkpoint, logged

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "project.cli"]
FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "2"]
FIGURES = ("accuracy", "precision", "recall", "f1", "auroc", "loss")


def on(ranks):
    return ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(launcher, ranks):
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--log-dir=torchrun", f"--nproc_per_node={ranks}"]
        return [*torchrun, "-m", "project.cli"]
    return CLI


def measured(version, command):
    """The figures of `test` and its rows; 5 images go into a batch, so that nothing comes out even."""
    run(*command, "--ckpt_path", str(version), "--data.batch_size", "5")
    with (version / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:  # compared by six digits
        row |= {key: round(float(value), 6) for key, value in row.items() if value and key.startswith(("p:", "prob"))}
    return json.loads((version / "test_metrics.json").read_text()), rows


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ranks"), [("lightning", 2), pytest.param("torchrun", 3, marks=pytest.mark.full)])
def test_ranks_learn_and_measure_like_one_process(photos, launcher, ranks):
    """84 training images in batches of 8 are shared out unequally by 3; so are the 12 of validation by 5."""
    options = [*FIT, *ALIVE, "--trainer.log_every_n_steps", "1", "--model.lr", "0.001"]
    run(*CLI, *options)
    out = run(*start(launcher, ranks), *options, *on(ranks))
    assert sorted(p.name for p in Path("runs/photos").iterdir()) == ["version_0", "version_1"]
    assert out.count("best: epoch") == 1
    (_, curves, _), (_, others, _) = (logged(Path(f"runs/photos/version_{number}")) for number in (0, 1))
    assert len(curves["train/loss_step"]) == 20
    classes = [tag for tag in curves if tag.startswith("val_class/")]
    assert len(classes) == 9
    for tag in ("train/loss_step", "train/loss", "train/accuracy", *(f"val/{name}" for name in FIGURES), *classes):
        assert [step for step, _ in curves[tag]] == [step for step, _ in others[tag]]
        assert [v for _, v in curves[tag]] == pytest.approx([v for _, v in others[tag]], abs=1e-4), tag
    version = Path("runs/photos/version_1")
    metadata = Path("projector", "validation", "metadata.tsv")
    points = [(run / metadata).read_text() for run in (version.with_name("version_0"), version)]
    assert points[0] == points[1]
    with (version / "split.csv").open() as stream:
        test = [row["path"] for row in csv.DictReader(stream) if row["split"] == "test"]
    Path("photos", test[3]).write_bytes(b"")
    figures, rows = measured(version, [*CLI, "test"])
    others, other_rows = measured(version, [*start(launcher, ranks), "test", *on(ranks)])
    assert len(rows) == len(other_rows) == len(test) == figures["n"]
    assert figures == {k: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for k, v in others.items()}
    for row, other in zip(rows, other_rows, strict=True):
        assert row == {k: pytest.approx(v, abs=2e-6) if isinstance(v, float) else v for k, v in other.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("val", "options", "said"), [(2, ["--data.batch_size", "2"], "in a batch"), (1, [], "val images")]
)
def test_more_ranks_than_images_are_refused_in_a_sentence(workplace, val, options, said):
    for split, count in (("train", 9), ("val", val)):
        make_images(Path("photos", split), dict.fromkeys(("blue", "red"), count))
    done = subprocess.run([*CLI, *FIT, *on(3), *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert said in lines[0]
    assert "give --trainer.devices 2" in lines[0]


def started(*command, until, **options):
    """A fit in a process group of its own, as soon as a condition holds."""
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


LONG = ["--trainer.max_epochs", "500"]
VERSION = Path("runs/photos/version_0")
LAST, METRICS = VERSION / "checkpoints" / "last.ckpt", VERSION / "metrics.csv"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_the_step_in_progress_exits_and_leaves_no_worker(photos, number, code):
    process = started(
        *CLI, *FIT, *LONG, "--data.workers", "2", "--save_every", "1000", until=METRICS.exists, start_new_session=True
    )
    children = process.children(recursive=True)
    assert len(children) >= 2
    assert not LAST.exists()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does: to every process of the group
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert f"fit --resume {VERSION}" in out
    assert "Traceback" not in out
    assert LAST.exists()
    assert runs.read_status(VERSION)["state"] == "stopped"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.slow
def test_second_ctrl_c_ends_a_step_that_hangs(photos):
    Path("hanging.py").write_text(
        "import sys, time\n"
        "from project import cli\n"
        "from project.classifier import Classifier\n"
        "def hang(*_):\n"
        "    open('hangs', 'w')\n"
        "    while True: time.sleep(0.01)\n"
        "Classifier.training_step = hang\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    process = started(sys.executable, "hanging.py", *FIT, until=Path("hangs").exists)
    process.send_signal(signal.SIGINT)
    with pytest.raises(psutil.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdout.close()


@pytest.mark.slow
def test_ranks_stop_together_and_one_process_goes_on_where_they_were(photos):
    options = [*FIT, *ALIVE, "--save_every", "1000", "--trainer.max_epochs", "12"]
    process = started(*CLI, *options, *on(2), until=METRICS.exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 143, out
    assert "Traceback" not in out
    begun = checkpoint(VERSION)["loop_state"]["at"]["epoch"]
    assert begun < 12
    out = run(*CLI, "fit", "--resume", "--trainer.devices", "1", "--trainer.strategy", "auto")
    assert "resume: --trainer.devices 2 -> 1" in out
    run(*CLI, *options, *on(2))
    one, other = (logged(Path(f"runs/photos/version_{number}"))[1] for number in (0, 1))
    for tag in ("train/loss", "train/accuracy", "val/loss"):
        assert [step for step, _ in one[tag]] == [step for step, _ in other[tag]]
        near = slice(0, begun + 2)  # later the rounding of two ranks and of one has grown
        assert [v for _, v in one[tag][near]] == pytest.approx([v for _, v in other[tag][near]], abs=1e-3), tag


@pytest.mark.slow
def test_two_fits_that_start_together_do_not_disturb_each_other(photos):
    processes = [subprocess.Popen([*CLI, *FIT], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    versions = sorted(Path("runs/photos").iterdir())
    assert [version.name for version in versions] == ["version_0", "version_1"]
    assert_the_same(*versions)
    assert Path("runs/latest").resolve() in [version.resolve() for version in versions]
    assert not [file for folder in ("runs", "data/cache") for file in Path(folder).rglob("*.tmp")]


@pytest.mark.slow
def test_slurm_puts_the_job_back_and_it_goes_on_in_its_run(photos):
    Path("bin").mkdir()
    script(Path("bin/scontrol"), 'echo "$@" >> requeued')
    job = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}"}
    job |= {"SLURM_JOB_ID": "4321", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NUM_NODES": "1"}
    command = [*CLI, *FIT, "--trainer.max_epochs", "40"]
    process = started(*command, until=METRICS.exists, env=job)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert Path("requeued").read_text() == "requeue 4321\n"
    assert not list(Path().rglob("hpc_ckpt*"))
    step = checkpoint(VERSION)["global_step"]
    assert 0 < step < 400
    out = run(*command, env=job | {"SLURM_RESTART_COUNT": "1"})
    assert [p.name for p in VERSION.parent.iterdir()] == ["version_0"]
    assert checkpoint(VERSION)["global_step"] == 400
    assert len(logged(VERSION)[1]["val/loss"]) == 40


@pytest.mark.slow
def test_no_process_outlives_a_fit_that_is_killed(photos):
    before = set(os.listdir("/dev/shm"))
    process = started(*CLI, *FIT, *LONG, "--data.workers", "2", until=METRICS.exists)
    children = process.children(recursive=True)
    assert len(children) >= 3
    process.kill()
    process.wait(20)
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert set(os.listdir("/dev/shm")) <= before


PAGE_FAULTS = """
import resource
import numpy as np
from project.training.trainer import keep_freed_memory

{call}
np.ones(60_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(60_000_000)  # 480 MB, taken and freed
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_that_is_taken_again_is_not_fetched_from_the_system_again():
    kept, usual = (int(run(sys.executable, "-c", PAGE_FAULTS.format(call=c))) for c in ("keep_freed_memory()", ""))
    assert kept < 0.1 * usual


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_set_up_says_what_is_missing_and_does_nothing_when_it_is_done(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/venv.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = script(tmp_path / "old", 'case "$*" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    without_venv = script(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    for variables, said in (
        ({"PYTHON": str(old)}, "Python 3.11 or newer is needed; found Python 3.8.1"),
        ({"PYTHON": str(without_venv)}, "has no venv module"),
        ({"PYTHON": sys.executable, "SETUP_GIB": "999999"}, "GiB free here; torch and what it needs take about 6"),
    ):
        command = ["sh", "scripts/venv.sh", "core"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 1
        assert said in done.stderr
    run("sh", "scripts/venv.sh", "dev", cwd=ROOT)
    assert run("sh", "scripts/venv.sh", "dev", cwd=ROOT) == ""  # it says whatever it does


def peak_memory(*command):
    """Highest Pss_Anon + Pss_Shmem in MB, summed over a command's process and its children while it runs.

    A process that forks while the sum is taken counts more than once: what one sample alone shows is left out.
    """
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    peak = before = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                rows = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            total += sum(int(row.split()[1]) for row in rows if row.startswith(("Pss_Anon", "Pss_Shmem")))
        peak, before = max(peak, min(before, total)), total
        time.sleep(0.05)
    assert process.returncode == 0
    return peak / 1024


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_folder(photos):
    few = [*CLI, "fit", "--data.root", "photos", *SMALL, "--data.workers", "2", "--trainer.max_epochs", "2"]
    few += ["--data.batch_size", "32"]
    small = peak_memory(*few)
    for file in sorted(photos.rglob("*.png")):
        for copy in range(30):  # decoded, these are 130 MB
            os.link(file, file.with_name(f"{copy}-{file.name}"))
    assert peak_memory(*few) == pytest.approx(small, rel=0.05)
