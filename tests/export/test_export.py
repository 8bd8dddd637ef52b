"""A bundle predicts the same as its checkpoint, from file to prediction, or it is not made."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn import metrics as reference

from project import cli, load, models
from project.data import images, manifest
from project.errors import FailedRun, UserError
from project.export import model_card, quantize, verify
from project.export import onnx as onnx_export
from project.inference import bundle, calibration, predictions
from project.inference.load import load_network
from project.inference.metadata import Metadata
from project.inference.predictions import Prediction
from project.inference.predictor import Predictor
from tests.conftest import full_disk, make_images, mislabel


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
    expected, made = load(lively).predict(paths()), load(packed)
    assert isinstance(made, bundle.OnnxPredictor)
    assert {prediction.label for prediction in expected} == {"blue", "green", "red"}
    for batch_size in (1, 2, 7):
        predictions = made.predict(paths(), batch_size)
        assert [p.label for p in predictions] == [p.label for p in expected]
        for one, other in zip(predictions, expected, strict=True):
            assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_model_holds_what_it_needs_of_an_image(packed):
    model = onnx.load(packed / "model.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["preprocess"]) == {"image_size": 32, "resize": "stretch", "layout": "NHWC"}
    assert json.loads(properties["class_names"]) == ["blue", "green", "red"]
    described = [properties[key] for key in ("model", "temperature", "precision")]
    assert described == ["squeezenet1_1", "1.0", "float32"]
    (taken,), (given,) = model.graph.input, model.graph.output
    assert [side.dim_param or side.dim_value for side in taken.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim] == ["batch", 3]
    assert str(Path(torch.__file__).parent).encode() not in (packed / "model.onnx").read_bytes()


def test_network_is_rebuilt_from_the_bundle_alone(lively, packed):
    expected, made = load_network(lively).network.state_dict(), load_network(packed)
    assert all(torch.equal(expected[key], value) for key, value in made.network.state_dict().items())
    config = json.loads((packed / "config.json").read_text())
    network = models.build(config["model"], len(config["class_names"]), config["mean"], config["std"])
    network.load_state_dict(safetensors.torch.load_file(packed / "model.safetensors"))


def test_sums_are_right_for_every_file_and_no_file_holds_code(packed):
    listed = dict(reversed(line.split("  ")) for line in (packed / "SHA256SUMS").read_text().splitlines())
    assert set(listed) | {"SHA256SUMS"} == {file.name for file in packed.iterdir()}
    for name, digest in listed.items():
        assert hashlib.sha256((packed / name).read_bytes()).hexdigest() == digest
    assert set(listed) == {"model.onnx", "model.safetensors", "config.json", "README.md"}
    assert {file.stat().st_mode & 0o444 for file in packed.iterdir()} == {(packed.stat().st_mode) & 0o444}


def test_pt2_writes_a_program_for_torch(at_trained, tmp_path):
    export(at_trained, tmp_path / "b", "--pt2")
    program = torch.export.load(tmp_path / "b" / "model.pt2").module()
    image = np.stack([np.full((32, 32, 3), grey, np.uint8) for grey in (0, 90, 255)])
    expected = load(tmp_path / "b").probabilities(image)
    assert np.allclose(program(torch.from_numpy(image)).detach().numpy(), expected, atol=1e-6)
    assert "model.pt2" in (tmp_path / "b" / "README.md").read_text()


def test_temperature_beside_the_checkpoint_is_built_in(lively, packed, at_trained, tmp_path):
    file = shutil.copytree(lively, tmp_path / "run") / "checkpoints" / "best.ckpt"
    calibration.write(file, 2.5, {})
    assert cli.main(["export", str(file)]) == 0
    folder = tmp_path / "run" / "bundle"
    expected = probabilities(load(file, calibrated=True))
    assert np.allclose(probabilities(load(folder, calibrated=True)), expected, atol=1e-5)
    assert load_network(folder, calibrated=True).temperature == 2.5
    assert "2.500" in (folder / "README.md").read_text()
    for loader in (load, load_network):
        with pytest.raises(UserError, match="before a temperature was known"):
            loader(packed, calibrated=True)


def test_bundle_with_other_predictions_is_not_made(lively, at_trained, tmp_path, monkeypatch, capsys):
    trace = onnx_export.trace
    monkeypatch.setattr(
        onnx_export, "trace", lambda network, temperature, size: trace(network, 1.1 * temperature, size)
    )
    assert cli.main(["export", str(lively), "--out", str(tmp_path / "b")]) == 1
    message = capsys.readouterr().err
    assert re.search(r"failed: .* of 12 validation images of photos, 0 get another label, .* by up to 0\.", message)
    assert list(tmp_path.iterdir()) == []


class Fixed:
    """Predicts the given rows."""

    def __init__(self, *rows):
        self.rows = rows

    def predict(self, paths, batch_size):
        return [Prediction.of(path, row, ["a", "b"]) for path, row in zip(paths, self.rows, strict=True)]


def test_a_tie_is_no_other_label_and_a_clear_difference_is():
    two = verify.LabelledImages(["x", "y"], ["a", "b"], "images")
    network = Fixed([0.50002, 0.49998], [0.1, 0.9])
    measured, _ = verify.compare(network, Fixed([0.49998, 0.50002], [0.1, 0.9]), two)
    assert measured["largest_difference"] == pytest.approx(4e-5)
    for row, message in (([0.1002, 0.8998], "0 get"), ([0.6, 0.4], "1 get"), ([float("nan")] * 2, "nan")):
        with pytest.raises(FailedRun, match=message):
            verify.compare(network, Fixed([0.50002, 0.49998], row), two)


@pytest.mark.slow
def test_int8_is_kept_where_it_is_smaller_and_as_accurate(changed, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    network = models.build("alexnet", 3)
    _spread_outputs(network, 64)
    file = changed(network, model="alexnet", image_size=64)
    # an untrained network is right by chance: what counts is the comparison with itself
    predict = verify.predict
    monkeypatch.setattr(verify, "predict", lambda *a, **k: predict(*a, **k)._replace(accuracy=0.9))
    made = load(export(file, tmp_path / "small", "--quantize", "int8"))
    assert re.search(
        r"int8: accuracy 90.00% becomes 90.00%, .* 228\.\d MB become 57\.\d .*: kept", capsys.readouterr().out
    )
    assert (tmp_path / "small" / "model.onnx").stat().st_size < 65e6
    assert (made.metadata.precision, made.metadata.int8["kept"]) == ("int8", True)
    exact = probabilities(load_network(tmp_path / "small"))
    assert np.ptp(exact, axis=0).max() > 0.1
    assert np.abs(probabilities(made) - exact).max() < 0.06


def test_convolutions_compute_in_8_bits_and_an_image_gets_the_same_in_any_batch(
    lively, at_trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quantize, "MAX_LOSS", 10)  # points: one of 12 images is 8
    made = load(export(lively, tmp_path / "b", "--quantize", "int8"))
    assert re.search(r"int8: accuracy .*\(3\.\d x smaller\).*: kept", capsys.readouterr().out)
    assert "8 bits are in `model.onnx`" in (tmp_path / "b" / "README.md").read_text()
    alone = probabilities(made, batch_size=1)
    assert np.abs(alone - probabilities(made, batch_size=9)).max() < 1e-6
    assert 1e-4 < np.abs(alone - probabilities(lively)).max() < 0.1


def training_images(run):
    with (run / "split.csv").open() as file:
        return [row["path"] for row in csv.DictReader(file) if row["split"] == "train"]


def test_scales_of_8_bits_are_taken_from_training_images(lively, at_trained, tmp_path, monkeypatch):
    seen, write = [], quantize.write_int8

    def record(source, file, properties, samples):
        seen.extend(image.tobytes() for batch in samples for image in batch)
        write(source, file, properties, samples)

    monkeypatch.setattr(quantize, "write_int8", record)
    export(lively, tmp_path / "b", "--quantize", "int8")
    training = [images.read(Path("photos", path), 32).tobytes() for path in training_images(lively)]
    assert sorted(seen) == sorted(training)


def test_int8_needs_training_images(lively, at_trained, tmp_path, refused):
    shutil.copytree("photos", tmp_path / "other")
    words = ["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b"), "--data"]
    training = [tmp_path / "other" / path for path in training_images(lively)]
    for file in training:
        file.write_bytes(b"no image")
    assert f"None of the {len(training)} training images" in refused(*words, str(tmp_path / "other"))
    for file in training:
        file.unlink()
    message = refused(*words, str(tmp_path / "other"))
    assert f"none of the {len(training)} of" in message
    assert "leave out --quantize" in message
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_network_that_the_quantiser_does_not_know_stays_float32(
    lively, at_trained, tmp_path, monkeypatch, capsys, refused
):
    def failing(error):
        def quantize_static(*_, **__):
            raise error

        monkeypatch.setattr(onnxruntime.quantization, "quantize_static", quantize_static)
        return ["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]

    message = refused(*failing(OSError(28, "No space left on device")))
    assert f"No space left on device (8 bits need room in {tempfile.gettempdir()}, too)" in message
    assert cli.main(failing(ValueError("no rule for Foo\n  more"))) == 0
    message = "int8: ONNX Runtime cannot compute the network in 8 bits: no rule for Foo; model.onnx stays float32\n"
    assert message in capsys.readouterr().out
    made = load(tmp_path / "b")
    assert (made.metadata.precision, made.metadata.int8) == ("float32", None)
    assert (tmp_path / "b" / "README.md").is_file()
    assert not (tmp_path / "b" / "int8").exists()


def test_layers_with_weights_compute_in_8_bits_and_attentions_products_do_not(tmp_path):
    class Attentive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Linear(4, 2)
            self.key = torch.nn.Linear(4, 4, bias=False)

        def forward(self, image):
            tokens = self.patches(image / 255).relu().flatten(2).transpose(1, 2)
            return self.head(((self.key(tokens) @ tokens.transpose(1, 2)).softmax(-1) @ tokens).mean(1))

    onnx_export.write_onnx(onnx_export.trace(Attentive().eval(), 1.0, 16), tmp_path / "exact.onnx", {})
    samples = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 16, 3), np.uint8)
    quantize.write_int8(tmp_path / "exact.onnx", tmp_path / "small.onnx", {"precision": "int8"}, samples)
    model = onnx.load(tmp_path / "small.onnx")
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    in_8_bits, exact = [], []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            inputs = [producers.get(name) for name in node.input[:2]]
            (in_8_bits if inputs == ["DequantizeLinear"] * 2 else exact).append(node.op_type)
    assert sorted(in_8_bits) == ["Conv", "Gemm", "MatMul"]
    assert exact == ["MatMul", "MatMul"]
    assert "Relu" not in producers.values()  # the convolution's scale cuts off what a ReLU would
    consumers = {node.input[0]: node.op_type for node in model.graph.node}
    linear = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert "QuantizeLinear" not in {consumers.get(node.output[0]) for node in linear}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"precision": "int8"}


@pytest.mark.parametrize(
    ("accuracies", "seconds", "message"),
    [((0.9, 0.9, 0.9), [1.0, 1.0], r"\(1\.0 x smaller\)"), ((0.99, 0.99, 0.98), [9.0, 1.0], "99.00% becomes 98.00%")],
    ids=["no gain", "less accurate"],
)
def test_int8_that_is_not_worth_it_leaves_the_exact_model(
    lively, packed, at_trained, tmp_path, monkeypatch, capsys, accuracies, seconds, message
):
    predict, accuracy = verify.predict, iter(accuracies)  # of the checkpoint, the bundle, 8 bits
    monkeypatch.setattr(verify, "predict", lambda *a, **k: predict(*a, **k)._replace(accuracy=next(accuracy)))
    monkeypatch.setattr(quantize, "write_int8", lambda source, file, *_: shutil.copy(source, file))
    monkeypatch.setattr(verify, "side_by_side", lambda *runs: seconds)
    made = load(export(lively, tmp_path / "b", "--quantize", "int8"))
    assert re.search(rf"int8: .*{message}.*not worth it", capsys.readouterr().out)
    assert (made.metadata.precision, made.metadata.int8["kept"]) == ("float32", False)
    assert {file.name for file in (tmp_path / "b").iterdir()} == {file.name for file in packed.iterdir()}
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (packed / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("lost", "smaller", "faster", "keep"),
    [
        (0.0, 3.1, 1.0, True),
        (0.4, 1.0, 1.6, True),
        (100 * (0.985 - 0.98), 4.0, 2.0, True),
        (0.6, 4.0, 2.0, False),
        (0.0, 2.9, 1.4, False),
    ],
)
def test_int8_must_gain_much_and_lose_little(lost, smaller, faster, keep):
    assert quantize.is_worth_it(lost, smaller, faster) == keep


NETWORKS = ["mobilenet_v3_small", "timm/vit_tiny_patch16_224"]
NETWORKS += [pytest.param(name, marks=pytest.mark.full) for name in ("alexnet", "resnet18", "timm/efficientnet_b0")]


def _spread_outputs(network, size):
    """Without this an untrained network's outputs hardly depend on the image, nor do those of a wrong export."""
    image = torch.from_numpy(np.stack([images.read(path, size) for path in paths(14)])).permute(0, 3, 1, 2)
    head = models.head(network)[1]
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight)
        network.train()(image)  # the averages of batch normalisation
        logits = network.eval()(image)
        scale = 0.5 / logits.std(dim=0)
        head.weight *= scale[:, None]
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_pass_the_comparison_in_batches_of_any_size(changed, tmp_path, name):
    torch.manual_seed(0)
    network, size = models.build(name, 3).eval(), 224 if "vit" in name else 64
    _spread_outputs(network, size)
    file = changed(network, model=name, image_size=size)
    made = load(export(file, tmp_path / "b"))
    expected = probabilities(file, 14)
    assert np.ptp(expected, axis=0).max() > 0.1
    for batch_size in (1, 2, 7):
        assert np.abs(probabilities(made, 14, batch_size) - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
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


def test_card_has_the_runs_figures_with_intervals(lively, trained, tmp_path, monkeypatch):
    run = shutil.copytree(lively, tmp_path / "runs" / "photos" / "version_0")
    shutil.copytree(trained / "photos", tmp_path / "photos")
    mislabel(tmp_path / "photos", run / "split.csv")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["test", "--ckpt_path", str(run)]) == 0
    assert cli.main(["export", str(run)]) == 0
    text = (run / "bundle" / "README.md").read_text()
    measured = json.loads((run / "test_metrics.json").read_text())
    assert f"| accuracy | {100 * measured['test/accuracy']:.1f} % |" in text
    # test has fitted a temperature, which is in the bundle, in the loss, and in the ranking of different images
    assert f"divided by {calibration.read(run / 'checkpoints' / 'best.ckpt'):.3f}" in text
    with (run / "split.csv").open() as stream:
        tested = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    labels = [row["label"] for row in tested]
    predictions = load(run / "bundle").predict([f"photos/{row['path']}" for row in tested])
    rows = np.array([prediction.probabilities for prediction in predictions], dtype=np.float64)
    own = rows[np.arange(len(rows)), [["blue", "green", "red"].index(label) for label in labels]]
    assert f"| loss | {-np.mean(np.log(own)):.3f} |" in text
    area = reference.roc_auc_score(labels, rows / rows.sum(axis=1, keepdims=True), multi_class="ovr")
    assert f"| AUROC | {area:.3f} |" in text
    assert re.search(r"\| accuracy \| [\d.]+ % \| [\d.]+ to [\d.]+ % \|", text)
    assert "On 24 test images" in text
    assert "| red | 28 | 4 | 8 |" in text
    assert "| all classes | 84 | 12 | 24 |" in text


def test_card_prints_no_score_below_1_as_1(tmp_path):
    half, names, checkpoint = [0.5, 0.5, 0.5], ["a", "b"], tmp_path / "run" / "checkpoints" / "best.ckpt"
    config, made_by = {"data": {}, "model": {}, "trainer": {}}, {"versions": {}, "git_commit": ""}
    compared = {"images": 1, "ties": 0, "largest_difference": 0.0}
    metadata = Metadata("m", names, 8, "crop", half, half, config, export=made_by, compared=compared)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    ranks = [*range(99), 100, 99, *range(101, 200)]  # one of 10,000 pairs is in the wrong order
    rows = [Prediction.of(str(n), [1 - r / 199, r / 199], names, names[n >= 100]) for n, r in enumerate(ranks)]
    predictions.write(tmp_path / "run" / "predictions.csv", rows, names)
    (tmp_path / "run" / "test_metrics.json").write_text('{"checkpoint": "best.ckpt"}')
    model_card.write(tmp_path / "README.md", checkpoint, metadata)
    (value, interval) = re.search(r"\| AUROC \| (.*) \| (.*) \|", (tmp_path / "README.md").read_text()).groups()
    assert value == "0.9999"
    assert re.fullmatch(r"0\.99\d+ to 1\.0+", interval)  # many samples lack the wrong pair: their AUROC is 1


def test_card_without_a_test_or_a_run_says_so(changed, tmp_path):
    export(changed(), tmp_path / "bundle")
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert text.startswith("# changed: squeezenet1\\_1\n")
    assert "not been measured on test images" in text
    assert "how many of each class is not known" in text


def test_names_that_markdown_or_html_would_interpret_stay_names(changed, tmp_path):
    names = ["a|b *c*", "<script>", "größe\n大"]
    with (tmp_path / "split.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [("path", "label", "split"), (Path("photos/red/003.png").resolve(), names[2], "val")]
        )
    Path(tmp_path / "bob's_cells").symlink_to(Path("photos").resolve())
    export(changed(class_names=names), tmp_path / "b", "--data", str(tmp_path / "bob's_cells"))
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert "classes: a\\|b \\*c\\*, &lt;script&gt;, größe 大." in text
    assert "| größe 大 | 0 | 1 | 0 |" in text
    assert load(tmp_path / "b").class_names == names


def test_card_is_named_after_the_data_however_the_run_is_given(lively, trained, tmp_path, monkeypatch):
    run = shutil.copytree(lively, tmp_path / "runs" / "solar_cells" / "version_0")
    (tmp_path / "runs" / "latest").symlink_to(run)
    for folder, path, out in ((tmp_path, "runs/latest", "1"), (run, ".", "2")):
        monkeypatch.chdir(folder)
        export(path, tmp_path / out, "--data", str(trained / "photos"))
        assert (tmp_path / out / "README.md").read_text().startswith("# solar\\_cells: squeezenet1\\_1\n")


def test_without_its_split_csv_the_split_is_repeated_with_a_notice(lively, at_trained, tmp_path, capsys):
    content = torch.load(lively / "checkpoints" / "best.ckpt", weights_only=True)["metadata"]
    root, drawn = content["config"]["data"]["root"], []
    for seed in (0, 1):
        content["config"]["data"]["split_seed"] = seed
        data = manifest.load(Path(root), seed=seed)
        drawn.append(set(verify.validation_images(tmp_path, Metadata.parse(content, ""), None).paths))
        assert drawn[-1] == {str(Path(root, data.paths[row])) for row in data.rows("val").tolist()}
        assert "split.csv" in capsys.readouterr().out
    assert drawn[0] != drawn[1]
    verify.validation_images(lively, Metadata.parse(content, ""), None)
    assert capsys.readouterr().out == ""


def test_images_of_other_classes_are_refused(changed, packed, tmp_path, refused):
    """All predictions for them would be wrong, in 32 bits as in 8."""
    make_images(tmp_path / "others", {"left": 10, "right": 10})
    for words in (["export", str(changed()), "--quantize", "int8"], ["report", str(packed)]):
        message = refused(*words, "--data", str(tmp_path / "others"), "--out", str(tmp_path / "out"))
        for name in ("left, right", "blue, green, red"):
            assert name in message
    assert not (tmp_path / "out").exists()


def test_images_that_have_moved_are_found_by_data(at_trained, tmp_path, monkeypatch, refused, capsys):
    run = shutil.copytree(at_trained, tmp_path / "runs" / "photos" / "version_0")
    shutil.copytree("photos", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    message = refused("export", str(run), "--out", "b")
    assert "needs validation images" in message
    assert "none of the 12" in message
    assert "--data" in message
    assert "none of the 12" in refused("export", str(run), "--out", "b", "--data", "nowhere")
    shutil.copy(run / "checkpoints" / "best.ckpt", "alone.ckpt")
    assert " of . is in photos" in refused("export", "alone.ckpt", "--out", "b")
    export(run, "done", "--data", "moved")
    assert "12 validation images of moved" in capsys.readouterr().out
    for file in Path("moved").rglob("*.png"):
        file.write_bytes(b"no image")
    assert "None of the 12" in refused("export", str(run), "--out", "b", "--data", "moved")
    assert not [name for name in os.listdir() if "b" in name.split(".")]


def test_damaged_checkpoint_of_a_tested_run_is_named(lively, at_trained, tmp_path, refused):
    file = shutil.copytree(lively, tmp_path / "run") / "checkpoints" / "best.ckpt"
    calibration.write(file, 2.0, {})
    file.write_bytes(file.read_bytes()[:-1000])
    assert "best.ckpt is damaged" in refused("export", str(file))
    assert not (tmp_path / "run" / "bundle").exists()


def test_weights_of_lower_precision_are_converted_to_32_bits(lively, changed, tmp_path):
    file = changed(load_network(lively).network.bfloat16())
    export(file, tmp_path / "b")
    for source in (file, tmp_path / "b"):
        assert np.abs(probabilities(source) - probabilities(lively)).max() < 0.05


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
    monkeypatch.setattr(onnx_export, "LIBRARIES", ("onnx", "no_such_library"))
    message = refused("export", run, *out)
    assert "no_such_library" in message
    assert "pip install -e .[export]" in message


def test_full_disk_leaves_nothing(at_trained, tmp_path, refused, monkeypatch):
    full_disk(monkeypatch)
    assert "cannot be written: No space left" in refused("export", str(at_trained), "--out", str(tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


def test_network_that_is_not_a_graph_is_refused_in_a_sentence():
    class Branching(torch.nn.Module):
        def forward(self, image):
            return image.float().mean((2, 3)) if image.sum() > 7 else image.float().amax((2, 3))

    with pytest.raises(UserError, match=r"torch\.export cannot make a graph"):
        onnx_export.trace(Branching(), 1.0, 8)


def test_network_that_onnx_cannot_express_is_refused_in_a_sentence(tmp_path):
    class Chained(torch.nn.Module):
        def forward(self, image):
            return torch.linalg.matrix_exp(image.float().mean(1)).mean(2)

    program = onnx_export.trace(Chained(), 1.0, 8)
    with pytest.raises(UserError, match=r"ONNX cannot express an operation of the network: .*matrix_exp"):
        onnx_export.write_onnx(program, tmp_path / "model.onnx", {})
    assert list(tmp_path.iterdir()) == []
