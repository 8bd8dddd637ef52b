"""fit --seeds and --folds: ordinary runs, each once, their mean and deviation, and the pooled report of the folds."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from project import cli, runs
from project.training import signals
from project.training.callbacks import StepSeed
from tests.conftest import SEED, SMALL, make_images, read_csv

FIT = ["fit", "photos", *SMALL, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
FIRST = int(SEED[-1]) if SEED else 0
SHARED = ("accuracy", "precision", "recall", "f1", "auroc")  # names of test_metrics.json and of the report
RUNS = Path("runs/photos")


@pytest.fixture
def started(monkeypatch):
    """The commands that are started, here in this process."""
    commands = []

    def run(words):
        commands.append(words)
        return cli.main(words)

    monkeypatch.setattr(signals, "run_child", run)
    return commands


def verbs(commands):
    """The verbs of the commands since the last call."""
    found = [words[0] for words in commands]
    commands.clear()
    return found


def weights(run):
    return torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_seeds_are_ordinary_runs_with_one_split_made_once_and_summarised(photos, started, monkeypatch, capsys):
    by_hand = ["--seed_everything", str(FIRST + 1), "--trainer.log_every_n_steps", "3"]  # which changes no result
    assert cli.main([*FIT, *by_hand]) == 0
    assert cli.main([*FIT, "--seeds", "2"]) == 0
    assert verbs(started) == ["fit", "test", "test"]
    said = capsys.readouterr().out
    assert f"\nseed {FIRST + 1}: {RUNS}/version_0 is finished\n" in said
    assert f"seed {FIRST} to seed {FIRST + 1}, all with the same split (--data.split_seed 0)\n" in said
    first, second = RUNS / "version_1", RUNS / "version_0"
    assert (first / "split.csv").read_bytes() == (second / "split.csv").read_bytes()
    key = next(iter(weights(first)))
    assert not torch.equal(weights(first)[key], weights(second)[key])
    folder = Path("runs/photos-2-seeds/version_1")
    content, table = json.loads((folder / "figures.json").read_text()), read_csv(folder / "figures.csv")
    assert content["runs"] == {f"seed {FIRST}": str(first), f"seed {FIRST + 1}": str(second)}
    measured = [json.loads((run / "test_metrics.json").read_text()) for run in (first, second)]
    for row in table:
        name, each = row["figure"], [float(row[seed]) for seed in content["runs"]]
        assert {key: float(value) for key, value in row.items() if key != "figure"} == content["figures"][name]
        if name in SHARED:
            assert each == pytest.approx([test[f"test/{name}"] for test in measured], abs=1e-6)
        assert float(row["mean"]) == pytest.approx(np.mean(each))
        assert float(row["sd"]) == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    mean, deviation = (100 * content["figures"]["accuracy"][kind] for kind in ("mean", "sd"))
    assert f"  accuracy      {mean:.1f} % ± {deviation:.1f} %\n" in said
    assert {"cross-entropy", "brier", "ece", *SHARED} <= {row["figure"] for row in table}
    before = {file: file.read_bytes() for file in RUNS.rglob("*") if file.is_file()}
    assert cli.main([*FIT, "--seeds", "2"]) == 0
    assert not verbs(started)
    assert before == {file: file.read_bytes() for file in RUNS.rglob("*") if file.is_file()}
    make_images(Path("others"), {path.name: 4 for path in photos.iterdir()})
    assert cli.main(["test", str(first), "--data.root", "others"]) == 0  # by hand
    assert cli.main([*FIT, "--seeds", "2"]) == 0
    assert verbs(started) == ["test"]
    assert content["figures"] == json.loads((folder / "figures.json").read_text())["figures"]
    monkeypatch.setattr(signals, "run_child", lambda words: started.append(words) or 1)
    assert cli.main([*FIT, "--seeds", "2", "--trainer.max_epochs", "2"]) == 1  # changes the result
    make_images(photos, {"red": 41})  # as one more image does
    assert cli.main([*FIT, "--seeds", "2"]) == 1
    assert verbs(started) == ["fit", "fit"]


@pytest.mark.full
def test_folds_stopped_in_between_go_on_and_their_pooled_predictions_make_one_report(
    photos, started, monkeypatch, capsys
):
    begin = StepSeed.on_train_batch_start

    def press(self, trainer, *rest):
        if trainer.datamodule.run_name.endswith("fold1") and trainer.fit_loop.total_batch_idx == 3:
            signal.raise_signal(signal.SIGINT)
        begin(self, trainer, *rest)

    fit = [*FIT, "--folds", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(StepSeed, "on_train_batch_start", press)
        assert cli.main(fit) == 130
    assert verbs(started) == ["fit", "test", "fit"]
    assert "ended at fold 1; the same command continues there" in capsys.readouterr().out
    runs.write_status(Path("runs/photos-fold1/version_0"), state="running")  # as after SIGKILL
    assert cli.main(fit) == 0
    assert [words[:3] for words in started] == [
        ["fit", "--resume", "runs/photos-fold1/version_0"],
        ["test", "--ckpt_path", "runs/photos-fold1/version_0"],
    ]
    assert "--trainer.accelerator" in started[0]  # the options that may change
    assert runs.read_status(Path("runs/photos-fold1/version_0"))["state"] == "finished"
    folder = Path("runs/photos-2-folds/version_0")
    rows = read_csv(folder / "predictions.csv")
    assert sorted(row["path"] for row in rows) == sorted(str(file) for file in photos.rglob("*.png"))
    single = [row for fold in (0, 1) for row in read_csv(f"runs/photos-fold{fold}/version_0/predictions.csv")]
    assert sorted(map(str, rows)) == sorted(map(str, single))
    right = sum(row["true"] == row["label"] for row in rows) / len(rows)
    content = json.loads((folder / "figures.json").read_text())
    assert content["pooled"]["accuracy"] == pytest.approx(right)
    page = " ".join(
        re.sub(r"<style>.*?</style>|<[^>]*>", " ", (folder / "report.html").read_text(), flags=re.S).split()
    )
    assert "photos-2-folds: squeezenet1_1, 3 classes" in page
    assert f"accuracy {100 * right:.1f} %" in page
    assert "Measured on 120 test images. Each was predicted once, by the one of 2 networks" in page
    each = [content["figures"]["accuracy"][f"fold {fold}"] for fold in (0, 1)]
    assert f"± {100 * content['figures']['accuracy']['sd']:.1f} % {100 * each[0]:.1f} % {100 * each[1]:.1f} %" in page
    assert "folds: 2" in page
    assert "fold: null" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "1"], "--seeds 1 is one run, which has no deviation; give at least 2"),
        (["--seeds", "2", "--folds", "2"], "leave --seeds out"),
        (["--folds", "2", "--data.folds", "2", "--data.fold", "0"], "leave --data.folds, --data.fold out"),
        (["--seeds", "2", "--resume", "auto", "--trainer.fast_dev_run", "1"], "--resume, --trainer.fast_dev_run out"),
        (["--folds", "2", "--ckpt_path", "runs/latest"], "leave --ckpt_path out"),
        (["--folds", "2", "--trainer.enable_checkpointing", "false"], "leave --trainer.enable_checkpointing out"),
        (
            ["--folds", "2", "--data.split", "split.csv"],
            "split.csv is split already; folds need images without a split",
        ),
        (["--seeds", "2", "--data.split", "no-test.csv"], "has no test images"),
        (["--folds", "50"], "each class needs at least 50"),
    ],
)
def test_what_repeats_cannot_go_with_is_said_before_anything_is_trained(photos, started, refused, options, said):
    rows = [f"{name}/{n:03}.png,{name},{'val' if n % 4 else 'train'}" for name in ("blue", "red") for n in range(40)]
    Path("no-test.csv").write_text("\n".join(["path,label,split", *rows]))
    Path("split.csv").write_text("\n".join(["path,label,split", *rows]).replace("val", "test"))
    assert said in refused(*FIT, *options)
    assert not started
    assert not Path("runs").exists()


def test_repeats_are_refused_below_a_launcher(photos, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave torchrun out" in refused(*FIT, "--seeds", "2")


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_command_alone_and_ctrl_c_to_both_processes_stop_and_save_the_fit(photos, number, code):
    command = [sys.executable, "-m", "project.cli", *FIT, "--trainer.max_epochs", "500", "--folds", "2"]
    metrics = Path("runs/photos-fold0/version_0/metrics.csv")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        (os.kill if number == signal.SIGTERM else os.killpg)(run.pid, number)
        said = run.communicate(timeout=120)[0]
    assert run.returncode == code
    assert "ended at fold 0; the same command continues there" in said
    assert runs.read_status(metrics.parent)["state"] == "stopped"
    assert (metrics.parent / "checkpoints" / "last.ckpt").exists()
