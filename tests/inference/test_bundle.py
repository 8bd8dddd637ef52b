"""A bundle is read without torch, and a damaged or fabricated one is refused in a sentence."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from project import load
from project.errors import UserError
from project.inference import bundle
from project.inference.load import locate
from project.inference.metadata import Metadata

IMAGE = "photos/red/000.png"


def load_network(path):
    return locate(path).load_network()


LOADERS = (load, load_network)


@pytest.fixture
def copy(packed, at_trained, tmp_path):
    """A bundle that the test may change."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def put(folder, name, content):
    """Replaces a file, with correct sums: a fabricated bundle."""
    (folder / name).write_bytes(content)
    contents = {part: (folder / part).read_bytes() for part in bundle.PARTS if (folder / part).exists()}
    sums = [f"{hashlib.sha256(content).hexdigest()}  {part}\n" for part, content in contents.items()]
    (folder / "SHA256SUMS").write_text("".join(sums))


def change(folder, **values):
    put(folder, "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | values).encode())


def refusal(folder, loader=load):
    with pytest.raises(UserError) as caught:
        loader(folder).predict([IMAGE])
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    return sentence


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json", "README.md"])
def test_damaged_file_is_named_by_every_loader(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for loader in LOADERS:
        assert f"copy/{name} is damaged" in refusal(copy, loader)


def test_missing_file_is_named_unless_the_loader_does_not_need_it(copy):
    needed = (("model.onnx", load), ("model.safetensors", load_network), ("config.json", load), ("SHA256SUMS", load))
    for name, loader in needed:
        (copy / name).rename(copy / "away")
        assert f"has no {name}; copy the whole bundle" in refusal(copy, loader)
        (copy / "away").rename(copy / name)
    (copy / "model.safetensors").unlink()
    (copy / "README.md").unlink()
    assert load(copy).predict([IMAGE])[0].label == "red"


def test_damaged_sums_and_a_configuration_that_is_none_are_refused(copy):
    change(copy, image_size=None)
    for loader in LOADERS:
        assert "config.json is not the configuration of a bundle: its image_size is not" in refusal(copy, loader)
    for text in (b"[]", b"7", b"{", b"", b"[" * 100_000, b"\x00"):
        put(copy, "config.json", text)
        assert "config.json" in refusal(copy)
    for text in (b"", b"nonsense\n", b"0  ../../etc/passwd\n", b"\x00" * 9, b"0  config.json\n", b"\xff\xfe\xfa"):
        (copy / "SHA256SUMS").write_bytes(text)
        assert "SHA256SUMS is damaged" in refusal(copy)


def test_configuration_that_contradicts_the_model_is_refused(copy):
    names = ["blue", "green", "red"]
    wrong = {"class_names": ["blue", "green", "yellow"], "image_size": 64, "resize": "crop"}
    for key, value in [*wrong.items(), ("class_names", [*names, "violet"])]:
        change(copy, **{"class_names": names, "image_size": 32, "resize": "stretch", key: value})
        assert "model.onnx and config.json beside it contradict each other" in refusal(copy)
    assert "does not fit" in refusal(copy, load_network)


def constant_network(image="uint8[batch,32,32,3]", classes=3, softmax="Softmax", **texts):
    """A model.onnx that gives all classes the same probability: the softmax of zeros."""
    metadata = Metadata("x", ["blue", "green", "red"], 32, "stretch", [0.5] * 3, [0.5] * 3, {})
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "evil": 1]>
        constant ({image} image) => (float[batch,{classes}] probabilities)
        <float[3,{classes}] zeros = {{{",".join(["0"] * 3 * classes)}}}, int64[2] axes = {{1,2}}>
        {{
            numbers = Cast<to=1>(image)
            colour = ReduceMean<keepdims=0>(numbers, axes)
            nothing = MatMul(colour, zeros)
            probabilities = {softmax}(nothing)
        }}""")
    onnx.helper.set_model_props(model, bundle.properties(metadata) | texts)
    return model


def test_any_model_that_keeps_the_contract_is_accepted_and_others_are_refused_in_a_sentence(copy):
    put(copy, "model.onnx", constant_network().SerializeToString())
    (prediction,) = load(copy).predict([IMAGE])
    assert prediction.probabilities == pytest.approx([1 / 3] * 3, abs=1e-6)
    for options, message in (
        ({"image": "float[batch,32,32,3]"}, "contradict each other"),
        ({"image": "uint8[batch,48,48,3]"}, "contradict each other"),
        ({"classes": 4}, "contradict each other"),
        ({"image": "uint8[2,32,32,3]"}, "model.onnx fails on an image"),
        ({"softmax": "evil.Softmax"}, "model.onnx cannot be used"),
    ):
        put(copy, "model.onnx", constant_network(**options).SerializeToString())
        assert message in refusal(copy)
    for content in (b"", b"not a model", os.urandom(5000), constant_network().SerializeToString()[:-300]):
        put(copy, "model.onnx", content)
        assert "model.onnx" in refusal(copy)
    for key in ("preprocess", "class_names"):
        for value in ("", "nonsense", "[" * 100_000):
            put(copy, "model.onnx", constant_network(**{key: value}).SerializeToString())
            assert "contradict each other" in refusal(copy)


@pytest.mark.parametrize("location", ["weights.bin", "../secret.bin", "{here}/secret.bin", "model.safetensors"])
def test_external_weights_are_never_read(copy, location):
    for file in (copy / "weights.bin", copy.parent / "secret.bin"):
        file.write_bytes(np.ones((3, 3), np.float32).tobytes())
    model = constant_network()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "zeros")
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location.format(here=copy.parent)), ("offset", "0"), ("length", "36")):
        weight.external_data.add(key=key, value=value)
    put(copy, "model.onnx", model.SerializeToString())
    assert "model.onnx cannot be used" in refusal(copy)


def test_weights_that_do_not_fit_are_refused(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    for message, content in {
        "does not fit": safetensors.torch.save(weights | {next(iter(weights)): torch.zeros(2)}),
        "holds no weights": safetensors.torch.save({}),
        "model.safetensors is damaged": b"\xff" * 100,
    }.items():
        put(copy, "model.safetensors", content)
        assert message in refusal(copy, load_network)


def test_bundle_computes_with_the_given_threads(packed):
    for threads in (1, 2):
        options = bundle.OnnxPredictor(packed, threads=threads)._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_link_to_a_bundle_is_a_bundle_and_a_part_is_not(copy, refused):
    link = copy.with_name("link")
    link.symlink_to(copy)
    assert load(link).predict([IMAGE])[0].label == "red"
    for name in ("model.onnx", "model.safetensors", "config.json"):
        expected = f"{copy / name} is a part of a bundle; give the folder, {copy}."
        assert refused("predict", str(copy / name), IMAGE, "--out", "x.csv") == expected


def test_paths_that_cannot_be_read_are_refused_in_a_sentence(copy, refused):
    for verb in (["predict", "x" * 300, IMAGE, "--out", "x.csv"], ["report", "x" * 300], ["serve", "x" * 300]):
        assert "File name too long" in refused(*verb)
    copy.chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything
        assert "Permission denied" in refusal(copy)
    finally:
        os.seteuid(user)
        copy.chmod(0o700)


def test_predicting_from_a_bundle_needs_no_torch_and_other_verbs_name_it(packed, at_trained, tmp_path):
    """As in a container that has only what a bundle needs."""
    out = [IMAGE, "--out", str(tmp_path / "x.csv")]
    lines = {
        "needs torch; without it, predict and serve take bundles": ["predict", str(at_trained), *out],
        "There is no checkpoint": ["predict", str(tmp_path / "nothing"), *out],
        "best.ckpt needs torch": ["serve", str(at_trained)],
    }
    code = f"""if True:
        import sys
        sys.modules['torch'] = None
        from project import cli
        assert [cli.main(words) for words in {list(lines.values())}] == [2] * {len(lines)}
        assert cli.main({["predict", str(packed), *out]}) == 0
        heavy = {{'torchvision', 'lightning', 'matplotlib', 'onnx', 'scipy'}} & set(sys.modules)
        assert not heavy, heavy"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = list(filter(None, done.stderr.splitlines()))  # rich before 14.3 ends a hidden bar with an empty line
    assert len(said) == len(lines), done.stderr
    for line, reason in zip(said, lines, strict=True):
        assert reason in line
    assert ",red," in (tmp_path / "x.csv").read_text()
