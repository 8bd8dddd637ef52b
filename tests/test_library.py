"""The library: Classifier and ImageData under a plain Trainer, `fit` as a function, and what a user installs."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import project
from project import Classifier, ImageData, cli, fit, load
from project.data import manifest
from project.errors import UserError
from tests.conftest import ALIVE, make_images, read_csv

ROOT = Path(__file__).parents[1]
NAME = ALIVE[1]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
# Lightning's own advice for a plain Trainer, which knows nothing of the size of the data
ADVICE = ("ignore:The number of training batches", "ignore:.*does not have many workers", "ignore:Starting from v1.9.0")
pytestmark = [pytest.mark.filterwarnings(line) for line in ADVICE]


def of_photos(**options):
    data = ImageData(Path("photos"), **{"image_size": 32, "batch_size": 8, "workers": 0} | options)
    return data, Classifier(data.class_names, data.image_size, name=NAME, lr=0.001)


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """A folder with photos/ and a checkpoint of a plain Trainer with its defaults, below lightning_logs/."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "photos").symlink_to(trained / "photos")
    with contextlib.chdir(folder):
        data, model = of_photos()
        trainer = Trainer(max_epochs=2, **{key: value for key, value in QUIET.items() if key != "logger"})
        trainer.fit(model, data)
        return folder, Path(trainer.checkpoint_callback.best_model_path).relative_to(folder)


def test_the_library_is_imported_without_torch_until_it_is_used():
    code = "import sys, project; from project import cli; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(project.__all__) == {"Classifier", "ImageData", "fit", "load"}
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = project.train


def test_a_plain_trainer_fits_validates_tests_and_predicts_and_the_data_is_set_up_by_itself(photos, capsys):
    rows = manifest.load(photos)
    test = [rows.paths[row] for row in rows.rows("test")]
    (photos / test[0]).write_bytes(b"")
    data, model = of_photos()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))[:2]
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (8, 3, 32, 32), torch.int64)
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(model, data)
    assert trainer.validate(model, data, verbose=False)[0]["val/loss"] < 1.1
    tested = trainer.test(model, data, verbose=False)[0]
    predicted = torch.cat(trainer.predict(model, data))
    assert predicted.shape == (23, 3)
    assert predicted.sum(dim=1).tolist() == pytest.approx([1] * 23, abs=1e-5)
    labels = torch.from_numpy(data.dataset("test").labels[1:])
    assert (predicted.argmax(dim=1) == labels).float().mean() == pytest.approx(tested["test/accuracy"])
    assert capsys.readouterr().out.count(f"left out, unreadable: photos/{test[0]}") == 1


def test_setup_without_a_stage_checks_test_images_where_there_are_any_and_predict_needs_them(workplace):
    for split in ("train", "val"):
        make_images(workplace / "photos" / split, {"red": 9, "blue": 9})
    data, model = of_photos()
    data.setup()
    with pytest.raises(UserError, match="photos has no test images"):
        Trainer(**QUIET).predict(model, data)
    for name in ("red", "blue"):
        make_images(workplace / "photos" / "test", {name: 1}).joinpath(name, "000.png").write_bytes(b"")
    with pytest.raises(UserError, match="None of the 2 test images can be read"):
        of_photos()[0].setup()


def test_a_checkpoint_of_a_plain_trainer_holds_what_those_of_fit_hold_as_plain_types(plain, trained):
    folder, file = plain
    path = folder / file
    content = torch.load(path, weights_only=True)
    own = torch.load(trained / "runs" / "photos" / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)
    assert set(content["metadata"]) == set(own["metadata"]) - {"validated"}
    metadata = load(path).metadata
    assert (metadata.model, metadata.image_size, metadata.class_names) == (NAME, 32, ["blue", "green", "red"])
    recorded, options = metadata.config, own["metadata"]["config"]
    assert (recorded["data"]["root"], recorded["data"]["batch_size"], recorded["seed_everything"]) == ("photos", 8, 0)
    assert recorded["data"].keys() == options["data"].keys()
    assert recorded["model"].keys() == options["model"].keys() - {"weights"}
    assert metadata.versions["lightning"]
    assert Classifier.load_from_checkpoint(path, weights_only=True).hparams["lr"] == 0.001
    assert ImageData.load_from_checkpoint(path, weights_only=True).hparams["image_size"] == 32


@pytest.mark.full
def test_every_verb_takes_a_checkpoint_of_a_plain_trainer(plain, workplace, capsys, refused):
    folder, file = plain
    Path("photos").symlink_to(folder / "photos")
    file.parent.mkdir(parents=True)
    file.write_bytes((folder / file).read_bytes())
    version = file.parents[1]
    trainer, model = Trainer(enable_checkpointing=False, **QUIET), Classifier.load_from_checkpoint(file)
    accuracy = trainer.validate(model, of_photos()[0], verbose=False)[0]["val/accuracy"]
    assert cli.main(["validate", str(file)]) == 0
    assert f"val/accuracy {100 * accuracy:.1f} %" in capsys.readouterr().out
    assert cli.main(["test", str(file)]) == 0
    assert json.loads((version / "test_metrics.json").read_text())["n"] == 24
    assert (version / "report.html").exists()
    assert cli.main(["predict", str(file), "photos/red", "--out", "red.csv"]) == 0
    assert {row["label"] for row in read_csv("red.csv")} <= {"red", "blue", "green"}
    for verb in ("export", "report"):
        assert cli.main([verb, str(file)]) == 0
    assert cli.main(["explain", str(file), "photos/red/000.png"]) == 0
    assert cli.main(["predict", str(version / "bundle"), "photos/red", "--out", "bundle.csv"]) == 0
    assert [row["label"] for row in read_csv("red.csv")] == [row["label"] for row in read_csv("bundle.csv")]
    assert "has completed its 2 epochs" in refused("fit", "--ckpt_path", str(file))
    assert cli.main(["fit", "--ckpt_path", str(file), "--trainer.max_epochs", "3"]) == 0
    assert "epoch 3/3" in capsys.readouterr().out


@pytest.mark.full
def test_what_the_page_says_runs_as_a_script(photos):
    photos.rename("DIR")
    for snippet in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "library.md").read_text(), re.DOTALL | re.M):
        Path("own.py").write_text(snippet)
        subprocess.run([sys.executable, "own.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert Path("runs/first/version_0/test_metrics.json").exists()


SCRIPT = """
import json, sys
from lightning.pytorch import Trainer, seed_everything
from project import Classifier, ImageData

ranks, file = int(sys.argv[1]), sys.argv[2]
seed_everything(0)
data = ImageData("photos", image_size=32, batch_size=5, workers=0)
model = Classifier(data.class_names, data.image_size, name={name!r}, lr=0.001)
parallel = {{"strategy": "ddp"}} if ranks > 1 else {{}}
trainer = Trainer(accelerator="cpu", devices=ranks, **parallel, max_epochs=2, logger=False, enable_checkpointing=False)
trainer.fit(model, data)
results = [trainer.validate(model, data)[0], trainer.test(model, data)[0], trainer.callback_metrics]
predicted = sum(len(batch) for batch in trainer.predict(model, data))
trainer.save_checkpoint(file)
if trainer.is_global_zero:
    results = {{key: float(value) for result in results for key, value in result.items()}}
    print("RESULT", json.dumps([results, predicted]))
"""


@pytest.mark.full
def test_two_ranks_of_a_plain_trainer_learn_and_measure_like_one_process(photos):
    """24 test images in batches of 5: the last one has 4, of which each rank has 2."""
    Path("script.py").write_text(SCRIPT.format(name=NAME))
    results = []
    for ranks in (1, 2):
        command = [sys.executable, "script.py", str(ranks), f"{ranks}.ckpt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.split("RESULT")[1]))
    (alone, every), (together, share) = results
    assert together == pytest.approx(alone, abs=1e-4)
    assert (every, share) == (24, 14)
    # of the same weights, the same figures to the last digit that the order of a sum leaves
    states = [torch.load(f"{ranks}.ckpt", weights_only=True)["state_dict"] for ranks in (1, 2)]
    torch.testing.assert_close(*states, atol=1e-3, rtol=1e-2)


def test_images_and_labels_of_another_dataloader_train_and_are_predicted_and_mistakes_are_one_sentence(workplace):
    images, labels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12, dtype=torch.int32) % 2
    pairs = DataLoader(TensorDataset(images, labels), batch_size=4)
    model, trainer = Classifier(["a", "b"], 32, name=NAME), Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(model, pairs, pairs)
    assert torch.cat(trainer.predict(model, DataLoader(images, batch_size=4))).shape == (12, 2)
    trainer.save_checkpoint("own.ckpt")
    assert load("own.ckpt").metadata.config["data"] == {}
    scaled = DataLoader(TensorDataset(images / 255, labels), batch_size=4)
    with pytest.raises(UserError, match=r"float32 are given; give uint8.*round\(\)\.to\(torch\.uint8\)"):
        trainer.test(model, scaled)
    named = DataLoader([{"image": image, "label": 0} for image in images])
    with pytest.raises(UserError, match=r"A batch is a dict; give \(images, labels\)"):
        trainer.test(model, named)


@pytest.mark.slow
def test_fit_returns_its_run_with_figures_and_tests_predicts_and_resumes_it(photos, capsys):
    small = {"image_size": 32, "workers": 0, "batch_size": 8}
    Path("own.yaml").write_text("patience: 9\ntrainer: {max_epochs: 9}")
    run = fit(photos, config="own.yaml", data=small, name="first", **{"model.name": NAME, "trainer.max_epochs": 2})
    assert (run.folder, run.best.exists(), run.last.exists()) == (Path("runs/first/version_0"), True, True)
    assert "patience: 9" in (run.folder / "config.yaml").read_text()
    validated = [row for row in read_csv(run.folder / "metrics.csv") if row["val/loss"]]
    best = min(validated, key=lambda row: float(row["val/loss"]))
    assert run.figures == {key: pytest.approx(float(best[key])) for key in best if key.startswith("val/")}
    tested = run.test(report=False)
    assert tested == json.loads((run.folder / "test_metrics.json").read_text())
    assert tested["n"] == 24
    assert not (run.folder / "report.html").exists()
    predicted = run.predict(photos / "red", batch_size=7)
    assert [Path(one.path).name for one in predicted] == [f"{n:03d}.png" for n in range(40)]
    alone = run.predict([photos / "red" / "003.png"])[0]
    assert predicted[3]._replace(probabilities=(), probability=0.0) == alone._replace(probabilities=(), probability=0.0)
    assert predicted[3].probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    again = fit(resume=run.folder, trainer={"max_epochs": 3})
    assert again == run
    assert "epoch 3/3" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.image_size is 0; it must be at least 1|--data\.image_size"):
        fit(photos, data={"image_size": 0})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 3}, "seeds makes several runs and fit"),
        ({"trainer.fast_dev_run": True, "model.name": NAME, "data.workers": 0}, "leaves no run to return"),
        ({"model.name": "timm/resnet18.a:b"}, "timm cannot make resnet18"),
        ({"trainer": {"callbacks": [object()]}}, "trainer.callbacks is .*object.*'class_path'"),
        ({"data": {"imagesize": 3}}, "There is no option --data.imagesize. Did you mean --data.image_size"),
        ({"epochs": 3}, "no option --epochs. Did you mean --trainer.max_epochs"),
    ],
)
def test_a_mistake_in_the_options_of_fit_is_one_sentence(options, said, workplace):
    with pytest.raises(UserError, match=said):
        fit(**options)
    assert not Path("runs").exists()


@pytest.mark.full
def test_a_type_checker_knows_what_the_library_takes_and_returns(tmp_path):
    lines = ["from project import Classifier, ImageData, fit, load", "fit(3)", "fit('a').best + 1", "load(4)"]
    lines += ["ImageData(resize=1)", "Classifier([1], 32)", "fit('a', name='b').predict('c')[0].label"]
    (own := tmp_path / "own.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", own]  # with the settings and the cache of this project
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"own\.py:(\d): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    kinds = ("arg-type", "operator", "arg-type", "arg-type", "list-item")
    assert found == [(str(line), kind) for line, kind in enumerate(kinds, start=2)], done.stdout
