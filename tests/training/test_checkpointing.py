"""What a fit saves: averaged weights, what an exception leaves; and a fit that stops by itself."""

import csv
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli, runs
from project.classifier import Classifier
from project.models.weights import is_whole
from project.training.callbacks import ProgressLines
from project.training.ema import EMA
from tests.conftest import ALIVE, SMALL, full_disk
from tests.same_run import assert_the_same, differences

FIT = ["fit", "--data.root", "photos", *SMALL]


def content_of(name, run=Path("runs/photos/version_0")):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_best_holds_the_averaged_weights_that_were_validated(photos, capsys):
    options = ["--average", "0.9", "--model.lr", "0.001", *ALIVE]
    assert cli.main([*FIT, "--trainer.max_epochs", "2", *options]) == 0
    best, last = content_of("best"), content_of("last")
    assert "current_model_state" not in best  # weights only
    same = all(torch.equal(tensor, last["state_dict"][key]) for key, tensor in best["state_dict"].items())
    assert same == (best["epoch"] == last["epoch"])
    assert not all(torch.equal(t, last["current_model_state"][k]) for k, t in last["state_dict"].items())
    capsys.readouterr()
    assert cli.main(["validate"]) == 0
    measured = capsys.readouterr().out
    assert f"{best['metadata']['metrics']['val/loss']:.5f}"[:6] in measured


def test_average_is_that_of_the_weights_after_each_step(photos, monkeypatch):
    seen = []
    end = EMA.on_train_batch_end

    def note(self, trainer, pl_module, *rest):
        seen.append(next(pl_module.parameters()).detach().clone())
        end(self, trainer, pl_module, *rest)

    monkeypatch.setattr(EMA, "on_train_batch_end", note)
    assert cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.5"]) == 0
    expected = seen[0]
    for step, weights in enumerate(seen[1:], 1):
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weights
    name, tensor = next(iter(content_of("last")["state_dict"].items()))
    assert tensor.shape == expected.shape, name
    assert torch.allclose(tensor, expected, atol=1e-6)


def test_fit_leaves_no_signal_handler_and_no_thread_behind(photos, monkeypatch):
    def left():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        return handlers, {thread.name for thread in threading.enumerate()}

    before = left()
    assert cli.main([*FIT, "--trainer.max_epochs", "1"]) == 0
    assert left() == before
    monkeypatch.setattr(Classifier, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*FIT, "--trainer.max_epochs", "1"])
    assert left() == before


def test_averaged_fit_goes_on_from_its_last_checkpoint(photos):
    assert cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.9", "--model.name", "resnet18"]) == 0
    last = "runs/photos/version_0/checkpoints/last.ckpt"
    assert cli.main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert "current_model_state" in content_of("last", Path("runs/photos/version_1"))
    assert "average: 0.9" in Path("runs/photos/version_1/config.yaml").read_text()


def test_validation_that_fails_does_not_mix_up_weights_and_average(photos, monkeypatch):
    seen = []

    def fail(*_):
        raise RuntimeError("a disk fails")

    def note(self, *_):
        seen.append({key: tensor.clone() for key, tensor in self.state_dict().items()})

    on_exception = EMA.on_exception

    def swap_back(self, trainer, pl_module, exception):
        on_exception(self, trainer, pl_module, exception)
        note(pl_module)

    monkeypatch.setattr(Classifier, "validation_step", fail)
    monkeypatch.setattr(Classifier, "on_train_batch_end", note)
    monkeypatch.setattr(EMA, "on_exception", swap_back)
    with pytest.raises(RuntimeError, match="a disk fails"):
        cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.9"])
    assert not differences(seen[-1], seen[-2])


def test_fit_stops_when_the_validation_loss_no_longer_falls_and_says_so(photos, scripted, capsys):
    scripted(train=[0.5] * 9, val=[0.4, 0.5, 0.45, 0.6, 0.55, 0.6, 0.7, 0.8, 0.9])
    assert cli.main([*FIT, "--trainer.max_epochs", "9", "--patience", "2"]) == 0
    assert "stopped after epoch 6: no lower val/loss in 2 epochs" in capsys.readouterr().out
    with Path("runs/photos/version_0/metrics.csv").open() as stream:
        assert len([row for row in csv.DictReader(stream) if row["val/loss"]]) == 6
    assert content_of("best")["epoch"] == 3


# exceptions


def in_step(monkeypatch, fail):
    step = Classifier.training_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)  # statistics and sums have changed already
        if self.trainer.fit_loop.total_batch_idx == 13:
            fail()
        return loss

    monkeypatch.setattr(Classifier, "training_step", training_step)


def in_update(monkeypatch, fail):
    step, updates = torch.optim.Adam.step, []

    def half_done(self, *arguments, **options):
        result = step(self, *arguments, **options)
        updates.append(1)
        if len(updates) == 13:
            fail()
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", half_done)


def after_validation(monkeypatch, fail):
    end = EarlyStopping.on_validation_end

    def check(self, trainer, pl_module):
        end(self, trainer, pl_module)  # it counts this validation
        if trainer.current_epoch == 1:
            fail()

    monkeypatch.setattr(EarlyStopping, "on_validation_end", check)


AVERAGED = pytest.param(["--model.name", "resnet18", "--average", "0.9"], marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [[], AVERAGED])
@pytest.mark.parametrize("where", [in_step, in_update, after_validation])
def test_failed_fit_resumes_from_its_last_save_to_the_same_bits(photos, monkeypatch, where, options):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    fit = [*FIT, "--trainer.max_epochs", "3", "--patience", "3", "--save_every", "0.0001", *options]
    assert cli.main(fit) == 0
    with monkeypatch.context() as patched:
        where(patched, fail)
        with pytest.raises(torch.OutOfMemoryError):
            cli.main(fit)
    run = Path("runs/photos/version_1")
    assert 0 < content_of("last", run)["global_step"] < 20
    status = runs.read_status(run)
    assert (status["state"], status["reason"]) == ("failed", "OutOfMemoryError: CUDA out of memory")
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(run, Path("runs/photos/version_0"))


def test_best_checkpoint_is_written_with_the_last_one_and_when_a_fit_fails(photos, monkeypatch):
    in_step(monkeypatch, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*FIT, "--trainer.max_epochs", "3"])
    assert os.listdir("runs/photos/version_0/checkpoints") == ["best.ckpt"]
    assert content_of("best")["epoch"] == 0


@pytest.mark.slow
def test_full_disk_ends_the_fit_with_a_sentence_and_the_fit_goes_on_when_there_is_room(photos, monkeypatch, capsys):
    assert cli.main(FIT) == 0
    with monkeypatch.context() as patched:
        started = ProgressLines.on_train_start

        def disk_is_full(self, trainer, pl_module):
            full_disk(patched)
            started(self, trainer, pl_module)

        patched.setattr(ProgressLines, "on_train_start", disk_is_full)
        assert cli.main(FIT) == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err
    assert "fit --resume runs/photos/version_1" in captured.err
    assert "Traceback" not in captured.err
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(Path("runs/photos/version_1"), Path("runs/photos/version_0"))


@pytest.fixture
def small_disk(workplace):
    """Mounts a file system of so many KB on runs/, and gives the command that mounts it anew."""
    Path("runs").mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "runs"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")

    yield mount
    subprocess.run(["umount", "-l", "runs"], check=False)


def in_third_epoch(monkeypatch, do):
    started = ProgressLines.on_train_epoch_start

    def act(self, trainer, pl_module):
        started(self, trainer, pl_module)
        if trainer.current_epoch == 2:
            do()

    monkeypatch.setattr(ProgressLines, "on_train_epoch_start", act)


@pytest.mark.parametrize("size", [16, 40, 200, 2000, 8000, 11000])
def test_disk_of_any_size_leaves_only_whole_files_and_a_sentence(small_disk, photos, capsys, size):
    """One for the logs alone, one for part of best.ckpt, one for that and part of last.ckpt, ..."""
    small_disk(f"size={size}k")
    code = cli.main([*FIT, "--trainer.max_epochs", "3"])
    captured = capsys.readouterr()
    assert code in (1, 2)
    (sentence,) = captured.err.splitlines()
    assert "No space left on device" in sentence
    assert "Traceback" not in captured.err + captured.out
    assert not list(Path("runs").rglob("*.tmp"))
    for file in Path("runs").rglob("*.ckpt"):
        assert is_whole(file)
    for file in Path("runs").rglob("metrics.csv"):
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert all(None not in row and None not in row.values() for row in rows)
    for run in Path("runs").glob("photos/version_*"):
        EventAccumulator(str(run)).Reload()


def test_disk_that_becomes_read_only_ends_the_fit_with_a_sentence_and_it_goes_on_later(
    small_disk, photos, monkeypatch, capsys
):
    small_disk("size=100m")
    fit = [*FIT, "--trainer.max_epochs", "3", "--save_every", "0.0001"]
    assert cli.main(fit) == 0
    with monkeypatch.context() as patched:
        in_third_epoch(patched, lambda: small_disk("remount", "ro"))
        assert cli.main(fit) == 1
    captured = capsys.readouterr()
    assert "Read-only file system" in captured.err
    assert "Traceback" not in captured.err + captured.out
    run = Path("runs/photos/version_1")
    assert is_whole(run / "checkpoints" / "last.ckpt")
    small_disk("remount", "rw")
    assert cli.main(["fit", "--resume"]) == 0
    assert_the_same(run, Path("runs/photos/version_0"))
