"""A bundle predicts the same as its checkpoint, from file to prediction, or it is not made."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference

from project import cli, load, models
from project.data import images, manifest
from project.errors import FailedRun, UserError
from project.export import onnx as onnx_export
from project.export import quantize, verify
from project.inference import bundle, calibration, timing
from project.inference.load import locate
from project.inference.predictions import Prediction
from project.inference.predictor import Predictor
from tests.conftest import full_disk, make_images, read_csv

FILES = {"model.onnx", "model.safetensors", "config.json", "README.md", "SHA256SUMS"}


def paths(count=9):
    return sorted(map(str, Path("photos").rglob("*.png")))[:: 120 // count]


def probabilities(source, count=9, batch_size=64):
    """(N, K) for `paths(count)`, of a path or a loaded predictor."""
    predictor = source if isinstance(source, Predictor) else load(source)
    return np.array([prediction.probabilities for prediction in predictor.predict(paths(count), batch_size)])


def export(source, out, *options):
    assert cli.main(["export", str(source), "--out", str(out), *options]) == 0
    return out


@pytest.fixture
def changed(lively, at_trained, tmp_path):
    """Saves a copy of the checkpoint with other metadata or another network, outside a run."""

    def save(network=None, **metadata):
        content = torch.load(lively / "checkpoints" / "best.ckpt", weights_only=True)
        content["metadata"] |= metadata
        if network is not None:
            content["state_dict"] = {f"network.{key}": value for key, value in network.state_dict().items()}
        torch.save(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return save


def test_bundle_predicts_as_its_checkpoint_from_files_in_batches_of_any_size(lively, packed, at_trained):
    expected = probabilities(lively)
    assert set(expected.argmax(axis=1)) == {0, 1, 2}
    for batch_size in (1, 2, 7):
        made = probabilities(packed, batch_size=batch_size)
        assert np.abs(made - expected).max() < 1e-5
        assert (made.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_model_holds_what_it_needs_of_an_image(packed):
    model = onnx.load(packed / "model.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["preprocess"]) == {"image_size": 32, "resize": "stretch", "layout": "NHWC"}
    assert json.loads(properties["class_names"]) == ["blue", "green", "red"]
    assert properties | {"model": "squeezenet1_1", "temperature": "1.0", "precision": "float32"} == properties
    shapes = [[d.dim_param or d.dim_value for d in side.type.tensor_type.shape.dim] for side in model.graph.input]
    assert shapes == [["batch", 32, 32, 3]]
    assert str(Path(torch.__file__).parent).encode() not in (packed / "model.onnx").read_bytes()


def test_files_hold_the_network_and_its_sums_and_no_code(lively, packed):
    listed = dict(reversed(line.split("  ")) for line in (packed / "SHA256SUMS").read_text().splitlines())
    assert set(listed) | {"SHA256SUMS"} == FILES == {file.name for file in packed.iterdir()}
    for name, digest in listed.items():
        assert hashlib.sha256((packed / name).read_bytes()).hexdigest() == digest
    assert {file.stat().st_mode & 0o444 for file in packed.iterdir()} == {(packed.stat().st_mode) & 0o444}
    expected, made = (locate(path).load_network().network.state_dict() for path in (lively, packed))
    assert all(torch.equal(expected[key], value) for key, value in made.items())


@pytest.mark.slow
def test_pt2_writes_a_program_for_torch_in_32_bits_whatever_the_checkpoint_has(lively, changed, tmp_path):
    export(changed(locate(lively).load_network().network.bfloat16()), tmp_path / "b", "--pt2")
    assert np.abs(probabilities(tmp_path / "b") - probabilities(lively)).max() < 0.05
    program = torch.export.load(tmp_path / "b" / "model.pt2").module()
    image = np.stack([np.full((32, 32, 3), grey, np.uint8) for grey in (0, 90, 255)])
    expected = load(tmp_path / "b").probabilities(image)
    assert np.allclose(program(torch.from_numpy(image)).detach().numpy(), expected, atol=1e-6)
    assert "model.pt2" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.slow
def test_bundle_with_other_predictions_is_not_made(lively, at_trained, tmp_path, monkeypatch, capsys):
    trace = onnx_export.trace
    monkeypatch.setattr(onnx_export, "trace", lambda net, temperature, size: trace(net, 1.1 * temperature, size))
    assert cli.main(["export", str(lively), "--out", str(tmp_path / "b")]) == 1
    message = capsys.readouterr().err
    assert re.search(r"failed: .* of 12 validation images of photos, 0 get another label, .* by up to 0\.", message)
    assert list(tmp_path.iterdir()) == []


def test_a_tie_is_no_other_label_and_a_clear_difference_is():
    def compare(*rows):
        """Compares predictors of [0.50002, 0.49998], [0.1, 0.9] and of `rows`."""
        made = [
            [Prediction.of("x", row, ["a", "b"]) for row in each] for each in ([[0.50002, 0.49998], [0.1, 0.9]], rows)
        ]
        network, exported = (SimpleNamespace(predict=lambda *_, fixed=fixed: fixed) for fixed in made)
        return verify.compare(network, exported, verify.LabelledImages(["x", "y"], ["a", "b"], "images"))[0]

    measured = compare([0.49998, 0.50002], [0.1, 0.9])
    assert (measured["largest_difference"], measured["ties"]) == (pytest.approx(4e-5), 1)
    for row, message in (([0.1002, 0.8998], "0 get"), ([0.6, 0.4], "1 get"), ([float("nan")] * 2, "nan")):
        with pytest.raises(FailedRun, match=message):
            compare([0.50002, 0.49998], row)


@pytest.mark.slow
def test_8_bits_are_scaled_on_training_images_and_an_image_gets_the_same_in_any_batch(
    lively, at_trained, tmp_path, monkeypatch, capsys
):
    seen, write = [], quantize.write_int8

    def record(source, file, properties, samples):
        seen.extend(image.tobytes() for batch in samples for image in batch)
        write(source, file, properties, samples)

    monkeypatch.setattr(quantize, "write_int8", record)
    monkeypatch.setattr(quantize, "MAX_LOSS", 10)  # points: one of 12 images is 8
    made = load(export(lively, tmp_path / "b", "--quantize", "int8"))
    assert re.search(r"int8: accuracy .*\(3\.\d x smaller\).*: kept", capsys.readouterr().out)
    assert "8 bits are in `model.onnx`" in (tmp_path / "b" / "README.md").read_text()
    alone = probabilities(made, batch_size=1)
    assert np.abs(alone - probabilities(made, batch_size=9)).max() < 1e-6
    assert 1e-4 < np.abs(alone - probabilities(lively)).max() < 0.1
    assert sorted(seen) == sorted(images.read(Path("photos", path), 32).tobytes() for path in in_split(lively, "train"))


def in_split(run, split):
    return [row["path"] for row in read_csv(run / "split.csv") if row["split"] == split]


@pytest.mark.full
def test_network_that_the_quantiser_does_not_know_stays_float32_and_a_full_disk_is_no_such_thing(
    lively, packed, at_trained, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", fail)
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        quantize.write_int8(packed / "model.onnx", tmp_path / "small.onnx", {}, [])
    error = ValueError("no rule for Foo\n  more")
    made = load(export(lively, tmp_path / "b", "--quantize", "int8"))
    message = "int8: ONNX Runtime cannot compute the network in 8 bits: no rule for Foo; model.onnx stays float32\n"
    assert message in capsys.readouterr().out
    assert (made.metadata.precision, made.metadata.int8) == ("float32", None)
    assert {file.name for file in (tmp_path / "b").iterdir()} == FILES


def test_layers_with_weights_compute_in_8_bits_and_attentions_products_do_not(tmp_path):
    class Attentive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Linear(4, 2)
            self.key = torch.nn.Linear(4, 4, bias=False)

        def forward(self, image):
            # .float(): torch 2.7 exports the quotient of bytes as bytes
            tokens = self.patches(image.float() / 255).relu().flatten(2).transpose(1, 2)
            return self.head(((self.key(tokens) @ tokens.transpose(1, 2)).softmax(-1) @ tokens).mean(1))

    onnx_export.write_onnx(onnx_export.trace(Attentive().eval(), 1.0, 16), tmp_path / "exact.onnx", {})
    samples = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 16, 3), np.uint8)
    quantize.write_int8(tmp_path / "exact.onnx", tmp_path / "small.onnx", {"precision": "int8"}, samples)
    model = onnx.load(tmp_path / "small.onnx")
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    inputs = sorted(
        (node.op_type, {producers.get(name) for name in node.input[:2]} == {"DequantizeLinear"}) for node in products
    )
    assert inputs == [("Conv", True), ("Gemm", True), ("MatMul", False), ("MatMul", False), ("MatMul", True)]
    assert "Relu" not in producers.values()  # the convolution's scale cuts off what a ReLU would
    consumers = {node.input[0]: node.op_type for node in model.graph.node}
    assert "QuantizeLinear" not in {consumers.get(node.output[0]) for node in products if node.op_type != "Conv"}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"precision": "int8"}


@pytest.mark.parametrize(
    ("lost", "smaller", "faster", "kept"),
    [(0.0, 3.1, 1.0, True), (0.5, 1.0, 1.6, True), (0.6, 4.0, 2.0, False), (0.0, 2.9, 1.4, False)],
)
def test_int8_must_gain_much_and_lose_little_or_leaves_the_exact_model(
    packed, at_trained, tmp_path, monkeypatch, lost, smaller, faster, kept
):
    folder, three = Path(shutil.copytree(packed, tmp_path / "b")), verify.LabelledImages(paths(3), ["blue"] * 3, "")
    exact = load(folder)
    outputs = verify.predict(exact, three, 3)._replace(accuracy=0.985)
    monkeypatch.setattr(verify, "predict", lambda *_, **__: outputs._replace(accuracy=0.985 - lost / 100))
    monkeypatch.setattr(timing, "side_by_side", lambda *_: [faster, 1.0])
    size = int((folder / "model.onnx").stat().st_size / smaller)
    monkeypatch.setattr(quantize, "write_int8", lambda _, file, *__: file.write_bytes(b"x" * size))
    monkeypatch.setattr(bundle, "OnnxPredictor", lambda _: exact)
    made = quantize.quantize(folder, exact.metadata, exact, outputs, three, [])
    assert (made.precision, made.int8["kept"]) == ("int8" if kept else "float32", kept)
    assert ((folder / "model.onnx").read_bytes() == (packed / "model.onnx").read_bytes()) is not kept
    assert {file.name for file in folder.iterdir()} == FILES


NETWORKS = [("timm/test_vit", 160), ("timm/test_efficientnet", 64)]
OTHERS = [("alexnet", 64), ("resnet18", 64), ("mobilenet_v3_small", 64), ("timm/vit_tiny_patch16_224", 224)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [*NETWORKS, *(pytest.param(*network, marks=pytest.mark.full) for network in OTHERS)]
)
def test_networks_of_all_kinds_pass_the_comparison_in_batches_of_any_size(changed, tmp_path, name, size):
    torch.manual_seed(0)
    network = models.build(name, 3)
    image = torch.from_numpy(np.stack([images.read(path, size) for path in paths(14)])).permute(0, 3, 1, 2)
    head = models.head(network)[1]
    with torch.no_grad():  # else its outputs hardly depend on the image, nor do those of a wrong export
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight)
        network.train()(image)  # the averages of batch normalisation
        logits = network.eval()(image)
        scale = 0.5 / logits.std(dim=0)
        head.weight *= scale[:, None]
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
    file = changed(network, model=name, image_size=size)
    made = load(export(file, tmp_path / "b"))
    expected = probabilities(file, 14)
    assert np.ptp(expected, axis=0).max() > 0.1
    for batch_size in (1, 2, 7):
        assert np.abs(probabilities(made, 14, batch_size) - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad", "stretch:lanczos", "crop:bicubic:0.5", "pad:nearest"])
def test_cards_snippet_gives_the_same_answer_without_torch(changed, tmp_path, resize):
    file = changed(resize=resize)
    folder = export(file, tmp_path / "b")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.open("photos/red/003.png").resize((640, 90)).save(folder / "image.jpg", exif=rotated)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 10
    code = snippet + "\nimport sys; assert not {'torch', 'project'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    (expected,) = load(file).predict([folder / "image.jpg"])
    label, probability = done.stdout.split()
    assert label == expected.label
    assert float(probability) == pytest.approx(expected.probability, abs=1e-5)


@pytest.fixture
def at_tested(tested, tmp_path, monkeypatch):
    """The current folder holds a copy of the tested run, for which a temperature is known."""
    monkeypatch.chdir(shutil.copytree(tested, tmp_path / "tested", symlinks=True))
    return Path("runs", "photos", "version_0")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.slow
def test_bundle_is_raw_unless_calibrated_and_card_page_and_summary_say_so_and_have_its_figures(
    at_tested, calibrated, capsys
):
    run, options, word = at_tested, ["--calibrated"] * calibrated, "calibrated" if calibrated else "raw"
    temperature = calibration.read(run / "checkpoints" / "best.ckpt")[0]
    export(run, run / "bundle", *options)
    assert f"MB, {word} probabilities)" in capsys.readouterr().out
    assert locate(run / "bundle").load_network().metadata.temperature == (temperature if calibrated else 1)
    assert temperature != 1
    expected, made = probabilities(load(run, calibrated)), probabilities(run / "bundle")
    assert np.abs(made - expected).max() < 1e-5

    text, measured = (run / "bundle" / "README.md").read_text(), json.loads((run / "test_metrics.json").read_text())
    assert f"| accuracy | {100 * measured['test/accuracy']:.1f} % |" in text
    assert f"by {word} probabilities" in text
    assert (f"divided by {temperature:.3f}" if calibrated else "raw, not calibrated") in text
    images, labels = zip(*((f"photos/{path}", Path(path).parent.name) for path in in_split(run, "test")), strict=True)
    rows = np.array([prediction.probabilities for prediction in load(run / "bundle").predict(images)], dtype=np.float64)
    own = rows[np.arange(len(rows)), [["blue", "green", "red"].index(label) for label in labels]]
    area = reference.roc_auc_score(labels, rows / rows.sum(axis=1, keepdims=True), multi_class="ovr")
    figures = {"cross-entropy": f"{-np.mean(np.log(own)):.3f}", "AUROC": f"{area:.3f}"}
    assert re.search(r"\| accuracy \| [\d.]+ % \| [\d.]+ to [\d.]+ % \|", text)
    for line in ("On 24 test images", "| red | 28 | 4 | 8 |", "| all classes | 84 | 12 | 24 |"):
        assert line in text

    assert cli.main(["report", str(run / "bundle"), "--data", "photos", "--out", "page.html"]) == 0
    page = re.sub(r"<[^>]*>|\s+", " ", Path("page.html").read_text())
    assert f"computed from them, are {word}." in page
    assert ("No temperature is built in" in page) != calibrated
    for name, value in figures.items():
        assert f"| {name} | {value} |" in text
        assert re.search(rf" {name} +{value} ", page), name
    assert cli.main(["predict", str(run / "bundle"), "photos", "--out", "labels.csv"]) == 0
    assert f"labels.csv ({word} probabilities)" in capsys.readouterr().out


def test_calibrated_probabilities_of_what_has_no_temperature_are_refused(lively, packed, at_trained, tmp_path, refused):
    with pytest.raises(UserError, match="gives raw probabilities; make another bundle by export --calibrated"):
        load(packed, calibrated=True)
    message = refused("export", str(lively), "--calibrated", "--out", str(tmp_path / "b"))
    assert "No temperature is known for" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_card_without_a_test_says_so_and_names_that_markdown_would_interpret_stay_names(changed, tmp_path):
    names = ["a|b *c*", "<script>", "größe\n大"]
    row = f'{Path("photos/red/003.png").resolve()},"{names[2]}",val'
    (tmp_path / "split.csv").write_text(f"path,label,split\n{row}\n", encoding="utf-8")
    Path(tmp_path / "bob's_cells").symlink_to(Path("photos").resolve())
    export(changed(class_names=names), tmp_path / "b", "--data", str(tmp_path / "bob's_cells"))
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert "---\n# changed: squeezenet1\\_1\n" in text
    assert "not been measured on test images" in text
    assert "classes: a\\|b \\*c\\*, &lt;script&gt;, größe 大." in text
    assert "| größe 大 | 0 | 1 | 0 |" in text
    assert load(tmp_path / "b").class_names == names


def test_without_its_split_csv_the_split_is_repeated_with_a_notice(lively, at_trained, tmp_path, capsys):
    metadata = load(lively).metadata
    root, drawn = metadata.config["data"]["root"], []
    for seed in (0, 1):
        metadata.config["data"]["split_seed"] = seed
        data = manifest.load(Path(root), seed=seed)
        drawn.append(set(verify.draw_images(tmp_path, "val", 99, metadata, None).paths))
        assert drawn[-1] == {str(Path(root, data.paths[row])) for row in data.rows("val").tolist()}
        assert "split.csv" in capsys.readouterr().out
    assert drawn[0] != drawn[1]
    verify.draw_images(lively, "val", 99, metadata, None)
    assert capsys.readouterr().out == ""


def test_images_of_other_classes_are_refused(changed, packed, tmp_path, refused):
    """All predictions for them would be wrong, in 32 bits as in 8."""
    make_images(tmp_path / "others", {"left": 10, "right": 10})
    for words in (["export", str(changed()), "--quantize", "int8"], ["report", str(packed)]):
        message = refused(*words, "--data", str(tmp_path / "others"), "--out", str(tmp_path / "out"))
        for name in ("left, right", "blue, green, red"):
            assert name in message
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_moved_images_are_found_by_data_missing_or_damaged_ones_are_named_and_the_card_has_the_runs_name(
    lively, trained, tmp_path, monkeypatch, refused, capsys
):
    run = shutil.copytree(lively, tmp_path / "runs" / "solar_cells" / "version_0")
    (tmp_path / "runs" / "latest").symlink_to(run)
    shutil.copytree(trained / "photos", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    message = refused("export", "--out", "b")
    assert "needs validation images, but none of the 12" in message
    assert "--data" in message
    assert "none of the 12" in refused("export", "--out", "b", "--data", "nowhere")
    shutil.copy(run / "checkpoints" / "best.ckpt", "alone.ckpt")
    assert " of . is in photos" in refused("export", "alone.ckpt", "--out", "b")
    export("runs/latest", "done", "--data", "moved")
    assert "12 validation images of moved" in capsys.readouterr().out
    assert "---\n# solar\\_cells: squeezenet1\\_1\n" in Path("done", "README.md").read_text()
    for split, kind, options in (("train", "training", ["--quantize", "int8"]), ("val", "validation", [])):
        files, words = [Path("moved", path) for path in in_split(run, split)], ["--out", "b", "--data", "moved"]
        for file in files:
            file.write_bytes(b"no image")
        assert f"None of the {len(files)} {kind} images" in refused("export", *words, *options)
        for file in files:
            file.unlink()
        assert f"needs {kind} images, but none of the {len(files)} of" in refused("export", *words, *options)
    assert not [name for name in os.listdir() if "b" in name.split(".")]


@pytest.mark.slow
def test_mistakes_are_told_in_a_sentence(at_trained, packed, tmp_path, refused, monkeypatch):
    run, out = str(at_trained), ["--out", str(tmp_path / "b")]
    for words, message in (
        ([run, "--out", str(packed)], "bundle exists"),
        (["none.ckpt"], "no checkpoint none.ckpt"),
        ([str(packed)], "is a bundle, not a checkpoint"),
        (["x" * 300], "File name too long"),
        ([run, *out, "--data", "x" * 300], "File name too long"),
        ([run, "--quantize", "int4"], "--quantize is int4"),
        ([run, "--out", str(tmp_path / "no" / "b")], "no folder"),
    ):
        assert message in refused("export", *words)
    full_disk(monkeypatch)
    assert "cannot be written: No space left" in refused("export", run, *out)
    monkeypatch.setattr(onnx_export, "LIBRARIES", ("onnx", "no_such_library"))
    assert "needs no_such_library; install it: pip install -e .[export]" in refused("export", run, *out)
    assert list(tmp_path.iterdir()) == []


def test_network_that_cannot_be_expressed_is_refused_in_a_sentence(tmp_path):
    class Branching(torch.nn.Module):
        def forward(self, image):
            return image.float().mean((2, 3)) if image.sum() > 7 else image.float().amax((2, 3))

    class Chained(torch.nn.Module):
        def forward(self, image):
            return torch.linalg.matrix_exp(image.float().mean(1)).mean(2)

    with pytest.raises(UserError, match=r"torch\.export cannot make a graph"):
        onnx_export.trace(Branching(), 1.0, 8)
    program = onnx_export.trace(Chained(), 1.0, 8)
    with pytest.raises(UserError, match=r"ONNX cannot express an operation of the network: .*matrix_exp"):
        onnx_export.write_onnx(program, tmp_path / "model.onnx", {})
    assert list(tmp_path.iterdir()) == []
