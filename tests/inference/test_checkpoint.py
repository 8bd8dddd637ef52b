"""Checkpoints load without executing code; damaged and foreign ones are refused in a sentence."""

import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from project import load
from project.data import images
from project.errors import UserError
from project.inference import checkpoint


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_loaded_checkpoint_predicts_what_the_network_computes(at_trained):
    predictor = load(at_trained)
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    weights = predictor.network.state_dict()
    assert all(torch.equal(content["state_dict"][f"network.{key}"], value) for key, value in weights.items())
    paths = sorted(Path("photos").rglob("*.png"))[:5]
    image = torch.from_numpy(np.stack([images.read(p, 32) for p in paths])).permute(0, 3, 1, 2)
    expected = predictor.network(image).softmax(1).max(1)
    predictions = [predictor.predict([path])[0] for path in paths]  # the same in any batch
    assert [p.probability for p in predictions] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [p.label for p in predictions] == [predictor.class_names[c] for c in expected.indices.tolist()]
    assert load().metadata == predictor.metadata  # without a path, the newest run


def refusal(path, reader=checkpoint.read):
    with pytest.raises(UserError) as caught:
        reader(Path(path))
    assert not Path("executed").exists()
    return str(caught.value)


def test_run_whose_network_is_no_longer_in_the_code_is_told_so(at_trained, tmp_path, refused):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"]["model"] = content["metadata"]["config"]["model"]["name"] = "mine"
    torch.save(content, file := tmp_path / "old.ckpt")
    for words in (["predict", str(file), "photos"], ["validate", str(file), "--data.root", "photos"]):
        assert refused(*words).startswith(f"The network mine of {file} is no longer in the code")


def test_files_that_hold_code_or_are_not_checkpoints_are_refused(workplace):
    torch.save({"metadata": {}, "trap": Trap()}, "new.ckpt")
    torch.save({"trap": Trap()}, "old.ckpt", _use_new_zipfile_serialization=False)
    Path("plain.ckpt").write_bytes(pickle.dumps(Trap()))
    Path("text.ckpt").write_text("hello")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, "other.ckpt")  # another project's
    torch.save(torch.zeros(3), "tensor.ckpt")
    torch.save({"metadata": "no dictionary"}, "types.ckpt")
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "x")
    for file in Path().glob("*.ckpt"):
        assert str(file) in refusal(file)
    assert "no checkpoint nope.ckpt" in refusal("nope.ckpt", load)


def test_damaged_checkpoint_is_refused(at_trained, tmp_path):
    """Truncated anywhere, or with one bit changed anywhere in its content."""
    whole, file = (at_trained / "checkpoints" / "best.ckpt").read_bytes(), tmp_path / "damaged.ckpt"
    damaged = [whole[: int(len(whole) * share)] for share in (0.1, 0.5, 0.99)]
    with zipfile.ZipFile(at_trained / "checkpoints" / "best.ckpt") as archive:
        records = [(record.header_offset, record.file_size) for record in archive.infolist()]
    for header, size in records:
        content = header + 30 + sum(struct.unpack_from("<HH", whole, header + 26))  # after its name and padding
        damaged.append(bytearray(whole))
        damaged[-1][content + size // 2] ^= 4
    for content in damaged:
        file.write_bytes(content)
        assert "damaged.ckpt is damaged" in refusal(file)


def test_checkpoint_with_wrong_metadata_is_refused(at_trained, tmp_path):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    for key, value, message in (
        ("image_size", 10**9, "odd.ckpt is not a checkpoint of this project: its image_size is not"),
        ("model", "resnet18", "odd.ckpt does not fit the network resnet18"),
        ("model", "os.system", "The network os.system"),
        ("class_names", ["blue", "green", "red", "a fourth"], "odd.ckpt does not fit"),
    ):
        torch.save(content | {"metadata": content["metadata"] | {key: value}}, tmp_path / "odd.ckpt")
        assert message in refusal(tmp_path / "odd.ckpt", load)


def change_first(content, value):
    content["state_dict"][next(iter(content["state_dict"]))] = value


FOREIGN = {
    "weights of another shape": lambda c: change_first(c, torch.zeros(3)),
    "weights that are numbers": lambda c: c.update(state_dict={"a": 1}),
    "a weight of huge size": lambda c: change_first(c, torch.as_strided(torch.zeros(4), (10**15,), (0,))),
    "no counters": lambda c: c.update(loops={}),
    "a negative epoch": lambda c: c["loop_state"]["at"].update(epoch=-1),
    "a position in words": lambda c: c["loop_state"]["at"].update(total="many"),
    "no position": lambda c: c["loop_state"].update(at=None),
    "moments of another shape": lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(2)),
    "no moments": lambda c: c.update(optimizer_states=[{"state": {}, "param_groups": []}]),
    "callbacks without state": lambda c: c.update(callbacks={"Diagnostics": 7}),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_last_checkpoint_that_is_broken_or_made_up_is_refused_in_a_sentence(
    trained, tmp_path, monkeypatch, refused, change
):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    last = Path("runs/photos/version_0/checkpoints/last.ckpt")
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    sentence = refused("fit", "--resume", str(last.parents[1]), "--trainer.max_epochs", "4")
    assert "last.ckpt" in sentence or "The checkpoint is damaged" in sentence
