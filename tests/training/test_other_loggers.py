"""Loggers beside TensorBoard and metrics.csv: what they get of a fit, on CSVLogger and the real MLflow and W&B."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import cli
from tests.conftest import SMALL, read_csv

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.log_every_n_steps", "2", "--trainer.max_epochs"]
RUN = Path("runs/photos/version_0")
FIGURES = {"train/first_batch", *(f"val/{n}" for n in ("confusion_matrix", "precision_recall", "reliability", "roc"))}
FIGURES |= {"val/samples"}
OPTIONS = {"model.name": "squeezenet1_1", "data.root": "photos", "data.batch_size": 8, "seed_everything": 0}
CSV = ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=mine"]
needs_mlflow, needs_wandb = (
    pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{module} is not installed; make install does it"
    )
    for module in ("mlflow", "wandb")
)


def added(name, **options):
    """The words that add one of Lightning's loggers to a fit."""
    return [f"--trainer.logger+={name}", *(f"--trainer.logger.{option}={value}" for option, value in options.items())]


def points(run=RUN):
    """The scalars in the event files of a run: {tag: [(step, value)]}."""
    shown = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def drawn(tag, step, run=RUN):
    """The size of a figure in TensorBoard."""
    shown = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    (image,) = (image for image in shown.Images(tag) if image.step == step)
    return image.width, image.height


def assert_a_drawing(file, tag):
    """The PNG file has something on it."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 2, tag
        return image.size


def in_csv(folder):
    """The points in the file of a CSVLogger."""
    found = {}
    for row in read_csv(folder / "metrics.csv"):
        for tag, value in row.items():
            if value and tag not in ("step", "epoch"):
                found.setdefault(tag, []).append((int(row["step"]), float(value)))
    return found


def the_same(found, expected):
    """Whether points are those of TensorBoard, whose values are float32 and whose epochs count from 0."""
    expected = {tag: values for tag, values in expected.items() if tag not in ("epoch", "hp_metric")}
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-5, abs=1e-6)) for step, value in values], tag
    return True


def test_csv_logger_has_all_options_and_scalars_and_no_figures_and_the_runs_file_keeps_its_columns(photos):
    assert cli.main([*FIT, "1"]) == 0
    columns = read_csv(RUN / "metrics.csv")[0].keys()
    assert cli.main([*FIT, "1", *CSV]) == 0
    run, folder = RUN.with_name("version_1"), Path("mine/lightning_logs/version_0")
    assert {"val_class/recall/red", "speed/images_per_second", "val_best/accuracy", "lr-Adam"} <= points(run).keys()
    assert the_same(in_csv(folder), points(run))
    options = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert options.items() >= OPTIONS.items()
    assert options["trainer.max_epochs"] == 1
    assert {file.name for file in folder.iterdir()} == {"metrics.csv", "hparams.yaml"}
    assert read_csv(run / "metrics.csv")[0].keys() == columns
    assert not [column for column in columns if column.startswith(("val_class", "val_best", "speed"))]


@pytest.mark.slow
def test_the_same_command_resumes_with_the_same_loggers(photos):
    metrics = ["--model.metrics+=torchmetrics.CohenKappa", "--model.metrics.task=multiclass"]
    assert cli.main([*FIT, "1", *CSV, *metrics]) == 0
    recorded = yaml.safe_load((RUN / "config.yaml").read_text())
    os.environ.pop("PROJECT_RUN", None)
    assert cli.main([*FIT, "2", *CSV, *metrics, "--resume", str(RUN)]) == 0
    resumed = yaml.safe_load((RUN / "config.yaml").read_text())
    assert len(resumed["trainer"]["logger"]) == len(resumed["model"]["metrics"]) == 1
    assert resumed["trainer"]["logger"] == recorded["trainer"]["logger"]
    first, second = (in_csv(Path(f"mine/lightning_logs/version_{n}"))["val/loss"] for n in (0, 1))
    assert [*first, *second] == [(step, pytest.approx(value)) for step, value in points()["val/loss"]]
    assert yaml.safe_load(Path("mine/lightning_logs/version_1/hparams.yaml").read_text())["trainer.max_epochs"] == 2


def test_without_loggers_nothing_is_logged(photos, monkeypatch):
    monkeypatch.setattr(CSVLogger, "log_metrics", None)
    assert cli.main([*FIT, "1", "--trainer.logger", "false"]) == 0
    assert not [*RUN.glob("events*"), *Path().rglob("metrics.csv"), *Path().rglob("hparams.yaml")]


OWN = """
from lightning.pytorch.loggers import Logger

class Memory(Logger):
    name, version = "memory", 0
    options, scalars, images = [], {}, []

    def log_hyperparams(self, params):
        self.options.append(params)

    def log_metrics(self, metrics, step=None):
        self.scalars.update(metrics)

    def log_image(self, key, images, step=None):
        self.images += [(key, image, step) for image in images]
"""


def test_a_logger_of_ones_own_gets_options_once_scalars_and_figures(photos, monkeypatch):
    Path("memory.py").write_text(OWN)
    monkeypatch.syspath_prepend(Path.cwd())
    assert cli.main([*FIT, "1", "--trainer.logger+=memory.Memory"]) == 0
    from memory import Memory

    (options,) = Memory.options
    assert options.items() >= OPTIONS.items()
    assert {tag for tag in Memory.scalars if tag != "epoch"} == points().keys() - {"epoch"}
    assert {key for key, _, _ in Memory.images} == FIGURES
    assert {type(image).__name__ for _, image, _ in Memory.images} == {"Figure"}


@needs_mlflow
@pytest.mark.full
def test_mlflow_has_options_scalars_and_figures_and_a_resumed_run_goes_on(photos, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow has to be asked for
    store = f"file:{Path.cwd()}/ml"  # MLflow keeps what a relative one was in the test before
    photos.joinpath("red").rename(photos / "猫")
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("mine")).info.run_id
    words = added("MLFlowLogger", tracking_uri=store, run_id=run_id)

    def scalars():
        tags = client.get_run(run_id).data.metrics.keys() - {"epoch"}
        every = {tag.replace("u732b", "猫"): client.get_metric_history(run_id, tag) for tag in tags}
        return {tag: [(point.step, point.value) for point in history] for tag, history in every.items()}

    assert cli.main([*FIT, "1", *words]) == 0
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params.items() >= {name: str(value) for name, value in OPTIONS.items()}.items()
    assert found.data.params["trainer.max_epochs"] == "1"
    assert the_same(scalars(), points())

    assert cli.main([*FIT, "2", *words, "--resume", str(RUN)]) == 0
    assert client.get_run(run_id).data.params == found.data.params  # max_epochs, which cannot change, among them
    assert [step for step, _ in scalars()["val/loss"]] == [step for step, _ in points()["val/loss"]]
    last = points()["val/loss"][-1][0]
    for tag in FIGURES:
        step = 0 if tag == "train/first_batch" else last
        assert f"{tag}/{step}.png" in {artifact.path for artifact in client.list_artifacts(run_id, tag)}
        file = client.download_artifacts(run_id, f"{tag}/{step}.png", ".")
        assert assert_a_drawing(file, tag) == drawn(tag, step)


@needs_mlflow
@pytest.mark.slow
def test_a_logger_that_refuses_its_options_is_one_sentence_and_makes_no_run(photos, monkeypatch, refused):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    sentence = refused(*FIT, "1", *added("MLFlowLogger", tracking_uri=f"file:{Path.cwd()}/ml"))
    assert "MLFlowLogger cannot be used" in sentence
    assert "MLFLOW_ALLOW_FILE_STORE" in sentence
    assert not Path("runs").exists()


@needs_wandb
@pytest.mark.full
def test_wandb_has_options_scalars_and_figures_and_a_resumed_run_goes_on(photos, monkeypatch):
    settings = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    Path("wb").mkdir()
    words = added("WandbLogger", offline="true", save_dir="wb", project="mine")
    for epochs, resume in ((1, []), (2, ["--resume", str(RUN)])):
        try:
            assert cli.main([*FIT, str(epochs), *words, *resume]) == 0
            run, folder = wandb.run, Path(wandb.run.dir)
            assert dict(run.config).items() >= OPTIONS.items()
            assert run.config["trainer.max_epochs"] == epochs
            summary = dict(run.summary)
        finally:
            wandb.finish()
        shown = points()
        for tag in shown.keys() - {"epoch"}:
            assert summary[tag] == pytest.approx(shown[tag][-1][1], rel=1e-5, abs=1e-6), tag
        last, media = shown["val/loss"][-1][0], folder / "media" / "images"
        tags = FIGURES - ({"train/first_batch"} if resume else set())
        for tag in tags:
            (file,) = media.glob(f"{tag}_*.png")
            assert assert_a_drawing(file, tag) == drawn(tag, 0 if tag == "train/first_batch" else last)
            assert summary[tag]["_type"] == "images/separated"
    wandb.teardown()  # ends its process
