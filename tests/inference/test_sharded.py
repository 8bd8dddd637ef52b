"""Sharded checkpoints, written by torch.distributed.checkpoint in two processes: read whole on one CPU, and safely."""

import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint as shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from project import cli, load
from project.errors import UserError
from tests.conftest import read_csv

RUN = Path("runs/photos/version_0")


def write(rank, folder, source):
    """As Lightning's FSDPStrategy writes a checkpoint: weights and optimizer in shards, all else in meta.pt."""
    distributed.init_process_group("gloo", f"file://{folder}.store", rank=rank, world_size=2)
    mesh, content = init_device_mesh("cpu", (2,)), torch.load(source, weights_only=True)
    weights = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor
        for name, tensor in content.pop("state_dict").items()
    }
    optimizer = {"state": {"0": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    shards.save({"model": weights, "optimizer_0": optimizer}, checkpoint_id=folder)
    if rank == 0:
        torch.save(content, Path(folder, "meta.pt"))
    distributed.destroy_process_group()


@pytest.fixture
def sharded(trained, tmp_path, monkeypatch):
    """A sharded copy of a run's best.ckpt, beside it."""
    shutil.copytree(trained, tmp_path / "it")
    monkeypatch.chdir(tmp_path / "it")
    folder = RUN / "checkpoints" / "sharded.ckpt"
    torch.multiprocessing.spawn(write, (str(folder.resolve()), str(RUN / "checkpoints" / "best.ckpt")), 2)
    assert len(list(folder.glob("*.distcp"))) == 2
    return folder


@pytest.mark.slow
def test_sharded_checkpoint_predicts_and_exports_what_the_whole_one_does_and_code_in_it_is_refused(sharded, capsys):
    assert cli.main(["predict", str(RUN), "photos", "--out", "whole.csv"]) == 0
    assert cli.main(["predict", str(sharded), "photos", "--out", "sharded.csv"]) == 0
    assert read_csv(Path("sharded.csv")) == read_csv(Path("whole.csv"))
    assert cli.main(["export", str(sharded), "--out", "bundle"]) == 0
    assert load("bundle").class_names == load(sharded).class_names
    for verb in ("test", "report"):
        capsys.readouterr()
        assert cli.main([verb, str(sharded)]) == 2
        command = capsys.readouterr().err.strip().rpartition(": ")[2]
        assert command == f"python -m lightning.pytorch.utilities.consolidate_checkpoint {sharded}"
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    assert cli.main(["test", f"{sharded}.consolidated"]) == 0

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    for name, content in ((".metadata", pickle.dumps(Evil())), (".metadata", b""), ("meta.pt", pickle.dumps(Evil()))):
        shutil.copytree(sharded, "copy")
        Path("copy", name).write_bytes(content)
        with pytest.raises(UserError, match="copy is damaged, is not a sharded checkpoint, or holds code"):
            load("copy")
        shutil.rmtree("copy")
    for shard in sharded.glob("*.distcp"):
        shard.unlink()
    assert cli.main(["predict", str(sharded), "photos"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not Path("ran").exists()
