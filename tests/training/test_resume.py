"""fit --resume: a run that was stopped, has failed or lost its disk goes on at its last save, to the same bits."""

import contextlib
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from project import cli, runs
from project.classifier import Classifier
from project.models.weights import is_whole
from project.training.callbacks import ProgressLines, StepSeed
from project.training.resume import Run
from tests.conftest import COLOURS, SEED, SMALL, full_disk, make_images, read_csv
from tests.same_run import assert_the_same, checkpoint, differences, logged

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2"]
RUN = Path("runs/photos/version_0")
STEPS = 10  # an epoch has: 84 training images in batches of 8
# TensorBoard reads a run's event files by their names, of a second, a process and this number: 10 would precede 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of a fit with these options that nothing stops; copy what you change."""

    @functools.cache
    def fit(*options):
        folder = tmp_path_factory.mktemp("undisturbed")
        make_images(folder / "photos", dict.fromkeys(COLOURS, 40))
        with contextlib.chdir(folder):
            assert cli.main([*FIT, *options]) == 0
        return folder / RUN

    return fit


@pytest.fixture
def interrupt(monkeypatch):
    """Presses Ctrl-C at these places, once each and once a fit: a step, from 0, or epoch and batch of a validation."""
    waiting, pressed = set(), []

    def press_in(callback, name, place_of):
        hook = getattr(callback, name)

        def press(self, trainer, *rest):
            place = place_of(trainer, *rest)
            if place in waiting and trainer not in pressed:  # a second time would end the process at once
                waiting.remove(place)
                pressed.append(trainer)
                signal.raise_signal(signal.SIGINT)
            hook(self, trainer, *rest)

        monkeypatch.setattr(callback, name, press)

    press_in(StepSeed, "on_train_batch_start", lambda trainer, *_: trainer.fit_loop.total_batch_idx)
    press_in(StepSeed, "on_validation_batch_start", lambda trainer, *rest: (trainer.current_epoch, rest[2]))
    return lambda *places: waiting.update(places)


def fit_in_parts(options, interrupt, *places):
    """The run of a fit that is stopped at these places and goes on each time."""
    interrupt(*places)
    assert cli.main([*FIT, *options]) == 130
    while (code := cli.main(["fit", "--resume"])) == 130:
        pass
    assert code == 0
    return RUN


AVERAGED = ["--model.name", "timm/test_efficientnet", "--average", "0.9"]  # has batch norm
KINDS = [
    [],
    ["--trainer.accumulate_grad_batches", "3"],
    ["--trainer.val_check_interval", "5"],
    ["--model.mix", "mixup", "--data.balance", "sample"],
    AVERAGED,
    ["--trainer.max_steps", "25"],
    ["--trainer.check_val_every_n_epoch", "2", "--patience", "3"],
    ["--model.freeze", "backbone", "--data.augment", "none"],
    ["--trainer.limit_train_batches", "7", "--model.optimizer", "sgd", "--model.weight_decay", "0.1"],
]


def every_kind(count, mark):
    """Parametrises by KINDS, of which all but the first `count` are marked."""
    cases = [*KINDS[:count], *(pytest.param(options, marks=mark) for options in KINDS[count:])]
    return pytest.mark.parametrize("options", cases, ids=lambda options: " ".join(options) or "defaults")


@every_kind(2, pytest.mark.full)
@pytest.mark.slow
def test_fit_stopped_in_a_step_and_in_a_validation_goes_on_to_the_same_bits(photos, undisturbed, interrupt, options):
    reference = undisturbed(*options)
    assert_the_same(fit_in_parts(options, interrupt, 4, (1, 1)), reference)
    for run in (RUN, reference):  # both end with plots and points of the last validation
        shown = EventAccumulator(str(run)).Reload()
        assert [image.step for image in shown.Images("val/samples")] == [shown.Scalars("val/loss")[-1].step]
        assert (run / "projector" / "validation" / "tensors.tsv").exists()


@pytest.mark.full
@every_kind(len(KINDS), pytest.mark.full)
def test_fit_that_was_stopped_anywhere_goes_on_to_the_same_bits(photos, undisturbed, interrupt, options):
    """At the first and the last step of an epoch, in successive steps, and often."""
    last = (6 if "7" in options else STEPS - 1) + STEPS
    for places in ([0], [STEPS], [last], [last - 1, last, last + 1], [1, 5, (1, 0), 13, 22]):
        if "2" in options:  # the first epoch has no validation
            places = [place for place in places if place != (1, 0)]
        assert_the_same(fit_in_parts(options, interrupt, *places), undisturbed(*options))
        shutil.rmtree("runs")


@pytest.mark.full
def test_stopped_fit_with_workers_goes_on_to_the_same_bits_as_without_workers(photos, undisturbed, interrupt):
    augment, workers = ["--data.augment", "trivial"], ["--data.workers", "2"]
    run = fit_in_parts([*augment, *workers], interrupt, 4, STEPS, (1, 1))
    assert_the_same(run, undisturbed(*augment, *workers))
    assert not differences(checkpoint(run)["state_dict"], checkpoint(undisturbed(*augment))["state_dict"])


def test_more_epochs_after_the_end_go_on_with_the_schedule_of_so_many(photos, undisturbed, capsys):
    shutil.copytree(undisturbed().parents[1], "runs", symlinks=True)
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
        (["--model.lr", "0.1"], "--model.lr 0.0003 -> 0.1"),
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
def test_what_changes_the_result_is_refused(photos, undisturbed, refused, options, said):
    shutil.copytree(undisturbed().parents[1], "runs", symlinks=True)
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    sentence = refused("fit", "--resume", str(RUN), "--trainer.max_epochs", "4", *options)
    assert said in sentence
    assert f"--model.weights {RUN}/checkpoints/last.ckpt" in sentence
    assert before == {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}


@pytest.mark.full
def test_command_that_adds_to_lists_resumes_its_run_and_its_classes_are_trusted_by_name(photos, interrupt, capsys):
    options = ["--trainer.callbacks+=ModelSummary", "--data.transforms+=RandomGrayscale"]
    interrupt(3)
    assert cli.main([*FIT, *options]) == 130
    said = capsys.readouterr().out
    assert f"Resume with: python -m project.cli fit --resume {RUN} --trust lightning.pytorch.callbacks.Mod" in said
    recorded = yaml.safe_load((RUN / "config.yaml").read_text())
    assert cli.main([*FIT, *options, "--resume", "auto"]) == 0
    now = yaml.safe_load((RUN / "config.yaml").read_text())
    assert [now[key] for key in ("data", "trainer")] == [recorded[key] for key in ("data", "trainer")]
    assert [len(now["trainer"]["callbacks"]), len(now["data"]["transforms"])] == [1, 1]


@pytest.mark.slow
def test_newest_unfinished_run_is_meant_and_what_cannot_be_resumed_is_said(photos, interrupt, refused, capsys):
    assert "There is no unfinished run in runs/" in refused("fit", "--resume")
    assert "There is no run nowhere" in refused("fit", "--resume", "nowhere")
    auto, run, finished = [*FIT, "--resume", "auto", "--name"], Path("runs/one/version_0"), Path("runs/two/version_0")
    assert cli.main([*auto, "two", "--trainer.max_epochs", "1"]) == 0
    assert "has completed its 1 epochs" in refused("fit", "--resume", str(finished))
    (kept := finished / "checkpoints" / "last.ckpt").rename("kept.ckpt")
    gone = (
        "has finished, and its last.ckpt, which would be continued from, is gone; start a new run with --model.weights"
    )
    assert gone in refused("fit", "--resume", str(finished), "--trainer.max_epochs", "2")
    Path("kept.ckpt").rename(kept)
    assert "leave one out" in refused("fit", "--resume", "--ckpt_path", str(finished / "checkpoints" / "last.ckpt"))
    interrupt(4)
    assert cli.main([*auto, "one", "--trainer.max_epochs", "1"]) == 130
    for other in (["--name", "three"], ["--data.root", "others"]):
        shutil.copytree("photos", "others", dirs_exist_ok=True)
        assert cli.main([*auto, "three", "--trainer.max_epochs", "1", *other]) == 0
    assert Path("runs/three/version_1").is_dir()  # neither goes on with one
    (finished / "config.yaml").touch()  # is the newest now
    lock = runs.RunLock(run)
    for words in ([], [str(run)]):
        assert f"{run} is being trained by another process" in refused("fit", "--resume", *words)
    lock.release()
    assert cli.main(["fit", "--resume"]) == 0
    assert str(run) in capsys.readouterr().out
    assert Path("runs/latest").resolve() == run.resolve()
    for epochs, name in (("2", "runs/latest/checkpoints/last.ckpt"), ("3", str(run.resolve()))):
        assert cli.main(["fit", "--resume", name, "--trainer.max_epochs", epochs]) == 0
        assert Path("runs/latest").readlink() == Path("one/version_0")
    assert checkpoint(run)["epoch"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.devices", "99"], "99 processes are too many"),
        (["--trainer.max_time", "soon"], "not a valid duration"),
        (["--trainer.max_steps", "20"], "has completed its 30 steps; give more by --trainer.max_steps"),
        (["--trainer.max_epochs", "2"], "has completed its 3 epochs; give more by --trainer.max_epochs"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_resume_that_is_refused_changes_no_file_of_the_run(photos, undisturbed, capsys, options, said, state):
    shutil.copytree(undisturbed().parents[1], "runs", symlinks=True)
    runs.write_status(RUN, state=state)
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    assert cli.main(["fit", "--resume", str(RUN), "--trainer.max_epochs", "5", *options]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "completed" not in said or "resume: " not in shown.out  # not that the limit changes
    assert before == {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    runs.RunLock(RUN).release()


def test_checkpoint_that_cannot_be_restored_changes_no_file_and_leaves_no_new_run(photos, undisturbed, refused):
    shutil.copytree(undisturbed().parents[1], "runs", symlinks=True)
    last = RUN / "checkpoints" / "last.ckpt"
    content = checkpoint(RUN)
    content["optimizer_states"][0]["param_groups"] *= 2
    torch.save(content, last)
    before = {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    for start in ("--resume", "--ckpt_path"):
        assert "Cannot resume" in refused("fit", start, str(last), "--trainer.max_epochs", "5")
        assert before == {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}


def test_images_with_a_relative_path_and_a_link_to_no_run_are_explained(photos, undisturbed, refused, monkeypatch):
    run, begun = undisturbed(), undisturbed().parents[2]
    Path("runs").mkdir()
    Path("runs/latest").symlink_to("gone/version_0")
    for verb in (["fit", "--resume"], ["predict"]):
        assert "gone/version_0, which is gone" in refused(*verb, "runs/latest", *["photos"][: verb == ["predict"]])
    photos.rename("moved")
    for verb in (["fit", "--trainer.max_epochs", "5", "--resume"], ["test"]):
        assert f"where the run was begun: cd {begun}, or" in refused(*verb, str(run))
    shutil.copytree(run, "copy")
    assert cli.main(["fit", "--resume", "copy", "--trainer.max_epochs", "4", "--data.root", "moved"]) == 0


def test_new_run_from_a_checkpoint_knows_only_its_own_validations(photos, undisturbed, capsys):
    last = undisturbed() / "checkpoints" / "last.ckpt"
    assert cli.main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs", "4", "--trainer.max_steps", "33"]) == 0
    best = checkpoint(RUN, "best")["metadata"]
    assert not best["validated"]
    assert not [name for name in best["metrics"] if name.startswith("val/")]
    assert "val/loss" not in capsys.readouterr().out


@pytest.mark.slow
def test_run_that_was_moved_is_resumed_there_and_keeps_its_best(photos, scripted):
    scripted(train=[0.5] * 3, val=[0.5, 0.9, 0.7])
    assert cli.main([*FIT, "--trainer.max_epochs", "2"]) == 0
    shutil.move(RUN, "moved")
    shutil.rmtree("runs")
    Path("disk").mkdir()
    Path("runs").symlink_to("disk")
    for name in ("moved", "moved/checkpoints/.."):
        assert cli.main(["fit", "--resume", name, "--trainer.max_epochs", "3"]) == (0 if name == "moved" else 2)
    assert Path("runs/latest").resolve() == Path("moved").resolve()
    assert (checkpoint(Path("moved"), "best")["epoch"], checkpoint(Path("moved"))["epoch"]) == (1, 2)


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return bytes(content)


@pytest.mark.slow
def test_damaged_checkpoint_is_named_the_previous_one_used_and_later_images_are_left_out(
    photos, undisturbed, interrupt, refused, capsys
):
    interrupt(4, 14)
    assert cli.main(FIT) == cli.main(["fit", "--resume"]) == 130
    (photos / "red" / "late.png").write_bytes((photos / "red" / "000.png").read_bytes())
    last = RUN / "checkpoints" / "last.ckpt"
    damage(last)
    assert cli.main(["fit", "--resume"]) == 0
    assert f"resume: {last} is damaged" in capsys.readouterr().out
    assert_the_same(RUN, undisturbed())
    assert {file.name for file in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    content = damage(last)  # now without a previous one
    assert f"--model.weights {RUN}/checkpoints/best.ckpt" in refused("fit", "--resume", str(RUN))
    assert last.read_bytes() == content


@pytest.mark.slow
def test_image_replaced_by_garbage_in_mid_run_is_left_out_and_the_fit_goes_on(photos, interrupt, capsys):
    interrupt(4)
    assert cli.main([*FIT, "--data.cache", "off"]) == 130
    rows = read_csv(RUN / "split.csv")
    train = [row["path"] for row in rows if row["split"] == "train"]
    (photos / train[0]).write_bytes(b"garbage")
    (photos / train[1]).unlink()
    assert cli.main(["fit", "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"left out, unreadable: photos/{train[0]}" in said
    assert "1 images of" in said or f"left out, unreadable: photos/{train[1]}" in said


@pytest.mark.slow
def test_last_checkpoint_goes_on_in_a_new_run_too_with_its_average(photos, interrupt):
    interrupt(14)
    assert cli.main([*FIT, "--average", "0.9"]) == 130
    last, run = str(RUN / "checkpoints" / "last.ckpt"), RUN.with_name("version_1")
    assert cli.main(["fit", "--ckpt_path", last, "--data.batch_size", "6"]) == 0  # other batches: its epoch starts anew
    new = checkpoint(run)
    assert (new["epoch"], new["global_step"]) == (2, 15 + 2 * (84 // 6))
    assert "current_model_state" in new
    assert "average: 0.9" in (run / "config.yaml").read_text()
    assert os.path.lexists("runs/latest")


@pytest.mark.parametrize("options", [[], ["--average", "0.9"]])
def test_run_killed_after_its_last_save_is_whole_and_only_has_to_be_called_finished(photos, undisturbed, options):
    shutil.copytree(undisturbed(*options).parents[1], "runs", symlinks=True)
    before, shown = runs.read_status(RUN), logged(RUN)
    runs.write_status(RUN, state="running")
    assert cli.main(["fit", "--resume"]) == 0
    assert logged(RUN) == shown
    after = runs.read_status(RUN)
    assert (after["state"], after["step"]) == ("finished", before["step"])
    assert after["seconds"] == pytest.approx(before["seconds"], abs=1)


def require_whole_files(run):
    for file in run.glob("checkpoints/[!.]*.ckpt"):
        with contextlib.suppress(FileNotFoundError):  # it has just been replaced
            assert is_whole(file)
    for file in run.glob("metrics.csv"):
        rows = read_csv(file)
        assert all(None not in row and None not in row.values() for row in rows)


@pytest.mark.full
def test_reader_sees_whole_files_at_any_time(photos):
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            for run in Path("runs").glob("photos/version_*"):  # appears whole
                seen.append(json.loads((run / "status.json").read_text())["state"])
                assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == "photos"
                require_whole_files(run)

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


# failures


def after_call(monkeypatch, number, owner, name, do):
    """Does something after the call of this number, from 1, of a function has changed what it changes."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **options):
        result = function(*arguments, **options)
        if next(calls) == number:
            do()
        return result

    monkeypatch.setattr(owner, name, call)


OFTEN = ["--patience", "3", "--save_every", "0.0001"]
FAILURES = {
    "before the first step": (1, ProgressLines, "on_train_start"),
    "in a step": (14, Classifier, "training_step"),  # statistics and sums have changed already
    "in an update": (13, torch.optim.Adam, "step"),
    "after a validation": (2, EarlyStopping, "on_validation_end"),  # which it counts
}


@pytest.mark.parametrize("options", [[], pytest.param(AVERAGED, marks=pytest.mark.full)])
@pytest.mark.parametrize("place", FAILURES.values(), ids=FAILURES)
@pytest.mark.slow
def test_failed_fit_resumes_from_its_last_save_to_the_same_bits(photos, undisturbed, monkeypatch, place, options):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = [*OFTEN, *options]
    with monkeypatch.context() as patched:
        after_call(patched, *place, fail)
        with pytest.raises(torch.OutOfMemoryError):
            cli.main([*FIT, *options])
    status = runs.read_status(RUN)
    assert (status["state"], status["reason"]) == ("failed", "OutOfMemoryError: CUDA out of memory")
    if place == FAILURES["before the first step"]:
        assert status["step"] == 0
        assert not list(RUN.rglob("*.ckpt"))
    else:
        assert 0 < checkpoint(RUN)["global_step"] < 2 * STEPS
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(RUN, undisturbed(*options))


def the_sentence(capsys):
    """The only line on standard error."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out
    (sentence,) = captured.err.splitlines()
    return sentence


@pytest.mark.slow
def test_full_disk_ends_the_fit_with_a_sentence_and_the_fit_goes_on_when_there_is_room(
    photos, undisturbed, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        after_call(patched, 1, ProgressLines, "on_train_start", lambda: full_disk(patched))
        assert cli.main(FIT) == 1
    sentence = the_sentence(capsys)
    assert "No space left on device" in sentence
    assert f"fit --resume {RUN}" in sentence
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(RUN, undisturbed())


@pytest.fixture
def small_disk(workplace):
    """Mounts a file system with these options on runs/."""
    Path("runs").mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "runs"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")

    yield mount
    subprocess.run(["umount", "-l", "runs"], check=False)


@pytest.mark.parametrize("size", [16, 40, 200, 2000, 8000, 11000])
def test_disk_of_any_size_leaves_only_whole_files_and_a_sentence(small_disk, photos, capsys, size):
    """One for the logs alone, one for part of best.ckpt, one for that and part of last.ckpt, ..."""
    small_disk(f"size={size}k")
    assert cli.main(FIT) in (1, 2)
    assert "No space left on device" in the_sentence(capsys)
    assert not list(Path("runs").rglob("*.tmp"))
    for run in Path("runs").glob("photos/version_*"):
        require_whole_files(run)
        EventAccumulator(str(run)).Reload()


@pytest.mark.slow
def test_disk_that_becomes_read_only_ends_the_fit_with_a_sentence_and_it_goes_on_later(
    small_disk, photos, undisturbed, monkeypatch, capsys
):
    small_disk("size=100m")
    with monkeypatch.context() as patched:
        after_call(patched, 3, ProgressLines, "on_train_epoch_start", lambda: small_disk("remount", "ro"))
        assert cli.main([*FIT, *OFTEN]) == 1
    assert "Read-only file system" in the_sentence(capsys)
    assert is_whole(RUN / "checkpoints" / "last.ckpt")
    small_disk("remount", "rw")
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(RUN, undisturbed(*OFTEN))


@pytest.mark.full
def test_file_system_without_locks_is_said_once_and_dates_in_the_far_future_are_read(photos, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.flock", no_locks)
    for path in (photos, *photos.rglob("*")):
        os.utime(path, (13_569_465_600, 13_569_465_600))  # the year 2400
    assert cli.main([*FIT, "--trainer.max_epochs", "1"]) == 0
    assert capsys.readouterr().out.count("cannot be locked (Operation not supported)") == 1
    os.utime(RUN, (13_569_465_600, 13_569_465_600))
    assert cli.main(["fit", "--resume", str(RUN), "--trainer.max_epochs", "2"]) == 0


def test_own_options_of_a_resumed_run_choose_no_other_folder(workplace):
    (folder := Path("runs/a/version_0")).mkdir(parents=True)
    Path("other").mkdir()
    Path("other/latest").write_text("mine")
    Run(folder, None, resumed=True).begin({}, Path("other"))
    assert Path("other/latest").read_text() == "mine"
    assert Path("runs/latest").resolve() == folder.resolve()
