"""A bundle is read without torch, and one that is damaged or made up is refused in a sentence."""

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
from onnx import TensorProto, helper

from project import bundle, checkpoint, load
from project.errors import UserError

PICTURE = "photos/red/000.png"


@pytest.fixture
def copy(packed, at_trained, tmp_path):
    """A bundle to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def resealed(folder):
    """As someone would who makes up a bundle: the sums are right."""
    bundle.seal(folder, json.loads((folder / "config.json").read_text()))


def refusal(folder, way=load):
    with pytest.raises(UserError) as caught:
        way(folder).predict([PICTURE])
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    return sentence


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json", "README.md"])
def test_damaged_file_is_named_whoever_loads(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for way in (load, checkpoint.load):
        assert f"copy/{name} is damaged" in refusal(copy, way)


def test_missing_file_is_named(packed, at_trained, tmp_path):
    for name, way in {
        "SHA256SUMS": load,
        "config.json": load,
        "model.onnx": load,
        "model.safetensors": checkpoint.load,
    }.items():
        folder = Path(shutil.copytree(packed, tmp_path / name))
        (folder / name).unlink()
        assert f"has no {name}" in refusal(folder, way)


def test_what_a_reader_does_not_need_may_be_left_out(copy):
    (copy / "model.safetensors").unlink()
    (copy / "README.md").unlink()
    assert load(copy).predict([PICTURE])[0].label == "red"


def test_sums_that_are_none_are_refused(copy):
    for text in ("", "nonsense\n", f"{'0' * 64}  ../../etc/passwd\n", "\x00" * 9, f"{'0' * 64}  config.json\n"):
        (copy / "SHA256SUMS").write_text(text)
        assert "SHA256SUMS is damaged" in refusal(copy)
    (copy / "SHA256SUMS").write_bytes(b"\xff\xfe\xfa")
    assert "SHA256SUMS is not text" in refusal(copy)


NONSENSE = {
    "no class names": {"class_names": None},
    "a name twice": {"class_names": ["a", "a", "b"]},
    "a huge picture": {"image_size": 10**9},
    "a size in words": {"image_size": "32"},
    "an unknown way to resize": {"resize": "../../etc"},
    "a way to resize that is a list": {"resize": ["crop"]},
    "no deviation": {"std": [0.0, 0.0, 0.0]},
    "a mean that is none": {"mean": [0.5, "x", 0.5]},
    "a bare configuration": {"config": {"data": {}}},
    "a root that is a number": {"config": {"data": {"root": 7}, "model": {}, "trainer": {}}},
    "a list of versions": {"versions": ["2.14"]},
    "a name that is half a letter": {"class_names": ["blue", "green", "\ud800"]},
    "no temperature": {"temperature": 0.0},
    "a temperature in words": {"temperature": "warm"},
    "calibrated perhaps": {"calibrated": "perhaps"},
}


@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
def test_configuration_that_is_nonsense_is_refused_in_a_sentence(copy, change):
    bundle.seal(copy, json.loads((copy / "config.json").read_text()) | change)
    (key,) = change
    for way in (load, checkpoint.load):
        assert f"config.json is not the configuration of a bundle: its {key} is not" in refusal(copy, way)


@pytest.mark.parametrize("text", ["[]", "7", "{", "", "[" * 100_000, "\x00"])
def test_configuration_that_is_no_object_is_refused(copy, text):
    resealed(copy)
    (copy / "config.json").write_text(text)
    lines = [f"{bundle._sum(copy / name)}  {name}\n" for name in ("model.onnx", "model.safetensors", "config.json")]
    (copy / "SHA256SUMS").write_text("".join(lines))
    assert "config.json" in refusal(copy)


DISAGREE = {
    "a class more": {"class_names": ["blue", "green", "red", "violet"]},
    "other classes": {"class_names": ["blue", "green", "yellow"]},
    "another size": {"image_size": 64},
    "another way to resize": {"resize": "crop"},
}


@pytest.mark.parametrize("change", DISAGREE.values(), ids=DISAGREE)
def test_configuration_that_is_not_the_models_is_refused(copy, change):
    bundle.seal(copy, json.loads((copy / "config.json").read_text()) | change)
    sentence = refusal(copy)
    assert "model.onnx" in sentence
    assert "config.json beside it" in sentence
    if len(change.get("class_names", [])) == 4:
        assert "does not fit" in refusal(copy, checkpoint.load)


def network_that_says(batch="batch", takes=TensorProto.UINT8, side=32, classes=3, domain="", weight=None):
    """A model.onnx that always answers the same: sums of the picture times nothing, plus a third."""
    shape = [batch, side, side, 3]
    third = weight or helper.make_tensor("third", TensorProto.FLOAT, [classes], [1 / classes] * classes)
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT, [1, classes], [0.0] * classes)
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    column = helper.make_tensor("column", TensorProto.INT64, [2], [-1, 1])
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float", "axes"], ["sum"], keepdims=0),
        helper.make_node("Reshape", ["sum", "column"], ["sums"]),
        helper.make_node("MatMul", ["sums", "zeros"], ["nothing"]),
        helper.make_node("Add", ["nothing", "third"], ["probabilities"], domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("image", takes, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, classes])],
        [third, zeros, axes, column],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    names = ["blue", "green", "red"]
    preprocess = {"image_size": 32, "resize": "stretch", "layout": "NHWC"}
    helper.set_model_props(model, {"preprocess": json.dumps(preprocess), "class_names": json.dumps(names)})
    return model


def outside(location):
    weight = helper.make_tensor("third", TensorProto.FLOAT, [3], [0.0] * 3)
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        weight.external_data.add(key=key, value=value)
    return weight


def put(model, folder):
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resealed(folder)


def test_a_model_of_anyones_that_keeps_the_contract_is_taken(copy):
    put(network_that_says(), copy)
    (made,) = load(copy).predict([PICTURE])
    assert made.probabilities == pytest.approx([1 / 3] * 3)


HOSTILE = {
    "floats": (lambda: network_that_says(takes=TensorProto.FLOAT), "does not map pictures of 32 pixels"),
    "another size": (lambda: network_that_says(side=48), "does not map pictures of 32 pixels"),
    "a class more": (lambda: network_that_says(classes=4), "to 3 probabilities"),
    "one batch size": (lambda: network_that_says(batch=2), "takes batches of 2 only"),
    "an operation of its own": (lambda: network_that_says(domain="evil"), "cannot be used"),
}


@pytest.mark.parametrize(("model", "said"), HOSTILE.values(), ids=HOSTILE)
def test_model_that_breaks_the_contract_is_refused_in_a_sentence(copy, model, said):
    put(model(), copy)
    assert said in refusal(copy)


@pytest.mark.parametrize("location", ["weights.bin", "../secret.bin", "{here}/secret.bin", "model.safetensors"])
def test_weights_in_other_files_are_never_read(copy, location):
    for file in (copy / "weights.bin", copy.parent / "secret.bin"):
        file.write_bytes(np.ones(3, np.float32).tobytes())
    put(network_that_says(weight=outside(location.format(here=copy.parent))), copy)
    assert "model.onnx cannot be used" in refusal(copy)


@pytest.mark.parametrize("key", ["preprocess", "class_names"])
def test_model_without_metadata_is_refused(copy, key):
    model = onnx.load(copy / "model.onnx")
    for value in (None, "nonsense", "[" * 100_000):
        kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
        helper.set_model_props(model, kept | ({key: value} if value else {}))
        put(model, copy)
        assert f"do not say the same of {key}" in refusal(copy)


def test_model_that_is_no_model_is_refused(copy):
    for content in (b"", b"no model at all", os.urandom(5000), (copy / "model.onnx").read_bytes()[:-5000]):
        (copy / "model.onnx").write_bytes(content)
        resealed(copy)
        assert "model.onnx cannot be used" in refusal(copy)


def test_weights_of_another_shape_or_none_are_refused(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    first = next(iter(weights))
    for content in (weights | {first: torch.zeros(2)}, {}, {"a": torch.zeros(2)}):
        safetensors.torch.save_file(content, copy / "model.safetensors")
        resealed(copy)
        assert "does not fit" in refusal(copy, checkpoint.load)
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)
    resealed(copy)
    assert "model.safetensors is damaged" in refusal(copy, checkpoint.load)


def test_bundle_computes_on_the_cpu_with_as_many_threads_as_asked(packed, at_trained):
    assert load(packed, device="cpu").predict([PICTURE])[0].label == "red"
    with pytest.raises(UserError, match="computes on the CPU"):
        load(packed, device="cuda")
    for threads in (1, 2):
        made = bundle.Bundle(packed, threads=threads)
        options = made._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_verb_predict_names_what_a_bundle_lacks(copy, refused):
    (copy / "SHA256SUMS").unlink()
    assert "copy the whole bundle" in refused("predict", str(copy), PICTURE, "--out", "x.csv")


def test_part_of_a_bundle_is_not_taken_for_it(copy, refused):
    for name in ("model.onnx", "model.safetensors", "config.json"):
        said = refused("predict", str(copy / name), PICTURE, "--out", "x.csv")
        assert said == f"{copy / name} is a part of a bundle; give the folder, {copy}."


def test_link_to_a_bundle_is_a_bundle(copy):
    link = copy.with_name("link")
    link.symlink_to(copy)
    assert load(link).predict([PICTURE])[0].label == "red"


def test_path_that_is_too_long_is_refused_in_a_sentence(at_trained, refused):
    for verb in (["predict", "x" * 300, PICTURE, "--out", "x.csv"], ["report", "x" * 300], ["serve", "x" * 300]):
        assert "File name too long" in refused(*verb)


def test_folder_that_may_not_be_looked_into_is_refused_in_a_sentence(copy):
    copy.chmod(0o700)
    if is_root := os.geteuid() == 0:  # whom nothing is forbidden
        os.seteuid(65534)
    else:
        copy.chmod(0)
    try:
        assert "Permission denied" in refusal(copy)
    finally:
        if is_root:
            os.seteuid(0)
        copy.chmod(0o700)


def test_without_torch_a_checkpoint_is_refused_in_a_sentence(packed, at_trained, tmp_path):
    """As in a container that has only what a bundle needs."""
    code = "import sys; sys.modules['torch'] = None; from project import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parent.parent)}
    for words, reason in (
        (["predict", str(at_trained)], "is a checkpoint, which needs torch"),
        (["predict", str(tmp_path / "nothing")], "no checkpoint"),
        (["serve", str(at_trained)], "is a checkpoint, which needs torch"),
        (["predict", str(packed), "--devices", "2"], "--devices needs torch"),
    ):
        more = [PICTURE, "--out", str(tmp_path / "x.csv")] if words[0] == "predict" else []
        arguments = [words[0], words[1], *more, *words[2:]]
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert reason in done.stderr


def test_predicting_from_a_bundle_imports_no_torch(packed, at_trained, tmp_path):
    out = tmp_path / "x.csv"
    code = (
        "import sys; from project import cli; "
        f"code = cli.main(['predict', {str(packed)!r}, {PICTURE!r}, '--out', {str(out)!r}]); "
        "heavy = {'torch', 'torchvision', 'lightning', 'matplotlib', 'onnx', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    root = str(Path(bundle.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ",red," in out.read_text()
