"""--devices: several processes give one process's file."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from project import cli
from tests.conftest import read_csv


@pytest.fixture(params=["run", "bundle"])
def model(at_trained, packed, tmp_path_factory, request):
    """What labels; of the bundle, only what computes without torch."""
    if request.param == "run":
        return at_trained
    kept = shutil.ignore_patterns("model.safetensors")
    return shutil.copytree(packed, tmp_path_factory.mktemp("kept") / "bundle", ignore=kept)


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(model, tmp_path, capfd):
    for number in range(3):
        (tmp_path / f"bad\n{number}.png").write_bytes(b"")
    # 121 images and 3 in the middle: the last batch is not whole, and one process has a batch more
    images = ["photos/blue", str(tmp_path), "photos/red", "photos/green", "photos/red/000.png"]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    predict = ["predict", str(model), *images, "--batch-size", "25", "--min-confidence", "0.5", "--tta", "--out"]
    assert cli.main([*predict, str(one)]) == 0
    capfd.readouterr()
    assert cli.main([*predict, str(two), "--devices", "2"]) == 0
    assert capfd.readouterr() == (f"121 images labelled, 3 unreadable: {two} (raw probabilities)\n", "")
    single, double = map(read_csv, (one, two))
    assert len(double) == 124
    for expected, row in zip(single, double, strict=True):
        for name, value in row.items():
            if name == "probability" or name.startswith("p:"):
                assert float(value or "nan") == pytest.approx(float(expected[name] or "nan"), abs=1e-6, nan_ok=True)
            else:
                assert value == expected[name]


def test_more_processes_than_batches(packed, at_trained, tmp_path, refused):
    words = ["predict", str(packed), "photos/red/000.png", "--devices", "2", "--out", str(tmp_path / "o.csv")]
    assert cli.main(words) == 0
    (row,) = (tmp_path / "o.csv").read_text().splitlines()[1:]
    assert row.startswith("photos/red/000.png,,red,")
    assert "no checkpoint none.ckpt" in refused("predict", "none.ckpt", "photos", "--devices", "2")


@pytest.fixture
def long_prediction(packed, at_trained, tmp_path):
    """A command with two processes, started and at work; its two processes."""
    words = ["predict", str(packed), *["photos"] * 500, "--devices", "2", "--out", str(tmp_path / "o.csv")]
    command = [sys.executable, "-m", "project.cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not any(file.stat().st_size for file in tmp_path.glob(".o.csv.*.tmp")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        yield process, [child for child in started if "spawn_main" in " ".join(child.cmdline())]
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert not list(tmp_path.iterdir())


ENDS = {
    "terminal": (lambda process, _: os.killpg(process.pid, signal.SIGINT), 130, "stopped"),
    "main process": (lambda process, _: process.send_signal(signal.SIGINT), 130, "stopped"),
    "kill": (lambda _, pair: pair[0].kill(), 1, "failed: One of the 2 processes has failed: it was killed"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "said"), ENDS.values(), ids=ENDS)
def test_ctrl_c_or_a_killed_process_ends_all_with_a_sentence_and_leaves_nothing(long_prediction, end, code, said):
    process, pair = long_prediction
    end(process, pair)
    message = process.stderr.read().strip()
    assert process.wait() == code, message
    assert message.startswith(said)
    assert len(message.splitlines()) == 1, message
