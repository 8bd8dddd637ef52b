"""What a fit saves, averaged weights among it; and how it reaches the disk: complete, without holding up the fit."""

import errno
import multiprocessing
import os
import re
import signal
import threading
from collections import OrderedDict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli
from project.classifier import Classifier
from project.errors import FailedRun
from project.models.weights import is_whole
from project.training import checkpoint_io
from project.training.callbacks import ProgressLines
from project.training.checkpoint_io import AsyncCheckpointIO
from project.training.checkpointing import BestCheckpoint, _are_inside
from project.training.ema import EMA
from project.training.loggers import MetricsFile
from tests.conftest import ALIVE, SMALL, full_disk
from tests.same_run import checkpoint, differences, logged

FIT = ["fit", "--data.root", "photos", *SMALL]
RUN = Path("runs/photos/version_0")


@pytest.mark.slow
def test_average_is_that_of_the_weights_after_each_step_and_best_holds_it_as_it_was_validated(
    photos, monkeypatch, capsys
):
    seen, end = [], EMA.on_train_batch_end

    def note(self, trainer, pl_module, *rest):
        seen.append(next(pl_module.parameters()).detach().clone())
        end(self, trainer, pl_module, *rest)

    monkeypatch.setattr(EMA, "on_train_batch_end", note)
    options = ["--trainer.max_epochs", "2", "--average", "0.65", "--model.lr", "0.001", *ALIVE]
    assert cli.main([*FIT, *options]) == 0
    expected = seen[0]
    for step, weights in enumerate(seen[1:], 1):
        kept = min(0.65, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weights
    best, last = checkpoint(RUN, "best"), checkpoint(RUN)
    key = next(key for key, tensor in last["state_dict"].items() if tensor.shape == expected.shape)
    assert torch.allclose(last["state_dict"][key], expected, atol=1e-6)
    assert torch.equal(last["current_model_state"][key], seen[-1])
    assert "current_model_state" not in best  # weights only
    assert (not differences(best["state_dict"], last["state_dict"])) == (best["epoch"] == last["epoch"])
    capsys.readouterr()
    assert cli.main(["validate"]) == 0
    measured = float(re.search(r"val/loss\D*([\d.]+)", capsys.readouterr().out)[1])
    assert measured == pytest.approx(best["metadata"]["metrics"]["val/loss"], abs=6e-5)  # four decimals


@pytest.mark.slow
def test_fit_leaves_no_signal_handler_and_no_thread_behind_and_a_failed_one_its_best_checkpoint(photos, monkeypatch):
    def left():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        return handlers, {thread.name for thread in threading.enumerate()}, multiprocessing.active_children()

    before = left()
    assert cli.main([*FIT, "--trainer.max_epochs", "1", "--data.workers", "1"]) == 0
    assert left() == before
    monkeypatch.setattr(ProgressLines, "on_train_epoch_start", lambda _, trainer, __: 1 / (1 - trainer.current_epoch))
    with pytest.raises(ZeroDivisionError):
        cli.main([*FIT, "--trainer.max_epochs", "3", "--data.workers", "1"])  # in the second
    assert left() == before
    assert os.listdir("runs/photos/version_1/checkpoints") == ["best.ckpt"]
    monkeypatch.setattr(MetricsFile, "finalize", Mock(side_effect=OSError(errno.ENOSPC, "full")))  # before the teardown
    assert cli.main([*FIT, "--trainer.max_epochs", "3"]) == 1
    assert left()[0] == before[0]


def test_validation_that_fails_does_not_mix_up_weights_and_average(photos, monkeypatch):
    seen = {}

    def note(self, *_):
        seen[self] = {key: tensor.clone() for key, tensor in self.state_dict().items()}

    monkeypatch.setattr(Classifier, "on_train_batch_end", note)
    monkeypatch.setattr(Classifier, "validation_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.9"])
    ((model, weights),) = seen.items()
    assert not differences(model.state_dict(), weights)


def test_fit_stops_when_the_validation_loss_no_longer_falls_and_says_so(photos, scripted, capsys):
    scripted(train=[0.5] * 9, val=[0.4, 0.5, 0.45, 0.6, 0.55, 0.6, 0.7, 0.8, 0.9])
    assert cli.main([*FIT, "--trainer.max_epochs", "9", "--patience", "2"]) == 0
    assert "stopped after epoch 6: no lower val/loss in 2 validations" in capsys.readouterr().out
    assert len(logged(RUN)[1]["val/loss"]) == 6
    assert checkpoint(RUN, "best")["epoch"] == 3


@pytest.mark.slow
def test_monitor_decides_on_the_best_checkpoint_and_on_the_stop(photos, scripted, capsys, refused):
    scripted(train=[0.5] * 9, val=[0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8])  # no loss is as low as the last
    fit = ["--patience", "2", "--monitor", "val/f1", "--trainer.max_epochs"]
    assert cli.main([*FIT, *fit, "9"]) == 0
    out = capsys.readouterr().out
    assert "stopped after epoch 4: no higher val/f1 in 2 validations" in out
    assert "best: epoch 2  val/f1 1.000  val/loss 0.9163" in out
    best = checkpoint(RUN, "best")
    assert (best["epoch"], best["metadata"]["config"]["monitor"]) == (1, "val/f1")
    assert EventAccumulator(str(RUN)).Reload().Scalars("val_best/loss")[0].value == pytest.approx(0.9163, abs=1e-4)
    again = ["fit", "--resume", str(RUN), "--trainer.max_epochs", "7"]
    assert "--monitor val/f1 -> val/loss" in refused(*again, "--monitor", "val/loss")
    assert cli.main(again) == 0  # has stopped, and stops again
    assert checkpoint(RUN, "best")["epoch"] == 1
    last = ["fit", "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"), "--monitor", "val/accuracy"]
    assert cli.main([*last, "--trainer.max_epochs", "8"]) == 0
    assert checkpoint(RUN.with_name("version_1"), "best")["metadata"]["config"]["patience"] == 2


# how checkpoints reach the disk


def content(value, size=1000):
    return {"state_dict": OrderedDict(a=torch.full((size,), float(value))), "n": value}


def read(file):
    return torch.load(file, weights_only=True)["n"]


def save(saver, *numbers, name="last.ckpt"):
    for number in numbers:
        saver.save_checkpoint(content(number), name)
        saver.wait()


def test_last_is_in_place_and_the_previous_one_stays_until_the_run_is_finished(workplace):
    saver = AsyncCheckpointIO(Path("run"))
    save(saver, 0, 1, 2, name="run/last.ckpt")
    assert {name: read(f"run/{name}") for name in os.listdir("run")} == {"last.ckpt": 2, "previous.ckpt": 1}
    assert is_whole(Path("run/last.ckpt"))
    saver.finish()
    assert os.listdir("run") == ["last.ckpt"]


def test_saving_returns_before_the_disk_has_the_weights_of_that_moment_and_a_removed_file_does_not_come_back(
    workplace, monkeypatch
):
    go_on, write = threading.Event(), torch.save

    def wait(*arguments):
        assert go_on.wait(20)
        write(*arguments)

    monkeypatch.setattr(checkpoint_io.torch, "save", wait)
    saver, state = AsyncCheckpointIO(Path()), content(1)
    saver.save_checkpoint(state, "last.ckpt")
    state["state_dict"]["a"] += 1  # the next step
    assert saver.busy
    go_on.set()
    saver.wait()
    assert torch.load("last.ckpt", weights_only=True)["state_dict"]["a"].unique().tolist() == [1]
    go_on.clear()
    saver.save_checkpoint(content(1), "mine.ckpt")
    threading.Timer(0.2, go_on.set).start()
    saver.remove_checkpoint("mine.ckpt")
    saver.wait()
    assert os.listdir() == ["last.ckpt"]


def test_best_waits_in_memory_for_the_last_and_holds_no_training_state(workplace):
    saver = AsyncCheckpointIO(Path())
    training_state = {"optimizer_states": [1], "MixedPrecision": {"scale": 2.0}}
    for number in range(3):
        saver.save_checkpoint(content(number) | training_state, Path("best.ckpt").resolve())
    saver.wait()
    assert os.listdir() == []
    save(saver, 5)
    assert {name: read(name) for name in os.listdir()} == {"best.ckpt": 2, "last.ckpt": 5}
    assert torch.load("best.ckpt", weights_only=True).keys() == {"state_dict", "n"}
    saver.save_checkpoint(content(7), Path("best.ckpt").resolve())
    saver.teardown()
    assert read("best.ckpt") == 7


def test_copy_is_equal_in_shape_strides_type_and_value():
    state = OrderedDict(
        maps=torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        transposed=torch.randn(7, 9).T,
        half=torch.randn(5).bfloat16(),
        count=torch.tensor(3),
        empty=torch.zeros(0),
        mask=torch.arange(9) > 4,
    )
    state._metadata = {"": {"version": 2}}
    made = checkpoint_io.on_cpu({"state_dict": state, "rest": [1, ("a", {"b": torch.ones(1).expand(4)})]})
    torch.testing.assert_close(made["state_dict"], state, rtol=0, atol=0, check_stride=True)
    assert made["state_dict"]._metadata == state._metadata
    assert made["rest"][1][1]["b"].tolist() == [1, 1, 1, 1]
    shared = [name for name in state if made["state_dict"][name].data_ptr() == state[name].data_ptr()]
    assert shared == ["empty"]  # which has no memory


def test_full_disk_leaves_the_previous_checkpoint_is_reported_once_and_may_pass(workplace, monkeypatch, capsys):
    saver, last = AsyncCheckpointIO(Path("run/checkpoints")), "run/checkpoints/last.ckpt"
    save(saver, 1, name=last)
    full_disk(monkeypatch, times=2)
    save(saver, 2, 3, name=last)
    assert os.listdir("run/checkpoints") == ["last.ckpt"]
    assert read(last) == 1
    with pytest.raises(FailedRun, match=r"No space left on device.*fit --resume run$"):
        saver.finish()
    save(saver, 4, name=last)
    saver.finish()
    assert read(last) == 4
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "last.ckpt cannot be written: No space left on device; the previous file stays" in said


def test_state_that_cannot_be_pickled_is_reported_and_fails_the_run(workplace, capsys):
    saver = AsyncCheckpointIO(Path("run/checkpoints"))
    saver.save_checkpoint({"n": lambda: None}, "run/checkpoints/last.ckpt")
    saver.wait()
    with pytest.raises(FailedRun, match=r"last\.ckpt could not be written: .*pickle"):
        saver.finish()
    assert "there is no previous one, and training continues" in capsys.readouterr().out


def test_folder_that_cannot_be_made_is_reported_like_a_full_disk(workplace, capsys):
    Path("run").write_text("")  # where the run's folder was
    save(AsyncCheckpointIO(Path("run/checkpoints")), 1, name="run/checkpoints/last.ckpt")
    assert "last.ckpt cannot be written: Not a directory; there is no previous one" in capsys.readouterr().out


def test_checkpoint_is_written_where_the_system_takes_no_advice_on_its_page_cache(workplace, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)  # macOS, Windows
    save(AsyncCheckpointIO(Path()), 1)
    assert read("last.ckpt") == 1


NEVER = ["--trainer.limit_val_batches", "0"]


@pytest.mark.parametrize("options", [[*NEVER, "--average", "0.9"], ["--trainer.max_steps", "3", "--patience", "1"]])
def test_fit_without_a_validation_says_so_and_its_last_weights_are_the_best(photos, capsys, options):
    assert cli.main([*FIT, "--trainer.max_epochs", "1", *options]) == 0
    out = capsys.readouterr().out
    assert "There was no validation: best.ckpt holds the last weights." in out
    best, last = (checkpoint(RUN, name) for name in ("best", "last"))
    assert best["metadata"]["validated"] is False
    assert not differences(best["state_dict"], last["state_dict"])
    assert cli.main(["predict", str(RUN), str(photos / "red"), "--out", "red.csv"]) == 0
    (RUN / "checkpoints" / "best.ckpt").unlink()
    assert cli.main(["predict", str(RUN), str(photos / "red"), "--out", "other.csv"]) == 2
    assert "ended before a validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "never"),
    [
        (["--trainer.max_steps", "3", "--trainer.accumulate_grad_batches", "4"], False),  # ten batches, all of them
        (["--trainer.max_steps", "2", "--trainer.accumulate_grad_batches", "4"], True),
        (["--trainer.max_steps", "3", "--trainer.val_check_interval", "3"], False),
        (["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "3"], True),
    ],
)
def test_only_a_fit_without_a_validation_is_said_to_have_none(photos, capsys, options, never):
    assert cli.main([*FIT, *options]) == 0
    assert ("There was no validation" in capsys.readouterr().out) == never
    assert checkpoint(RUN, "best")["metadata"]["validated"] is not never


@pytest.mark.slow
def test_run_that_goes_on_to_validate_has_a_validated_best_and_report_and_card_name_one_that_never_did(photos, capsys):
    assert cli.main([*FIT, "--trainer.max_steps", "3"]) == cli.main(["test"]) == cli.main(["export"]) == 0
    for file in (RUN / "report.html", RUN / "bundle" / "README.md"):
        assert "never been validated" in file.read_text("utf-8")
    assert cli.main([*FIT, "--resume", str(RUN), "--trainer.max_steps", "12"]) == 0  # of ten steps an epoch
    assert capsys.readouterr().out.count("There was no validation") == 2
    assert cli.main([*FIT, "--resume", str(RUN), "--trainer.max_steps", "22"]) == 0
    assert checkpoint(RUN, "best")["metadata"]["validated"] is True


def test_paths_in_a_checkpoint_do_not_choose_what_is_replaced_or_deleted(workplace):
    paths = dict.fromkeys(("best_model_path", "last_model_path"), "") | {"kth_best_model_path": "local:///victim"}
    state = paths | {"best_k_models": {"local:///victim": 9e9}, "dirpath": "own", "best_model_score": None}
    state |= {"monitor": "val/loss", "kth_value": torch.tensor(9e9), "current_score": None}
    (best := BestCheckpoint(Path("own"), "val/loss", "min")).load_state_dict(state)
    assert (best.best_k_models, best.kth_best_model_path, best.last_model_path) == ({}, "", "")
    for path, is_inside in {
        "own/a.ckpt": True,
        "": True,
        "own/..": False,
        "own/a": False,
        "local:own/a.ckpt": False,
    }.items():
        assert _are_inside({"best_k_models": {path: 1.0}}, Path("own")) == is_inside
        assert _are_inside({"last_model_path": path}, Path("own")) == is_inside
