"""Real processes: two ranks, signals with workers, two fits at once, and the set-up script."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from project import cli, runs
from project.classifier import Classifier
from project.data import manifest
from tests.conftest import ALIVE, SMALL, read_csv
from tests.same_run import assert_the_same, checkpoint, logged

CLI = [sys.executable, "-m", "project.cli"]
FULL = partial(pytest.param, marks=pytest.mark.full)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--log-dir=torchrun", "--nproc_per_node=3", *CLI[1:]]
FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "2"]
RUN, OTHER = Path("runs/photos/version_0"), Path("runs/photos/version_1")
LAST, METRICS = RUN / "checkpoints" / "last.ckpt", RUN / "metrics.csv"


def on(ranks):
    return ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def measured():
    """The figures of the newest test of RUN, and its rows with numbers in them."""
    rows = read_csv(RUN / "predictions.csv")
    for row in rows:
        row |= {key: float(value) for key, value in row.items() if value and key.startswith(("p:", "prob"))}
    return json.loads((RUN / "test_metrics.json").read_text()), rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks", "batch"),
    [(CLI, 2, "1"), pytest.param(TORCHRUN, 3, "5", marks=pytest.mark.full)],
    ids=["lightning", "torchrun"],
)
def test_ranks_learn_and_measure_like_one_process(photos, launcher, ranks, batch):
    """84 training images in batches of 8 are shared out unequally by 3; of the test a rank may have no image at all."""
    rows = manifest.load(photos)
    (photos / rows.paths[rows.rows("test")[3]]).write_bytes(b"")
    fit = [*FIT, *ALIVE, "--trainer.log_every_n_steps", "1", "--model.lr", "0.001"]
    test = ["test", "--ckpt_path", str(RUN), "--data.batch_size", batch]
    assert run(*launcher, *fit, *on(ranks)).count("best: epoch") == 1
    assert [p.name for p in RUN.parent.iterdir()] == [RUN.name]
    run(*launcher, *test, *on(ranks))
    figures, predicted = measured()
    assert cli.main(fit) == cli.main(test) == 0
    (_, curves, _), (_, others, _) = logged(RUN), logged(OTHER)
    assert len(curves["train/loss_step"]) == 20
    tags = [tag for tag in curves if tag.startswith(("train/loss", "train/accuracy", "val/", "val_class/"))]
    assert len(tags) == 3 + 6 + 9
    for tag in tags:
        assert [step for step, _ in curves[tag]] == [step for step, _ in others[tag]]
        assert [v for _, v in curves[tag]] == pytest.approx([v for _, v in others[tag]], abs=1e-4), tag
    points = Path("projector", "validation", "metadata.tsv")
    assert (RUN / points).read_text() == (OTHER / points).read_text()
    expected, other_rows = measured()
    assert figures == {k: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for k, v in expected.items()}
    assert len(predicted) == len(other_rows) == figures["n"] == 24
    for row, other in zip(predicted, other_rows, strict=True):
        assert row == pytest.approx(other, abs=2e-6)


def started(*command, until):
    """A fit in a process group of its own, as soon as a condition holds."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = psutil.Popen(command, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [FULL(signal.SIGINT, 130), FULL(signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signal_leaves_no_worker_and_what_can_be_caught_saves_the_step_in_progress(photos, number, code):
    fit = [*FIT, "--trainer.max_epochs", "500", "--data.workers", "2", "--save_every", "1000"]
    process = started(*CLI, *fit, until=METRICS.exists)
    children = process.children(recursive=True)
    assert len(children) >= 3
    assert not LAST.exists()
    if number == signal.SIGKILL:
        process.send_signal(number)
    else:  # what a terminal, timeout, systemd and SLURM do: to every process, the workers first
        for child in children:
            child.send_signal(number)
        time.sleep(1)
        os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    if number != signal.SIGKILL:  # after it, Python's fork server reports a worker whose start was cut off
        assert "Traceback" not in out
        assert f"fit --resume {RUN}" in out
        assert LAST.exists()
        assert runs.read_status(RUN)["state"] == "stopped"
    assert not psutil.wait_procs(children, timeout=20)[1]
    batches = tuple(f"torch_{child.pid}_" for child in children)  # other processes of this machine have theirs
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(batches)]


@pytest.mark.full
@pytest.mark.parametrize(("number", "cause"), [FULL(signal.SIGKILL, "memory ran out"), (signal.SIGBUS, "/dev/shm")])
def test_a_killed_worker_ends_the_fit_in_a_sentence_and_the_fit_can_be_resumed(photos, number, cause):
    fit = [*FIT, "--trainer.max_epochs", "500", "--data.workers", "2", "--save_every", "0.001"]
    process = started(*CLI, *fit, until=LAST.exists)
    children = process.children(recursive=True)
    next(child for child in children if child.ppid() != process.pid).send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    last = out.splitlines()[-1]
    assert "failed: " in last  # after the zero byte of PyTorch's own message about SIGBUS
    assert cause in last
    assert last.endswith(f"fit --resume {RUN}")
    assert "Traceback" not in out
    assert runs.read_status(RUN)["state"] == "failed"
    assert not psutil.wait_procs(children, timeout=20)[1]
    run(*CLI, *FIT, "--resume", str(RUN), "--trainer.max_epochs", "1000", "--trainer.max_time", "00:00:00:01")


FULL_LATER = "import sys; from project import cli; from project.data import workers; workers.HELD = -99; "
FULL_LATER += "sys.exit(cli.main(sys.argv[1:]))"  # as if another program had filled it in the meantime


@pytest.mark.full
@pytest.mark.parametrize(
    ("limit", "command", "code", "sentence"),
    [
        ("mount -t tmpfs -o size=1264k tmpfs /dev/shm", CLI, 0, "1 are used, each 1 batches ahead"),
        ("mount -t tmpfs -o size=1100k tmpfs /dev/shm", CLI, 0, "the main process reads the images"),
        (
            "mount -t tmpfs -o size=100k tmpfs /dev/shm",
            [sys.executable, "-c", FULL_LATER],
            1,
            "/dev/shm is probably full",
        ),
        *((f"ulimit -n {n}", CLI, 0, f"the limit is {n} (see ulimit -n): 0 are used") for n in (12, 20)),
        ("ulimit -n 40", CLI, 0, "the limit is 40 (see ulimit -n): 1 are used"),
    ],
)
def test_small_shared_memory_takes_fewer_workers_and_a_limit_is_named(photos, limit, command, code, sentence):
    inside = [] if limit.startswith("ulimit") else ["unshare", "-rm"]
    if inside and subprocess.run([*inside, "sh", "-c", limit], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no process mount a file system of its own")
    fit = [*FIT, "--data.workers", "2"]
    shell = [*inside, "sh", "-c", f'{limit} && exec "$@"', "sh"]
    done = subprocess.run([*shell, *command, *fit], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


LEFT = """
from project.data.datamodule import ImageData
if __name__ == "__main__":
    batches = iter(ImageData("photos", image_size=32, workers=2).val_dataloader())
    next(batches)
"""


@pytest.mark.full
def test_workers_that_are_still_there_when_python_exits_end_with_it(photos):
    Path("left.py").write_text(LEFT)
    run(sys.executable, "left.py")


HANGING = """
import sys, time
from pathlib import Path
from project import cli
from project.classifier import Classifier
Classifier.training_step = lambda *_: Path("hangs").touch() or time.sleep(60)  # a caught signal does not shorten it
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.full
def test_second_ctrl_c_ends_a_step_that_hangs(photos):
    process = started(sys.executable, "-c", HANGING, *FIT, until=Path("hangs").exists)
    process.send_signal(signal.SIGINT)
    with pytest.raises(psutil.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdout.close()


@pytest.mark.full
def test_ranks_stop_together_and_one_process_goes_on_where_they_were(photos, capsys):
    fit = [*FIT, *ALIVE, "--save_every", "1000", "--trainer.max_epochs", "12"]
    process = started(*CLI, *fit, *on(2), until=METRICS.exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 143, out
    assert "Traceback" not in out
    begun = checkpoint(RUN)["loop_state"]["at"]["epoch"]
    assert cli.main(["fit", "--resume", "--trainer.devices", "1", "--trainer.strategy", "auto"]) == 0
    assert "resume: --trainer.devices 2 -> 1" in capsys.readouterr().out
    assert cli.main(fit) == 0
    curves, others = logged(RUN)[1], logged(OTHER)[1]
    for tag in ("train/loss", "train/accuracy", "val/loss"):
        assert [step for step, _ in curves[tag]] == [step for step, _ in others[tag]]
        near = slice(0, begun + 2)  # later the rounding of two ranks and of one has grown
        assert [v for _, v in curves[tag][near]] == pytest.approx([v for _, v in others[tag][near]], abs=1e-3), tag


@pytest.mark.full
def test_two_fits_that_start_together_do_not_disturb_each_other(photos):
    processes = [subprocess.Popen([*CLI, *FIT], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    versions = sorted(Path("runs/photos").iterdir())
    assert [version.name for version in versions] == ["version_0", "version_1"]
    assert_the_same(*versions)
    assert Path("runs/latest").resolve() in [version.resolve() for version in versions]
    assert not [file for folder in ("runs", "data/cache") for file in Path(folder).rglob("*.tmp")]


def test_slurm_puts_the_job_back_and_it_goes_on_in_its_run(photos, monkeypatch):
    scontrol = script(Path("scontrol"), 'echo "$@" >> requeued')
    monkeypatch.setenv("PATH", f"{scontrol.resolve().parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "4321", "NTASKS": "1", "JOB_NAME": "train", "JOB_NUM_NODES": "1"}
    for name, value in (job | dict.fromkeys(("NODEID", "PROCID", "LOCALID"), "0")).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    step = Classifier.training_step

    def timed_out(self, batch, batch_idx):
        if self.global_step == 5:
            signal.raise_signal(signal.SIGUSR1)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "training_step", timed_out)
        assert cli.main(FIT) == 143
    assert Path("requeued").read_text() == "requeue 4321\n"
    assert not list(Path().rglob("hpc_ckpt*"))
    assert checkpoint(RUN)["global_step"] == 6
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cli.main(FIT) == 0
    assert [p.name for p in RUN.parent.iterdir()] == [RUN.name]
    assert checkpoint(RUN)["global_step"] == 20
    assert len(logged(RUN)[1]["val/loss"]) == 2


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


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
