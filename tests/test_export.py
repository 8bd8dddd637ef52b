"""A bundle says what its checkpoint says, from file to answer, or it is not made."""

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

from project import bundle, calibration, checkpoint, cli, convert, export, load, models, parity
from project.data import images, manifest
from project.errors import FailedRun, UserError
from tests.conftest import full_disk, make_pictures, mislabel


def pictures(count=9):
    return sorted(map(str, Path("photos").rglob("*.png")))[:: 120 // count]


def test_bundle_answers_as_the_checkpoint_from_files_in_batches_of_any_size(lively, packed, at_trained):
    expected = load(lively).predict(pictures())
    assert {one.label for one in expected} == {"blue", "green", "red"}
    made = load(packed)
    assert isinstance(made, bundle.Bundle)
    for batch_size in (1, 2, 7):
        found = made.predict(pictures(), batch_size)
        assert [one.label for one in found] == [one.label for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_model_says_what_it_needs_of_a_picture(packed):
    model = onnx.load(packed / "model.onnx")
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["preprocess"]) == {"image_size": 32, "resize": "stretch", "layout": "NHWC"}
    assert json.loads(said["class_names"]) == ["blue", "green", "red"]
    assert (said["model"], said["temperature"], said["precision"]) == ("squeezenet1_1", "1.0", "float32")
    (taken,), (given,) = model.graph.input, model.graph.output
    assert [side.dim_param or side.dim_value for side in taken.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim] == ["batch", 3]
    assert str(Path(torch.__file__).parent).encode() not in (packed / "model.onnx").read_bytes()


def test_network_is_rebuilt_from_the_bundle_alone(lively, packed):
    expected, made = checkpoint.load(lively).network.state_dict(), checkpoint.load(packed)
    assert all(torch.equal(expected[key], value) for key, value in made.network.state_dict().items())
    config = json.loads((packed / "config.json").read_text())
    own = checkpoint.load(lively).metadata
    assert {key: config[key] for key in own if key != "metrics"} == {k: own[k] for k in own if k != "metrics"}
    weights = safetensors.torch.load_file(packed / "model.safetensors")
    network = models.build(config["model"], len(config["class_names"]), config["mean"], config["std"])
    network.load_state_dict(weights)


def test_sums_are_right_for_every_file_and_no_file_holds_code(packed):
    listed = dict(reversed(line.split("  ")) for line in (packed / "SHA256SUMS").read_text().splitlines())
    assert set(listed) | {"SHA256SUMS"} == {file.name for file in packed.iterdir()}
    for name, digest in listed.items():
        assert hashlib.sha256((packed / name).read_bytes()).hexdigest() == digest
    assert set(listed) == {"model.onnx", "model.safetensors", "config.json", "README.md"}
    assert {file.stat().st_mode & 0o444 for file in packed.iterdir()} == {(packed.stat().st_mode) & 0o444}


def test_program_for_torch_is_written_where_it_is_asked_for(at_trained, tmp_path):
    assert cli.main(["export", str(at_trained), "--out", str(tmp_path / "b"), "--pt2"]) == 0
    program = torch.export.load(tmp_path / "b" / "model.pt2").module()
    image = np.stack([np.full((32, 32, 3), grey, np.uint8) for grey in (0, 90, 255)])
    expected = load(tmp_path / "b").probabilities(image)
    assert np.allclose(program(torch.from_numpy(image)).detach().numpy(), expected, atol=1e-6)
    assert "model.pt2" in (tmp_path / "b" / "README.md").read_text()


def test_temperature_beside_the_checkpoint_is_built_in(lively, at_trained, tmp_path):
    shutil.copytree(lively, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "best.ckpt"
    calibration.write(file, 2.5, {})
    assert cli.main(["export", str(file)]) == 0
    made = load(tmp_path / "run" / "bundle", calibrated=True)
    expected = load(file, calibrated=True)
    for one, other in zip(made.predict(pictures()), expected.predict(pictures()), strict=True):
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)
    assert checkpoint.load(tmp_path / "run" / "bundle", calibrated=True).temperature == 2.5
    assert "2.500" in (tmp_path / "run" / "bundle" / "README.md").read_text()


def test_calibrated_needs_a_bundle_with_a_temperature(packed):
    for way in (load, checkpoint.load):
        with pytest.raises(UserError, match="before a temperature was known"):
            way(packed, calibrated=True)


def test_bundle_that_answers_otherwise_is_not_made(lively, at_trained, tmp_path, monkeypatch, capsys):
    right = convert.traced

    def wrong(network, temperature, image_size):
        return right(network, 1.1 * temperature, image_size)

    monkeypatch.setattr(convert, "traced", wrong)
    assert cli.main(["export", str(lively), "--out", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err
    assert re.search(r"failed: .* of 12 validation pictures of photos, 0 get another label, .* by up to 0\.", said)
    assert list(tmp_path.iterdir()) == []


class Fixed:
    """Answers with rows that are given to it."""

    def __init__(self, rows):
        self.rows = rows

    def predict(self, paths, batch_size):
        from project.predictions import Prediction

        return [Prediction.of(path, row, ["a", "b"]) for path, row in zip(paths, self.rows, strict=True)]


def test_a_tie_is_no_other_label_and_a_clear_answer_is():
    two = parity.Labelled(["x", "y"], ["a", "b"], "pictures")
    sure = Fixed([[0.50002, 0.49998], [0.1, 0.9]])
    found, _ = parity.compare(sure, Fixed([[0.49998, 0.50002], [0.1, 0.9]]), two)
    assert found["largest_difference"] == pytest.approx(4e-5)
    with pytest.raises(FailedRun, match="0 get another label"):
        parity.compare(sure, Fixed([[0.50002, 0.49998], [0.1002, 0.8998]]), two)
    with pytest.raises(FailedRun, match="1 get another label"):
        parity.compare(sure, Fixed([[0.50002, 0.49998], [0.6, 0.4]]), two)
    with pytest.raises(FailedRun, match="nan"):
        parity.compare(sure, Fixed([[0.50002, 0.49998], [float("nan"), float("nan")]]), two)


@pytest.mark.slow
def test_int8_is_kept_where_it_is_smaller_and_as_accurate(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    torch.manual_seed(0)
    network = models.build("alexnet", 3)
    _let_answers_differ(network, 64)
    content = torch.load("runs/photos/version_0/checkpoints/best.ckpt", weights_only=True)
    content["metadata"] |= {"model": "alexnet", "image_size": 64}
    content["state_dict"] = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save(content, tmp_path / "best.ckpt")
    # an untrained network is right by chance: what counts is the comparison with itself
    asked = parity.ask
    monkeypatch.setattr(parity, "ask", lambda *a, **k: asked(*a, **k)._replace(accuracy=0.9))
    arguments = ["export", str(tmp_path / "best.ckpt"), "--quantize", "int8"]
    assert cli.main([*arguments, "--out", str(tmp_path / "small")]) == 0
    assert re.search(
        r"int8: accuracy 90.00% becomes 90.00%, .* 228\.\d MB become 57\.\d .*: kept", capsys.readouterr().out
    )
    assert (tmp_path / "small" / "model.onnx").stat().st_size < 65e6
    made = load(tmp_path / "small")
    assert made.metadata["precision"] == "int8"
    assert made.metadata["int8"]["kept"]
    exact = checkpoint.load(tmp_path / "small")
    found, expected = (np.array([row.probabilities for row in one.predict(pictures())]) for one in (made, exact))
    assert np.ptp(expected, axis=0).max() > 0.1
    assert np.abs(found - expected).max() < 0.06
    assert "8 bits are in `model.onnx`" in (tmp_path / "small" / "README.md").read_text()


def test_convolutions_are_of_8_bits_too_and_a_picture_gets_the_same_in_any_batch(
    lively, at_trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "LOSS", 10)  # points: one of 12 pictures is 8
    assert cli.main(["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"int8: accuracy .*\(3\.\d x smaller\).*: kept", out)
    assert "8 bits are in `model.onnx`" in (tmp_path / "b" / "README.md").read_text()
    made, exact = load(tmp_path / "b"), load(lively)
    alone = np.array([one.probabilities for one in made.predict(pictures(), batch_size=1)])
    together = np.array([one.probabilities for one in made.predict(pictures(), batch_size=9)])
    assert np.abs(alone - together).max() < 1e-6
    others = np.array([one.probabilities for one in exact.predict(pictures())])
    assert 1e-4 < np.abs(alone - others).max() < 0.1


def training_pictures(run):
    with (run / "split.csv").open() as file:
        return [row["path"] for row in csv.DictReader(file) if row["split"] == "train"]


def test_scales_of_8_bits_are_of_training_pictures(lively, at_trained, tmp_path, monkeypatch):
    seen, write = [], convert.write_int8

    def noted(source, file, metadata, samples):
        seen.extend(picture.tobytes() for batch in samples for picture in batch)
        write(source, file, metadata, samples)

    monkeypatch.setattr(convert, "write_int8", noted)
    assert cli.main(["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]) == 0
    training = [images.read(Path("photos", path), 32).tobytes() for path in training_pictures(lively)]
    assert sorted(seen) == sorted(training)


def test_int8_needs_training_pictures(lively, at_trained, tmp_path, refused):
    shutil.copytree("photos", tmp_path / "other")
    wanted = ["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b"), "--data"]
    training = [tmp_path / "other" / path for path in training_pictures(lively)]
    for file in training:
        file.write_bytes(b"no picture")
    assert f"None of the {len(training)} training pictures" in refused(*wanted, str(tmp_path / "other"))
    for file in training:
        file.unlink()
    said = refused(*wanted, str(tmp_path / "other"))
    assert f"none of the {len(training)} of" in said
    assert "leave out --quantize" in said
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_network_that_the_quantizer_does_not_know_stays_float32(
    lively, at_trained, tmp_path, monkeypatch, capsys, refused
):
    def fails(error):
        def quantize(*_, **__):
            raise error

        monkeypatch.setattr(onnxruntime.quantization, "quantize_static", quantize)
        return ["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]

    full = refused(*fails(OSError(28, "No space left on device")))
    assert f"b cannot be written: No space left on device (8 bits need room in {tempfile.gettempdir()}, too)" in full
    assert cli.main(fails(ValueError("no rule for Foo\n  more"))) == 0
    said = "int8: ONNX Runtime cannot compute the network in 8 bits: no rule for Foo; model.onnx stays float32\n"
    assert said in capsys.readouterr().out
    made = load(tmp_path / "b")
    assert made.metadata["precision"] == "float32"
    assert "int8" not in made.metadata
    assert (tmp_path / "b" / "README.md").is_file()
    assert not (tmp_path / "b" / "int8").exists()


def test_layers_of_weights_compute_in_8_bits_and_the_products_of_attention_do_not(tmp_path):
    class Attentive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.head = torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Linear(4, 2)
            self.key = torch.nn.Linear(4, 4, bias=False)

        def forward(self, image):
            tokens = self.seen(image / 255).relu().flatten(2).transpose(1, 2)
            return self.head(((self.key(tokens) @ tokens.transpose(1, 2)).softmax(-1) @ tokens).mean(1))

    convert.write_onnx(convert.traced(Attentive().eval(), 1.0, 16), tmp_path / "exact.onnx", {})
    samples = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 16, 3), np.uint8)
    convert.write_int8(tmp_path / "exact.onnx", tmp_path / "small.onnx", {"precision": "int8"}, samples)
    model = onnx.load(tmp_path / "small.onnx")
    made_by = {output: node for node in model.graph.node for output in node.output}
    in_8_bits, exact = [], []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            kinds = [made_by[name].op_type if name in made_by else "" for name in node.input[:2]]
            (in_8_bits if kinds == ["DequantizeLinear"] * 2 else exact).append(node.op_type)
    assert sorted(in_8_bits) == ["Conv", "Gemm", "MatMul"]
    assert exact == ["MatMul", "MatMul"]
    assert "Relu" not in {node.op_type for node in model.graph.node}  # the scale of the convolution does it
    takers = {node.input[0]: node.op_type for node in model.graph.node}
    linear = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert "QuantizeLinear" not in {takers.get(node.output[0]) for node in linear}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"precision": "int8"}


def test_int8_is_not_kept_where_it_gains_nothing(lively, at_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "write_int8", lambda source, file, *_: shutil.copy(source, file))
    monkeypatch.setattr(parity, "side_by_side", lambda *runs: [1.0, 1.0])
    assert cli.main(["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]) == 0
    assert re.search(r"int8: .*\(1\.0 x smaller\).*not worth it", capsys.readouterr().out)
    _assert_is_exact(lively, tmp_path)


def test_int8_is_not_kept_where_it_loses_accuracy(lively, at_trained, tmp_path, monkeypatch, capsys):
    asked, accuracies = parity.ask, iter((0.99, 0.99, 0.98))  # the checkpoint's, the bundle's, that of 8 bits
    monkeypatch.setattr(parity, "ask", lambda *a, **k: asked(*a, **k)._replace(accuracy=next(accuracies)))
    monkeypatch.setattr(parity, "side_by_side", lambda *runs: [9.0, 1.0])
    assert cli.main(["export", str(lively), "--quantize", "int8", "--out", str(tmp_path / "b")]) == 0
    assert re.search(r"int8: accuracy 99.00% becomes 98.00%.*9.0 x as fast.*not worth it", capsys.readouterr().out)
    _assert_is_exact(lively, tmp_path)


def _assert_is_exact(lively, tmp_path):
    made = load(tmp_path / "b")
    assert (made.metadata["precision"], made.metadata["int8"]["kept"]) == ("float32", False)
    assert {file.name for file in (tmp_path / "b").iterdir()} == {
        *("model.onnx", "model.safetensors", "config.json", "README.md", "SHA256SUMS")
    }
    for one, other in zip(made.predict(pictures()), load(lively).predict(pictures()), strict=True):
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)


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
    assert export.is_worth_it(lost, smaller, faster) == keep


NETWORKS = ["alexnet", "resnet18", "mobilenet_v3_small", "timm/efficientnet_b0", "timm/vit_tiny_patch16_224"]


def _let_answers_differ(network, size):
    """Else an untrained network says nearly the same of every picture, and so does one that is exported wrongly."""
    image = torch.from_numpy(np.stack([images.read(path, size) for path in pictures(14)])).permute(0, 3, 1, 2)
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
def test_networks_of_all_kinds_pass_the_comparison_and_answer_batches_of_any_size(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(trained)
    torch.manual_seed(0)
    network, size = models.build(name, 3).eval(), 224 if "vit" in name else 64
    _let_answers_differ(network, size)
    content = torch.load("runs/photos/version_0/checkpoints/best.ckpt", weights_only=True)
    content["metadata"] |= {"model": name, "image_size": size}
    content["state_dict"] = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save(content, tmp_path / "best.ckpt")
    assert cli.main(["export", str(tmp_path / "best.ckpt"), "--out", str(tmp_path / "b")]) == 0
    expected = np.array([one.probabilities for one in load(tmp_path / "best.ckpt").predict(pictures(14))])
    assert np.ptp(expected, axis=0).max() > 0.1
    made = load(tmp_path / "b")
    assert isinstance(made, bundle.Bundle)
    for batch_size in (1, 2, 7):
        found = np.array([one.probabilities for one in made.predict(pictures(14), batch_size)])
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.slow
def test_cards_snippet_gives_the_same_answer_without_torch(lively, at_trained, tmp_path):
    for resize in ("stretch", "crop", "pad"):
        content = torch.load(lively / "checkpoints" / "best.ckpt", weights_only=True)
        content["metadata"]["resize"] = resize
        torch.save(content, tmp_path / f"{resize}.ckpt")
        folder = tmp_path / resize
        assert cli.main(["export", str(tmp_path / f"{resize}.ckpt"), "--out", str(folder)]) == 0
        picture = folder / "picture.jpg"
        Image.open("photos/red/003.png").resize((640, 90)).save(picture, exif=_turned())
        (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 10
        code = snippet + "\nimport sys; assert 'torch' not in sys.modules"
        said = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
        (expected,) = load(tmp_path / f"{resize}.ckpt").predict([picture])
        label, probability = said.stdout.split()
        assert label == expected.label
        assert float(probability) == pytest.approx(expected.probability, abs=1e-5)


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


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
    # test has found a temperature, which is in the bundle, in the loss, and in the order of different pictures' answers
    assert f"divided by {calibration.read(run / 'checkpoints' / 'best.ckpt'):.3f}" in text
    made = load(run / "bundle").predict([str(file) for file, _ in _tested(run)])
    own = [
        one.probabilities[["blue", "green", "red"].index(label)]
        for one, (_, label) in zip(made, _tested(run), strict=True)
    ]
    assert f"| loss | {-np.mean(np.log(own)):.3f} |" in text
    answers = np.array([one.probabilities for one in made], dtype=np.float64)
    answers /= answers.sum(axis=1, keepdims=True)
    area = reference.roc_auc_score([label for _, label in _tested(run)], answers, multi_class="ovr")
    assert f"| AUROC | {area:.3f} |" in text
    assert re.search(r"\| accuracy \| [\d.]+ % \| [\d.]+ to [\d.]+ % \|", text)
    assert "On 24 test pictures" in text
    assert "| red | 28 | 4 | 8 |" in text
    assert "| all classes | 84 | 12 | 24 |" in text


def _tested(run):
    with (run / "split.csv").open() as stream:
        return [(Path("photos", row["path"]), row["label"]) for row in csv.DictReader(stream) if row["split"] == "test"]


def test_card_without_a_test_or_a_run_says_so(at_trained, tmp_path):
    shutil.copy(at_trained / "checkpoints" / "best.ckpt", tmp_path / "mine.ckpt")
    assert cli.main(["export", str(tmp_path / "mine.ckpt")]) == 0
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert text.startswith("# mine: squeezenet1\\_1\n")
    assert "not been measured on test pictures" in text
    assert "how many of each class is not known" in text


def test_names_that_markdown_or_html_would_read_stay_names(at_trained, tmp_path):
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"]["class_names"] = ["a|b *c*", "<script>", "größe\n大"]
    torch.save(content, tmp_path / "odd.ckpt")
    with (tmp_path / "split.csv").open("w", newline="", encoding="utf-8") as stream:
        picture = Path("photos/red/003.png").resolve()
        csv.writer(stream).writerows([("path", "label", "split"), (picture, "größe\n大", "val")])
    Path(tmp_path / "bob's_cells").symlink_to(Path("photos").resolve())
    arguments = ["--out", str(tmp_path / "b"), "--data", str(tmp_path / "bob's_cells")]
    assert cli.main(["export", str(tmp_path / "odd.ckpt"), *arguments]) == 0
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert "shows: a\\|b \\*c\\*, &lt;script&gt;, größe 大." in text
    assert "| größe 大 | 0 | 1 | 0 |" in text
    assert load(tmp_path / "b").class_names == ["a|b *c*", "<script>", "größe\n大"]


def test_card_is_called_after_the_data_however_the_run_is_named(lively, trained, tmp_path, monkeypatch):
    run = shutil.copytree(lively, tmp_path / "runs" / "solar_cells" / "version_0")
    run.with_name("version_0").parent.parent.joinpath("latest").symlink_to(run)
    for place, given, number in ((tmp_path, "runs/latest", 0), (run, ".", 1), (tmp_path, str(run), 2)):
        monkeypatch.chdir(place)
        out = str(tmp_path / str(number))
        assert cli.main(["export", given, "--out", out, "--data", str(trained / "photos")]) == 0
        assert Path(out, "README.md").read_text().startswith("# solar\\_cells: squeezenet1\\_1\n")


def test_without_its_split_the_pictures_are_dealt_out_as_in_training_and_it_is_said(
    lively, at_trained, tmp_path, capsys
):
    content = torch.load(lively / "checkpoints" / "best.ckpt", weights_only=True)
    root = content["metadata"]["config"]["data"]["root"]
    chosen = {}
    for seed in (0, 1):
        content["metadata"]["config"]["data"]["split_seed"] = seed
        made = manifest.load(Path(root), seed=seed)
        expected = {str(Path(root, made.paths[row])) for row in made.rows("val").tolist()}
        found = parity.validation(tmp_path, content["metadata"], None)
        assert set(found.paths) == expected
        chosen[seed] = expected
        assert "it may have learned from some of these val pictures" in capsys.readouterr().out
    assert chosen[0] != chosen[1]
    parity.validation(lively, content["metadata"], None)
    assert "learned from" not in capsys.readouterr().out


def test_pictures_of_other_classes_are_refused(lively, packed, at_trained, tmp_path, refused):
    """None would be answered rightly, by 32 bits as by 8."""
    make_pictures(tmp_path / "others", {"left": 10, "right": 10})
    shutil.copy(lively / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    for verb in (["export", str(tmp_path / "alone.ckpt"), "--quantize", "int8"], ["report", str(packed)]):
        said = refused(*verb, "--data", str(tmp_path / "others"), "--out", str(tmp_path / "out"))
        assert "are of other classes (left, right) than the network knows (blue, green, red)" in said
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_gone_or_elsewhere(at_trained, tmp_path, monkeypatch, refused):
    run = tmp_path / "runs" / "photos" / "version_0"
    shutil.copytree(at_trained, run)
    shutil.copytree("photos", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    said = refused("export", str(run), "--out", "b")
    assert "none of the 12 validation pictures" in said
    assert "--data" in said
    assert "none of the 12" in refused("export", str(run), "--out", "b", "--data", "nowhere")
    shutil.copy(run / "checkpoints" / "best.ckpt", "alone.ckpt")
    assert "validation pictures of . is in photos" in refused("export", "alone.ckpt", "--out", "b")
    for file in Path("moved").rglob("*.png"):
        file.write_bytes(b"no picture")
    assert "None of the 12" in refused("export", str(run), "--out", "b", "--data", "moved")
    assert not [name for name in os.listdir() if "b" in name.split(".")]


def test_pictures_that_have_moved_are_found_by_data(at_trained, tmp_path, monkeypatch, capsys):
    shutil.copytree("photos", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(at_trained), "--out", "b", "--data", "moved"]) == 0
    assert "12 validation pictures of moved" in capsys.readouterr().out


def test_damaged_checkpoint_of_a_tested_run_is_named(lively, at_trained, tmp_path, refused):
    file = shutil.copytree(lively, tmp_path / "run") / "checkpoints" / "best.ckpt"
    calibration.write(file, 2.0, {})
    file.write_bytes(file.read_bytes()[:-1000])
    assert "best.ckpt is damaged" in refused("export", str(file))
    assert not (tmp_path / "run" / "bundle").exists()


def test_weights_of_less_precision_are_brought_to_32_bits(lively, at_trained, tmp_path):
    content = torch.load(lively / "checkpoints" / "best.ckpt", weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: t.bfloat16() if t.is_floating_point() else t for k, t in state.items()}
    torch.save(content, tmp_path / "less.ckpt")
    assert cli.main(["export", str(tmp_path / "less.ckpt")]) == 0
    exact = np.array([one.probabilities for one in load(lively).predict(pictures())])
    for path in ("less.ckpt", "bundle"):
        found = np.array([one.probabilities for one in load(tmp_path / path).predict(pictures())])
        assert np.abs(found - exact).max() < 0.05


def test_mistakes_are_told_in_a_sentence(at_trained, packed, tmp_path, refused, monkeypatch):
    assert "bundle exists" in refused("export", str(at_trained), "--out", str(packed))
    assert "no checkpoint none.ckpt" in refused("export", "none.ckpt")
    assert "is a bundle, no checkpoint" in refused("export", str(packed))
    assert "File name too long" in refused("export", "x" * 300)
    assert "File name too long" in refused("export", str(at_trained), "--data", "x" * 300)
    assert "--quantize is int4" in refused("export", str(at_trained), "--quantize", "int4")
    assert "no folder" in refused("export", str(at_trained), "--out", str(tmp_path / "no" / "b"))
    monkeypatch.setattr(convert, "LIBRARIES", ("onnx", "no_such_library"))
    said = refused("export", str(at_trained), "--out", str(tmp_path / "b"))
    assert "no_such_library" in said
    assert "pip install -e .[export]" in said


def test_full_disk_leaves_nothing(at_trained, tmp_path, refused, monkeypatch):
    full_disk(monkeypatch)
    assert "cannot be written: No space left" in refused("export", str(at_trained), "--out", str(tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


def test_network_that_is_no_graph_is_refused_in_a_sentence():
    class Branching(torch.nn.Module):
        def forward(self, image):
            return image.float().mean((2, 3)) if image.sum() > 7 else image.float().amax((2, 3))

    with pytest.raises(UserError, match=r"torch\.export cannot make a graph"):
        convert.traced(Branching(), 1.0, 8)


def test_network_for_which_onnx_has_no_words_is_refused_in_a_sentence(tmp_path):
    class Chained(torch.nn.Module):
        def forward(self, image):
            return torch.linalg.matrix_exp(image.float().mean(1)).mean(2)

    program = convert.traced(Chained(), 1.0, 8)
    with pytest.raises(UserError, match=r"ONNX has no equal of what the network does: .*matrix_exp"):
        convert.write_onnx(program, tmp_path / "model.onnx", {})
    assert list(tmp_path.iterdir()) == []
