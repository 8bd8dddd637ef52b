"""fit --resume: the same run goes on, at the step where it was stopped, to the same bits."""

import contextlib
import csv
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from project import cli, runs
from project.models.weights import is_whole
from project.training import callbacks
from project.training.callbacks import StepSeed, Unreadable
from project.training.resume import Run
from tests.conftest import SEED, SMALL
from tests.same_run import assert_the_same, checkpoint, differences, logged

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2"]
RUN = Path("runs/photos/version_0")
STEPS = 10  # an epoch has: 84 training images in batches of 8


@pytest.fixture
def interrupt(monkeypatch):
    """Presses Ctrl-C at these places, once each and once a fit: a step, from 0, or epoch and batch of a validation."""
    waiting, pressed = set(), []
    train, validate = StepSeed.on_train_batch_start, Unreadable.on_validation_batch_start

    def press(place, trainer):
        if place in waiting and trainer not in pressed:  # a second time would end the process at once
            waiting.remove(place)
            pressed.append(trainer)
            signal.raise_signal(signal.SIGINT)

    def in_step(self, trainer, pl_module, batch, batch_idx):
        press(trainer.fit_loop.total_batch_idx, trainer)
        train(self, trainer, pl_module, batch, batch_idx)

    def in_validation(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        press((trainer.current_epoch, batch_idx), trainer)
        validate(self, trainer, pl_module, batch, batch_idx)

    monkeypatch.setattr(StepSeed, "on_train_batch_start", in_step)
    monkeypatch.setattr(Unreadable, "on_validation_batch_start", in_validation)

    return lambda *places: waiting.update(places)


def fit_in_parts(options, interrupt, *places):
    """A fit that is stopped at places and goes on each time; its run."""
    interrupt(*places)
    assert cli.main([*FIT, *options]) == 130
    while (code := cli.main(["fit", "--resume"])) == 130:
        pass
    assert code == 0
    return max(Path("runs/photos").iterdir())


KINDS = [
    [],
    ["--trainer.accumulate_grad_batches", "3"],
    ["--trainer.val_check_interval", "5"],
    ["--model.mix", "mixup", "--data.balance", "sample"],
    ["--model.name", "resnet18", "--average", "0.9"],
    ["--trainer.max_steps", "25"],
    ["--trainer.check_val_every_n_epoch", "2", "--patience", "3"],
    ["--model.freeze", "backbone", "--data.augment", "none"],
    ["--trainer.limit_train_batches", "7", "--model.optimizer", "sgd", "--model.weight_decay", "0.1"],
]


def every_kind(count, mark):
    """Parametrises by KINDS, of which all but the first `count` are marked."""
    cases = [
        pytest.param(options, id=" ".join(options) or "defaults", marks=[mark] * (index >= count))
        for index, options in enumerate(KINDS)
    ]
    return pytest.mark.parametrize("options", cases)


@every_kind(4, pytest.mark.slow)
def test_fit_that_was_stopped_in_a_step_and_in_a_validation_goes_on_to_the_same_bits(photos, interrupt, options):
    assert cli.main([*FIT, *options]) == 0
    assert_the_same(RUN, fit_in_parts(options, interrupt, 4, (1, 1)))


@pytest.mark.slow
@every_kind(1, pytest.mark.full)
def test_fit_that_was_stopped_anywhere_goes_on_to_the_same_bits(photos, interrupt, options):
    """At the first and the last step of an epoch, in successive steps, and often."""
    assert cli.main([*FIT, *options]) == 0
    last = (6 if "7" in options else STEPS - 1) + STEPS
    for places in ([0], [STEPS], [last], [last - 1, last, last + 1], [1, 5, (1, 0), 13, 22]):
        if "2" in options:  # the first epoch has no validation
            places = [place for place in places if place != (1, 0)]
        run = fit_in_parts(options, interrupt, *places)
        assert_the_same(RUN, run)
        shutil.rmtree(run)


@pytest.mark.slow
def test_stopped_fit_with_workers_goes_on_to_the_same_bits(photos, interrupt):
    options = ["--data.workers", "2", "--data.augment", "trivial"]
    assert cli.main([*FIT, *options]) == 0
    assert_the_same(RUN, fit_in_parts(options, interrupt, 4, STEPS, (1, 1)))
    assert cli.main([*FIT, "--data.augment", "trivial"]) == 0  # and without workers the batches are the same
    assert not differences(checkpoint(RUN)["state_dict"], checkpoint(Path("runs/photos/version_2"))["state_dict"])


def test_more_epochs_after_the_end_go_on_with_the_schedule_of_so_many(photos, capsys):
    assert cli.main(FIT) == 0
    options = ["--trainer.max_epochs", "5", "--data.cache", "off", "--save_every", "1"]
    assert cli.main(["fit", "--resume", str(RUN), *options]) == 0
    said = capsys.readouterr().out
    for change in ("--trainer.max_epochs 3 -> 5", "--data.cache auto -> off", "--save_every 5.0 -> 1.0"):
        assert f"resume: {change}" in said
    rates = [float(row["lr-Adam"]) for row in logged(RUN)[0] if row["lr-Adam"]]
    assert rates[-1] < rates[len(rates) * 3 // 5]  # it was at its lowest after three
    assert len(rates) == 5 * STEPS // 2
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_epochs"] == 5
    assert len(logged(RUN)[1]["val/loss"]) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.lr", "0.1"], "--model.lr null -> 0.1"),
        (
            ["--data.batch_size", "4", "--model.name", "resnet18"],
            "--data.batch_size 8 -> 4, --model.name squeezenet1_1",
        ),
        (["--data.root", "other"], "--data.root photos -> other"),
        (["--seed_everything", "3"], f"--seed_everything {SEED[-1] if SEED else 0} -> 3"),
        (["--name", "other"], "--name null -> other"),
        (["--trainer.precision", "bf16-mixed"], "--trainer.precision"),
    ],
)
def test_what_changes_the_result_is_refused(photos, interrupt, refused, options, said):
    interrupt(4)
    assert cli.main(FIT) == 130
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    sentence = refused("fit", "--resume", *options)
    assert said in sentence
    assert f"--model.weights {RUN}/checkpoints/last.ckpt" in sentence
    assert before == {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}


def test_fit_that_failed_before_its_first_checkpoint_starts_again_in_its_folder(photos, monkeypatch):
    assert cli.main(FIT) == 0
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressLines, "on_train_start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(FIT)
    run = Path("runs/photos/version_1")
    assert not list(run.rglob("*.ckpt"))
    assert runs.read_status(run) | {"step": 0} == runs.read_status(run)
    assert runs.read_status(run)["reason"] == "ZeroDivisionError: division by zero"
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(RUN, run)


def test_newest_unfinished_run_is_meant_and_one_that_another_process_trains_left_alone(
    photos, interrupt, refused, capsys
):
    interrupt(4)
    run = Path("runs/one/version_0")
    assert cli.main([*FIT, "--name", "one"]) == 130
    assert cli.main([*FIT, "--name", "two"]) == 0
    lock = runs.RunLock(run)
    for words in ([], [str(run)]):
        assert f"{run} is being trained by another process" in refused("fit", "--resume", *words)
    lock.release()
    assert cli.main(["fit", "--resume"]) == 0
    assert str(run) in capsys.readouterr().out
    assert Path("runs/latest").resolve() == run.resolve()


def test_nothing_to_resume_is_said_and_auto_starts_a_run(photos, refused):
    assert "There is no unfinished run in runs/" in refused("fit", "--resume")
    assert "There is no run nowhere" in refused("fit", "--resume", "nowhere")
    assert cli.main([*FIT, "--resume", "auto"]) == 0
    assert "has completed its 3 epochs" in refused("fit", "--resume", str(RUN))
    assert "leave one out" in refused("fit", "--resume", "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"))
    assert cli.main([*FIT, "--resume", "auto"]) == 0
    assert len(list(Path("runs/photos").iterdir())) == 2


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return bytes(content)


def test_damaged_checkpoint_is_named_the_previous_one_used_and_later_images_are_left_out(
    photos, interrupt, refused, capsys
):
    assert cli.main(FIT) == 0
    interrupt(4, 14)
    assert cli.main(FIT) == cli.main(["fit", "--resume"]) == 130
    (photos / "red" / "late.png").write_bytes((photos / "red" / "000.png").read_bytes())
    run = RUN.with_name("version_1")
    last = run / "checkpoints" / "last.ckpt"
    damage(last)
    assert cli.main(["fit", "--resume"]) == 0
    assert f"resume: {last} is damaged" in capsys.readouterr().out
    assert_the_same(RUN, run)
    assert {file.name for file in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    content = damage(last)  # now without a previous one
    assert f"--model.weights {run}/checkpoints/best.ckpt" in refused("fit", "--resume", str(run))
    assert last.read_bytes() == content


def test_image_replaced_by_garbage_in_mid_run_is_left_out_and_the_fit_goes_on(photos, interrupt, capsys):
    interrupt(4)
    assert cli.main([*FIT, "--data.cache", "off"]) == 130
    with (RUN / "split.csv").open() as stream:
        train = [row["path"] for row in csv.DictReader(stream) if row["split"] == "train"]
    (photos / train[0]).write_bytes(b"garbage")
    (photos / train[1]).unlink()
    assert cli.main(["fit", "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"left out, unreadable: photos/{train[0]}" in said
    assert "1 images of" in said or f"left out, unreadable: photos/{train[1]}" in said


def test_last_checkpoint_goes_on_in_a_new_run_too(photos, interrupt):
    interrupt(14)
    assert cli.main(FIT) == 130
    last = str(RUN / "checkpoints" / "last.ckpt")
    assert cli.main(["fit", "--ckpt_path", last, "--data.batch_size", "6"]) == 0  # other batches: its epoch starts anew
    new = checkpoint(Path("runs/photos/version_1"))
    assert new["epoch"] == 2
    assert new["global_step"] == 15 + 2 * (84 // 6)
    assert os.path.lexists("runs/latest")


@pytest.mark.parametrize("options", [[], ["--average", "0.9"]])
def test_run_that_was_killed_after_its_last_save_is_whole_and_only_has_to_be_called_finished(photos, options):
    assert cli.main([*FIT, *options]) == 0
    before, shown = runs.read_status(RUN), logged(RUN)
    runs.write_status(RUN, state="running")
    assert cli.main(["fit", "--resume"]) == 0
    assert logged(RUN) == shown
    after = runs.read_status(RUN)
    assert (after["state"], after["step"]) == ("finished", before["step"])
    assert after["seconds"] == pytest.approx(before["seconds"], abs=1)


def test_reader_sees_whole_files_at_any_time(photos):
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            for file in Path("runs").glob("photos/version_*/*.*"):  # a run appears whole
                text = file.read_text() if file.suffix in (".csv", ".json", ".yaml") else ""
                if file.suffix == ".json":
                    seen.append(json.loads(text)["state"])
                elif file.name == "metrics.csv":
                    rows = list(csv.DictReader(text.splitlines()))
                    assert all(None not in row and None not in row.values() for row in rows)
                elif file.name == "config.yaml":
                    assert yaml.safe_load(text)["data"]["root"] == "photos"
            for file in Path("runs").glob("photos/version_*/checkpoints/[!.]*.ckpt"):
                with contextlib.suppress(FileNotFoundError):
                    assert is_whole(file)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            assert cli.main(FIT) == 0
        finally:
            done.set()
        reader.result()
    assert {"running"} <= set(seen) <= {"running", "finished"}


def test_a_run_is_unfinished_from_its_first_moment(photos, monkeypatch):
    monkeypatch.setattr("project.training.fit.callbacks", lambda *_: 1 / 0)
    monkeypatch.setattr(Run, "discard", lambda run: run.lock.release())  # as if the fit had been killed
    with pytest.raises(ZeroDivisionError):
        cli.main([*FIT, "--trainer.max_epochs", "1"])
    assert runs.unfinished() == [Path("runs/photos/version_0")]
