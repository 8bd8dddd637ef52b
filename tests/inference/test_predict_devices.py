"""--devices: several processes give one process's file."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from project import cli

ROOT = Path(__file__).parents[2]


def rows_of(file):
    with Path(file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def command(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [sys.executable, "-m", "project.cli", "predict", *words], environment


@pytest.fixture(params=["run", "bundle"])
def model(at_trained, packed, tmp_path_factory, request):
    """What labels; of the bundle, only what computes without torch."""
    if request.param == "run":
        return at_trained
    kept = shutil.ignore_patterns("model.safetensors")
    return shutil.copytree(packed, tmp_path_factory.mktemp("kept") / "bundle", ignore=kept)


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(model, tmp_path):
    for number in range(3):
        (tmp_path / f"bad\n{number}.png").write_bytes(b"")
    # 121 images and 3 in the middle: the last batch is not whole, and one process has a batch more
    images = ["photos/blue", str(tmp_path), "photos/red", "photos/green", "photos/red/000.png"]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    options = ["--batch-size", "25", "--min-confidence", "0.5", "--tta"]
    assert cli.main(["predict", str(model), *images, *options, "--out", str(one)]) == 0
    words, environment = command(str(model), *images, *options, "--out", str(two), "--devices", "2")
    made = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout == f"121 images labelled, 3 unreadable: {two}\n"
    assert made.stderr == ""
    single, double = rows_of(one), rows_of(two)
    assert len(double) == 124
    for expected, row in zip(single, double, strict=True):
        for name in ("path", "true", "label", "error", "abstained"):
            assert row[name] == expected[name]
        for name in ("probability", "p:blue", "p:green", "p:red"):
            assert (row[name] == "") == (expected[name] == "")
            assert float(row[name] or 0) == pytest.approx(float(expected[name] or 0), abs=1e-6)


def test_more_processes_than_batches_in_this_very_process(at_trained, tmp_path, refused):
    words = ["predict", str(at_trained), "photos/red/000.png", "--devices", "2", "--out", str(tmp_path / "o.csv")]
    assert cli.main(words) == 0
    (row,) = rows_of(tmp_path / "o.csv")
    assert row["path"] == "photos/red/000.png"
    assert "no checkpoint none.ckpt" in refused("predict", "none.ckpt", "photos", "--devices", "2")


@pytest.fixture
def long_prediction(at_trained, tmp_path):
    """A command with two processes, started and at work; its two processes and the file that it writes."""
    words, environment = command(str(at_trained), *["photos"] * 500, "--devices", "2", "--out", str(tmp_path / "o.csv"))
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        for _ in range(1200):
            if any(file.stat().st_size for file in tmp_path.glob(".o.csv.*.tmp")):
                break
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        yield process, [child for child in started if "spawn_main" in " ".join(child.cmdline())]
        process.stderr.close()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "main process"])
def test_ctrl_c_ends_all_processes_and_leaves_nothing(long_prediction, to_all):
    process, _ = long_prediction
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    message = process.stderr.read().decode()
    assert process.wait() == 130, message
    assert "Traceback" not in message


@pytest.mark.slow
def test_killed_process_ends_the_others_with_a_sentence(long_prediction):
    process, (killed, _) = long_prediction
    killed.kill()
    message = process.stderr.read().decode()
    assert process.wait() == 1, message
    assert message.splitlines() == [message.strip()]
    assert message.startswith("failed: One of the 2 processes has failed: it was killed")
