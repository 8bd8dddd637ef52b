"""How checkpoints reach the disk: complete, with the previous one kept, and without holding up the fit."""

import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from project.errors import FailedRun
from project.models.weights import is_whole
from project.training import checkpoint_io
from project.training.checkpoint_io import AsyncCheckpointIO
from tests.conftest import full_disk


def content(value, size=1000):
    return {"state_dict": OrderedDict(a=torch.full((size,), float(value))), "n": value}


def read(file):
    return torch.load(file, weights_only=True)["n"]


@pytest.fixture
def slow(monkeypatch):
    """Holds the writing thread up until the event is set."""
    go_on, save = threading.Event(), torch.save

    def wait(*arguments):
        assert go_on.wait(20)
        save(*arguments)

    monkeypatch.setattr(checkpoint_io.torch, "save", wait)
    return go_on


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


def test_saving_returns_before_the_disk_and_holds_the_weights_of_that_moment(workplace, slow):
    saver, state = AsyncCheckpointIO(Path()), content(1)
    saver.save_checkpoint(state, "last.ckpt")
    state["state_dict"]["a"] += 1  # the next step
    assert saver.busy
    slow.set()
    saver.wait()
    assert torch.load("last.ckpt", weights_only=True)["state_dict"]["a"].unique().tolist() == [1]


def test_best_waits_in_memory_for_the_last_and_holds_no_training_state(workplace):
    saver = AsyncCheckpointIO(Path())
    for number in range(3):
        saver.save_checkpoint(
            content(number) | {"optimizer_states": [1], "MixedPrecision": {"scale": 2.0}}, Path("best.ckpt").resolve()
        )
    saver.wait()
    assert os.listdir() == []
    save(saver, 5)
    assert {name: read(name) for name in os.listdir()} == {"best.ckpt": 2, "last.ckpt": 5}
    assert torch.load("best.ckpt", weights_only=True).keys() == {"state_dict", "n"}
    saver.save_checkpoint(content(7), Path("best.ckpt").resolve())
    saver.teardown()
    assert read("best.ckpt") == 7


def test_copy_is_equal_in_shape_strides_type_and_value():
    tensors = [
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(7, 9).T,
        torch.randn(5).bfloat16(),
        torch.tensor(3),
        torch.zeros(0),
        torch.randn(1, 8).expand(4, 8),
        torch.arange(9) > 4,
    ]
    state = OrderedDict((str(n), tensor) for n, tensor in enumerate(tensors))
    state._metadata = {"": {"version": 2}}
    made = checkpoint_io.on_cpu({"state_dict": state, "rest": [1, ("a", {"b": torch.ones(2)})]})
    assert made["state_dict"]._metadata == state._metadata
    assert made["rest"][1][1]["b"].tolist() == [1, 1]
    for one, two in zip(tensors, made["state_dict"].values(), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.stride() == two.stride() or one.stride()[0] == 0
        assert torch.equal(one, two)
        assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr() or not one.numel()


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


def test_removed_checkpoint_does_not_come_back(workplace, slow):
    saver = AsyncCheckpointIO(Path())
    saver.save_checkpoint(content(1), "mine.ckpt")
    threading.Timer(0.2, slow.set).start()
    saver.remove_checkpoint("mine.ckpt")
    saver.wait()
    assert os.listdir() == []


def test_weights_at_rest_are_not_copied_and_are_on_the_disk_at_once(workplace, monkeypatch):
    saver, state, written = AsyncCheckpointIO(Path()), content(1), []
    monkeypatch.setattr(checkpoint_io.torch, "save", lambda content, _: written.append(content))
    with saver.weights_at_rest():
        saver.save_checkpoint(state, "last.ckpt")
    (same,) = written
    assert same["state_dict"]["a"].data_ptr() == state["state_dict"]["a"].data_ptr()
    saver.save_checkpoint(state, "last.ckpt")
    saver.wait()
    assert written[1]["state_dict"]["a"].data_ptr() != state["state_dict"]["a"].data_ptr()


SIZES = [0, 1, mmap.PAGESIZE, 2048 * mmap.PAGESIZE - 1, 2048 * mmap.PAGESIZE, 2**23 + 2**22 + 7]


@pytest.mark.parametrize("folder", [".", "/dev/shm"], ids=["disk", "memory"])
@pytest.mark.parametrize("refuses", [False, True], ids=["direct", "through the page cache"])
def test_direct_file_holds_the_bytes_that_were_written(workplace, monkeypatch, folder, refuses):
    if refuses:  # as a file system without direct writes does
        monkeypatch.setattr(os, "O_DIRECT", 1 << 29, raising=False)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for size in SIZES:
            stream, parts = checkpoint_io.DirectFile(Path(place, "file")), [os.urandom(size), b"abc", os.urandom(size)]
            for part in parts:
                assert stream.write(memoryview(part)) == len(part)
            stream.finish()
            stream.close()
            assert Path(place, "file").read_bytes() == b"".join(parts)
