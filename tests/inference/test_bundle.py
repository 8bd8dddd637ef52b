"""A bundle is read without torch, and a damaged or fabricated one is refused in a sentence."""

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

from project import load
from project.errors import UserError
from project.inference import bundle
from project.inference.load import load_network

IMAGE = "photos/red/000.png"
LOADERS = (load, load_network)


@pytest.fixture
def copy(packed, at_trained, tmp_path):
    """A bundle that the test may change."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def change(folder, **values):
    """Changes config.json, with correct sums: a fabricated bundle."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    bundle.write_sums(folder)


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


def test_missing_file_is_named(copy, refused):
    for name, loader in (("model.onnx", load), ("model.safetensors", load_network), ("config.json", load)):
        (copy / name).rename(copy / "away")
        assert f"has no {name}" in refusal(copy, loader)
        (copy / "away").rename(copy / name)
    (copy / "SHA256SUMS").unlink()
    assert "has no SHA256SUMS; copy the whole bundle" in refused("predict", str(copy), IMAGE, "--out", "x.csv")


def test_files_that_a_loader_does_not_need_may_be_missing(copy):
    (copy / "model.safetensors").unlink()
    (copy / "README.md").unlink()
    assert load(copy).predict([IMAGE])[0].label == "red"


def test_invalid_sums_are_refused(copy):
    for text in ("", "nonsense\n", f"{'0' * 64}  ../../etc/passwd\n", "\x00" * 9, f"{'0' * 64}  config.json\n"):
        (copy / "SHA256SUMS").write_text(text)
        assert "SHA256SUMS is damaged" in refusal(copy)
    (copy / "SHA256SUMS").write_bytes(b"\xff\xfe\xfa")
    assert "SHA256SUMS is not text" in refusal(copy)


@pytest.mark.parametrize("text", ["[]", "7", "{", "", "[" * 100_000, "\x00"])
def test_configuration_that_is_not_an_object_is_refused(copy, text):
    (copy / "config.json").write_text(text)
    bundle.write_sums(copy)
    assert "config.json" in refusal(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", 0.0), ("temperature", "warm"), ("temperature", None), ("calibrated", None)]
)
def test_every_loader_validates_the_configuration(copy, key, value):
    change(copy, **{key: value})
    for loader in LOADERS:
        assert f"config.json is not the configuration of a bundle: its {key} is not" in refusal(copy, loader)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", ["blue", "green", "red", "violet"]),
        ("class_names", ["blue", "green", "yellow"]),
        ("image_size", 64),
        ("resize", "crop"),
    ],
)
def test_configuration_that_contradicts_the_model_is_refused(copy, key, value):
    change(copy, **{key: value})
    sentence = refusal(copy)
    assert "model.onnx" in sentence
    assert "config.json" in sentence
    if "violet" in str(value):
        assert "does not fit" in refusal(copy, load_network)


def constant_network(batch="batch", dtype=TensorProto.UINT8, side=32, classes=3, domain="", weight=None):
    """A model.onnx whose probabilities are constant: the sum of the image times 0, plus a third."""
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
    inputs = [helper.make_tensor_value_info("image", dtype, [batch, side, side, 3])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, classes])]
    graph = helper.make_graph(nodes, "constant", inputs, outputs, [third, zeros, axes, column])
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    preprocess = {"image_size": 32, "resize": "stretch", "layout": "NHWC"}
    names = json.dumps(["blue", "green", "red"])
    helper.set_model_props(model, {"preprocess": json.dumps(preprocess), "class_names": names})
    return model


def external(location):
    weight = helper.make_tensor("third", TensorProto.FLOAT, [3], [0.0] * 3)
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        weight.external_data.add(key=key, value=value)
    return weight


def put(model, folder):
    (folder / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    bundle.write_sums(folder)


def test_any_model_that_keeps_the_contract_is_accepted(copy):
    put(constant_network(), copy)
    (prediction,) = load(copy).predict([IMAGE])
    assert prediction.probabilities == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": TensorProto.FLOAT}, "does not map images of 32 pixels"),
        ({"side": 48}, "does not map images of 32 pixels"),
        ({"classes": 4}, "to 3 probabilities"),
        ({"batch": 2}, "takes batches of 2 only"),
        ({"domain": "evil"}, "cannot be used"),
    ],
)
def test_model_that_breaks_the_contract_is_refused_in_a_sentence(copy, options, message):
    put(constant_network(**options), copy)
    assert message in refusal(copy)


@pytest.mark.parametrize("location", ["weights.bin", "../secret.bin", "{here}/secret.bin", "model.safetensors"])
def test_external_weights_are_never_read(copy, location):
    for file in (copy / "weights.bin", copy.parent / "secret.bin"):
        file.write_bytes(np.ones(3, np.float32).tobytes())
    put(constant_network(weight=external(location.format(here=copy.parent))), copy)
    assert "model.onnx cannot be used" in refusal(copy)


@pytest.mark.parametrize("key", ["preprocess", "class_names"])
def test_model_without_valid_properties_is_refused(copy, key):
    model = onnx.load(copy / "model.onnx")
    for value in (None, "nonsense", "[" * 100_000):
        kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
        helper.set_model_props(model, kept | ({key: value} if value else {}))
        put(model, copy)
        assert f"contradict each other in {key}" in refusal(copy)


def test_file_that_is_not_a_model_is_refused(copy):
    for content in (b"", b"not a model", os.urandom(5000), (copy / "model.onnx").read_bytes()[:-5000]):
        put(content, copy)
        assert "model.onnx cannot be used" in refusal(copy)


def test_weights_that_do_not_fit_are_refused(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    first = next(iter(weights))
    misfits = {"does not fit": weights | {first: torch.zeros(2)}, "holds no weights": {}}
    for message, content in misfits.items():
        safetensors.torch.save_file(content, copy / "model.safetensors")
        bundle.write_sums(copy)
        assert message in refusal(copy, load_network)
    (copy / "model.safetensors").write_bytes(b"\xff" * 100)
    bundle.write_sums(copy)
    assert "model.safetensors is damaged" in refusal(copy, load_network)


def test_bundle_computes_on_the_cpu_with_the_given_threads(packed, at_trained):
    assert load(packed, device="cpu").predict([IMAGE])[0].label == "red"
    with pytest.raises(UserError, match="computes on the CPU"):
        load(packed, device="cuda")
    for threads in (1, 2):
        options = bundle.OnnxPredictor(packed, threads=threads)._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_part_of_a_bundle_is_not_mistaken_for_it(copy, refused):
    for name in ("model.onnx", "model.safetensors", "config.json"):
        message = refused("predict", str(copy / name), IMAGE, "--out", "x.csv")
        assert message == f"{copy / name} is a part of a bundle; give the folder, {copy}."


def test_link_to_a_bundle_is_a_bundle(copy):
    link = copy.with_name("link")
    link.symlink_to(copy)
    assert load(link).predict([IMAGE])[0].label == "red"


def test_paths_that_cannot_be_read_are_refused_in_a_sentence(copy, refused):
    for verb in (["predict", "x" * 300, IMAGE, "--out", "x.csv"], ["report", "x" * 300], ["serve", "x" * 300]):
        assert "File name too long" in refused(*verb)
    copy.chmod(0o700)
    if is_root := os.geteuid() == 0:  # root may read everything
        os.seteuid(65534)
    else:
        copy.chmod(0)
    try:
        assert "Permission denied" in refusal(copy)
    finally:
        if is_root:
            os.seteuid(0)
        copy.chmod(0o700)


def run(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(bundle.__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_without_torch_a_checkpoint_is_refused_in_a_sentence(packed, at_trained, tmp_path):
    """As in a container that has only what a bundle needs."""
    code = "import sys; sys.modules['torch'] = None; from project import cli; sys.exit(cli.main(sys.argv[1:]))"
    out = [IMAGE, "--out", str(tmp_path / "x.csv")]
    for words, reason in (
        (["predict", str(at_trained), *out], "is a checkpoint, which needs torch"),
        (["predict", str(tmp_path / "nothing"), *out], "no checkpoint"),
        (["serve", str(at_trained)], "is a checkpoint, which needs torch"),
        (["predict", str(packed), *out, "--devices", "2"], "--devices needs torch"),
    ):
        done = run(code, *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert reason in done.stderr


def test_predicting_from_a_bundle_imports_no_torch(packed, at_trained, tmp_path):
    code = (
        "import sys; from project import cli; code = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'torchvision', 'lightning', 'matplotlib', 'onnx', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = run(code, "predict", str(packed), IMAGE, "--out", str(tmp_path / "x.csv"))
    assert done.returncode == 0, done.stderr
    assert ",red," in (tmp_path / "x.csv").read_text()
