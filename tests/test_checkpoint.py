import contextlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from project import checkpoint, cli, files, load
from project.data import images
from project.errors import UserError


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_loaded_checkpoint_predicts_what_the_network_computed(at_trained):
    predictor = load(at_trained)
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    weights = predictor.network.state_dict()
    assert all(torch.equal(content["state_dict"][f"network.{key}"], value) for key, value in weights.items())
    paths = sorted(Path("photos").rglob("*.png"))[:5]
    image = torch.from_numpy(np.stack([images.read(p, 32) for p in paths])).permute(0, 3, 1, 2)
    expected = predictor.network(image).softmax(1).max(1)
    made = predictor.predict(paths)
    assert [p.probability for p in made] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [p.label for p in made] == [predictor.class_names[c] for c in expected.indices.tolist()]


def test_order_is_kept_and_unreadable_pictures_have_their_place(at_trained, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"")
    paths = ["photos/red/000.png", str(tmp_path / "bad.jpg"), "photos/blue/000.png", "nowhere.png"]
    made = load(at_trained).predict(paths, batch_size=3)
    assert [p.path for p in made] == paths
    assert [bool(p.error) for p in made] == [False, True, False, True]
    assert made[3].error == "no such file or directory"


def test_a_run_folder_or_nothing_stand_for_the_best_checkpoint(at_trained):
    assert load().metadata == load(at_trained).metadata == load(at_trained / "checkpoints" / "best.ckpt").metadata


def refusal(path):
    with pytest.raises(UserError) as caught:
        checkpoint.read(Path(path))
    assert not Path("executed").exists()
    return str(caught.value)


def test_pickled_code_is_refused_and_never_executed(workplace):
    torch.save({"metadata": {}, "trap": Trap()}, "new.ckpt")
    torch.save({"trap": Trap()}, "old.ckpt", _use_new_zipfile_serialization=False)
    Path("plain.ckpt").write_bytes(pickle.dumps(Trap()))
    for name in ("new.ckpt", "old.ckpt", "plain.ckpt"):
        assert name in refusal(name)


def test_files_that_are_no_checkpoints_are_refused(workplace):
    Path("text.ckpt").write_text("hello")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, "other.ckpt")  # another project's
    torch.save(torch.zeros(3), "tensor.ckpt")
    torch.save({"metadata": "no dictionary"}, "types.ckpt")
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "x")
    for name in ("text.ckpt", "empty.ckpt", "other.ckpt", "tensor.ckpt", "types.ckpt", "zip.ckpt"):
        assert name in refusal(name)


def test_truncated_checkpoint_is_refused(at_trained, tmp_path, monkeypatch):
    whole = (at_trained / "checkpoints" / "best.ckpt").read_bytes()
    monkeypatch.chdir(tmp_path)
    for share in (0.1, 0.5, 0.99):
        Path("cut.ckpt").write_bytes(whole[: int(len(whole) * share)])
        assert "cut.ckpt" in refusal("cut.ckpt")


def huge(_):
    """A tensor of 10^15 numbers, in a storage that has four."""
    tensor = torch.zeros(4)
    return torch.as_strided(tensor, (10**15,), (0,))


BROKEN = {
    "no class names": {"class_names": None},
    "numbers for names": {"class_names": [1, 2, 3]},
    "a name twice": {"class_names": ["a", "a", "b"]},
    "a huge picture": {"image_size": 10**9},
    "a picture of no size": {"image_size": 0},
    "a truth for a size": {"image_size": True},
    "an unknown way to resize": {"resize": "../../etc"},
    "a mean that is none": {"mean": [0.5, float("nan"), 0.5]},
    "no deviation": {"std": [0.0, 0.0, 0.0]},
    "another network": {"model": "resnet18"},
    "no such network": {"model": "os.system"},
    "a bare configuration": {"config": {"data": {}}},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_checkpoint_that_says_nonsense_of_itself_is_refused_in_a_sentence(at_trained, tmp_path, refused, change):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"] |= change
    torch.save(content, tmp_path / "odd.ckpt")
    sentence = refused("predict", str(tmp_path / "odd.ckpt"), "photos/red", "--out", str(tmp_path / "out.csv"))
    assert "odd.ckpt" in sentence or "os.system" in sentence
    assert not (tmp_path / "out.csv").exists()


FOREIGN = {
    "weights of another shape": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): torch.zeros(3)}),
    "weights that are none": lambda c: c.update(state_dict={"a": 1}),
    "a weight of huge size": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): huge(c)}),
    "no counters": lambda c: c.update(loops={}),
    "a place before the start": lambda c: c["place"]["at"].update(epoch=-1),
    "a place of words": lambda c: c["place"]["at"].update(total="many"),
    "no place": lambda c: c["place"].update(at=None),
    "moments of another shape": lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(2)),
    "no moments": lambda c: c.update(optimizer_states=[{"state": {}, "param_groups": []}]),
    "callbacks that are none": lambda c: c.update(callbacks={"Watcher": 7}),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_last_checkpoint_that_is_broken_or_made_up_is_refused_in_a_sentence(trained, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "photos"):
        shutil.copytree(trained / name, name, symlinks=True)
    run = Path("runs/photos/version_0")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    change(content)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "checkpoints" / "previous.ckpt").unlink()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["fit", "--resume", str(run), "--trainer.max_epochs", "4"]) == 2
    assert len(said.getvalue().splitlines()) == 1, said.getvalue()
    assert "last.ckpt" in said.getvalue() or "The checkpoint is damaged" in said.getvalue()
    assert not Path("executed").exists()


def test_flipped_bit_anywhere_in_the_content_is_noticed(at_trained, tmp_path):
    whole = (at_trained / "checkpoints" / "best.ckpt").read_bytes()
    with zipfile.ZipFile(at_trained / "checkpoints" / "best.ckpt") as archive:
        records = [(record.header_offset, record.file_size) for record in archive.infolist()]
    for header, size in records:
        content = header + 30 + sum(struct.unpack_from("<HH", whole, header + 26))  # after its name and padding
        spoilt = bytearray(whole)
        spoilt[content + size // 2] ^= 4
        (tmp_path / "spoilt.ckpt").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"spoilt\.ckpt is damaged"):
            checkpoint.read(tmp_path / "spoilt.ckpt")


def test_weights_of_another_shape_are_refused(at_trained, tmp_path):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"]["class_names"].append("a fourth")
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path / "odd.ckpt")


def test_missing_checkpoint_says_so(workplace):
    with pytest.raises(UserError, match=r"no checkpoint nope\.ckpt"):
        load("nope.ckpt")


def test_file_is_replaced_whole_or_not_at_all(workplace):
    target = Path("a.csv")
    with files.replacing(target) as stream:
        stream.write("first")
    with pytest.raises(TypeError), files.replacing(target) as stream:
        stream.writelines(["second, and then", 0])
    assert target.read_text() == "first"
    assert os.listdir() == ["a.csv"]


@pytest.mark.slow
def test_loading_and_predicting_import_no_lightning(trained):
    code = (
        "import sys; from project import load; load().predict(['photos/red/000.png']); "
        "sys.exit('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=trained, check=False).returncode == 0
