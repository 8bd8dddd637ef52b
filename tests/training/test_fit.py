"""fit, validate and test as a user runs them, in process, on a small network."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from project import cli
from project.batch import Batch
from project.classifier import Classifier
from project.data import manifest
from project.inference.load import locate
from project.training import callbacks
from project.training.tensorboard import HParams
from tests.conftest import ALIVE, COLOURS, SMALL, make_images

ONE_EPOCH = [*SMALL, "--trainer.max_epochs", "1"]
FIT = ["fit", "--data.root", "photos", *ONE_EPOCH]
RUN = Path("runs/photos/version_0")


def read_csv(file):
    with Path(file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def checkpoint_of(run, name="best"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def paths_tested(run=RUN):
    return {row["path"] for row in read_csv(run / "predictions.csv")}


def is_finite(run):
    return all(torch.isfinite(tensor.float()).all() for tensor in checkpoint_of(run)["state_dict"].values())


def test_a_run_leaves_what_the_readme_names(at_trained):
    names = {p.name for p in at_trained.iterdir()} - set(callbacks.PredictionWriter.FILES)
    events = {n for n in names if n.startswith("events.out.tfevents")}
    projector = {"projector", "projector_config.pbtxt"}
    fit = {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "split.csv", "status.json"}
    assert names - events == fit | projector
    assert len(events) == 1
    checkpoints = {p.name for p in (at_trained / "checkpoints").iterdir()} - {"best.temperature.json"}
    assert checkpoints == {"best.ckpt", "last.ckpt"}
    assert (at_trained.parent.parent / "latest").resolve() == at_trained.resolve()


def test_checkpoints_are_the_weights_of_the_lowest_loss_and_the_full_state_of_the_end(at_trained):
    best, last, rows = checkpoint_of(at_trained), checkpoint_of(at_trained, "last"), manifest.load(Path("photos"))
    assert "optimizer_states" not in best
    metadata = best["metadata"]
    assert metadata["class_names"] == last["metadata"]["class_names"] == sorted(COLOURS)
    assert (metadata["model"], metadata["image_size"], metadata["resize"]) == ("squeezenet1_1", 32, "stretch")
    assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
    assert metadata["config"]["data"]["root"] == "photos"
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "git_commit" in metadata
    losses = [float(row["val/loss"]) for row in read_csv(at_trained / "metrics.csv") if row["val/loss"]]
    assert len(losses) == 3
    assert metadata["metrics"]["val/loss"] == pytest.approx(min(losses), abs=1e-6)
    assert last["global_step"] == 3 * (len(rows.rows("train")) // 8)
    assert len(last["optimizer_states"]) == len(last["lr_schedulers"]) == 1
    assert [row["path"] for row in read_csv(at_trained / "split.csv")] == list(rows.paths)


def test_tensorboard_holds_the_named_scalars_graph_and_hparams(at_trained):
    events = EventAccumulator(str(at_trained)).Reload()
    tags = events.Tags()
    validation = {f"val/{name}" for name in ("loss", "accuracy", "precision", "recall", "f1", "auroc")}
    assert validation | {"train/loss", "train/accuracy", "lr-Adam"} <= set(tags["scalars"])
    assert tags["graph"]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    best = min((r for r in read_csv(at_trained / "metrics.csv") if r["val/loss"]), key=lambda r: float(r["val/loss"]))
    assert events.Scalars("val_best/accuracy")[0].value == pytest.approx(float(best["val/accuracy"]))


def test_config_of_a_run_reproduces_it_another_seed_gives_other_weights_and_steps_draw_anew(photos, monkeypatch):
    drawn, step = [], Classifier.training_step

    def draw(self, batch, batch_idx):
        drawn.append(tuple(torch.rand(3).tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", draw)
    config = ["--config", f"{RUN}/config.yaml"]
    assert cli.main(FIT) == cli.main(["fit", *config]) == cli.main(["fit", *config, "--seed_everything", "1"]) == 0
    assert drawn[:10] == drawn[10:20] != drawn[20:]
    assert len(set(drawn[:10])) == 10
    one, two, other = (checkpoint_of(RUN.with_name(f"version_{n}"))["state_dict"] for n in range(3))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["network.1.classifier.1.weight"], other["network.1.classifier.1.weight"])
    assert (RUN / "config.yaml").read_text() == (RUN.with_name("version_1") / "config.yaml").read_text()


def test_fast_dev_run_leaves_nothing(photos):
    assert cli.main([*FIT, "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.filterwarnings("ignore:.*")
def test_fit_in_bf16_with_clipping(photos, algorithm):
    clip = ["--trainer.gradient_clip_val", "0.1", "--trainer.gradient_clip_algorithm", algorithm]
    assert cli.main([*FIT, "--trainer.precision", "bf16-mixed", *clip]) == 0
    assert is_finite(RUN)


def test_small_network_learns_colours(photos):
    """One epoch would be enough, with any seed."""
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "3", "--model.lr", "0.001"]) == 0
    assert checkpoint_of(RUN)["metadata"]["metrics"]["val/accuracy"] > 0.9


def test_unreadable_images_are_left_out_named_once_and_get_an_error_row(photos, capsys):
    rows = manifest.load(photos)
    bad = {split: rows.paths[rows.rows(split)[-1]] for split in ("train", "val", "test")}
    for path in bad.values():
        (photos / path).write_bytes(b"no image")
    assert cli.main([*FIT, "--trainer.max_epochs", "4"]) == cli.main(["test"]) == 0
    out = capsys.readouterr().out
    for path in bad.values():
        assert out.count(f"left out, unreadable: photos/{path}: not an image") == 1
    (row,) = (row for row in read_csv(RUN / "predictions.csv") if row["path"] == f"photos/{bad['test']}")
    assert (row["true"], row["label"], row["probability"]) == (bad["test"].split("/")[0], "", "")
    assert "not an image" in row["error"]
    assert json.loads((RUN / "test_metrics.json").read_text())["unreadable"] == 1


def classifier_and_batch(**options):
    torch.manual_seed(0)
    model = Classifier(["a", "b", "c"], 32, "squeezenet1_1", **options).eval()
    model.log = lambda *_, **__: None
    label = torch.tensor([0, 1, 2, 0])
    return model, Batch(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), label, label, [])


def test_mixed_loss_is_the_mixture_of_both_losses_and_so_is_accuracy():
    model, batch = classifier_and_batch(mix="mixup")
    share, other = 0.7, torch.tensor([2, 2, 1, 0])
    one_hot = torch.nn.functional.one_hot

    class Fixed(torch.nn.Module):
        def forward(self, x, y):
            return x, share * one_hot(y, 3).float() + (1 - share) * one_hot(other, 3).float()

    model.mix = Fixed()
    loss, logits = model._step(batch, "train")
    losses = [torch.nn.functional.cross_entropy(logits, y) for y in (batch.label, other)]
    assert loss.item() == pytest.approx((share * losses[0] + (1 - share) * losses[1]).item())
    right = [(logits.argmax(1) == y).float().mean() for y in (batch.label, other)]
    assert model.train_accuracy.compute() == pytest.approx(float(share * right[0] + (1 - share) * right[1]))
    model._step(batch, "val")  # validation is never mixed
    assert model.val_loss.compute() == pytest.approx(losses[0].item())


def test_class_weights_are_for_the_training_loss_alone():
    weights = [0.5, 1.0, 2.0]
    model, batch = classifier_and_batch(class_weights=weights)
    loss, logits = model._step(batch, "train")
    each = torch.nn.functional.cross_entropy(logits, batch.label, reduction="none")
    assert loss.item() == pytest.approx((each * torch.tensor(weights)[batch.label]).mean().item())
    # divided by the images, not by their weights: so the mean over ranks is that of the whole batch
    parts = [Batch(*(column[rows] for column in batch[:3]), []) for rows in (slice(2), slice(2, 4))]
    halves = [model._step(part, "train")[0].item() for part in parts]
    assert sum(halves) / 2 == pytest.approx(loss.item())
    model._step(batch, "val")
    assert model.val_loss.compute() == pytest.approx(each.mean().item())


@pytest.mark.parametrize(("balance", "mix"), [("loss", "mixup"), ("sample", "cutmix")])
def test_fit_on_unequal_classes_with_balance_and_mixed_images(workplace, balance, mix):
    make_images(Path("photos"), {"red": 60, "blue": 12, "green": 12})
    assert cli.main([*FIT, "--data.balance", balance, "--model.mix", mix]) == 0
    (share,) = (float(row["train/accuracy"]) for row in read_csv(RUN / "metrics.csv") if row["train/accuracy"])
    assert 0 <= share <= 1
    assert cli.main(["test"]) == cli.main(["test", "--data.balance", "none"]) == 0


def test_fit_and_test_from_a_csv_file(photos):
    lines = [f"photos/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(photos.rglob("*.png"))]
    Path("my,list.csv").write_text("\n".join(["path,label", *lines]))
    assert cli.main(["fit", "--data.root", "my,list.csv", *ONE_EPOCH]) == cli.main(["test"]) == 0
    assert paths_tested(Path("runs/my-list/version_0")) <= {line.split(",")[0] for line in lines}


def test_test_uses_the_fold_of_its_run_also_for_moved_data(photos):
    folds = ["--data.folds", "3", "--data.fold", "1", "--data.group", r"(\d)\.png"]
    assert cli.main([*FIT, *folds]) == cli.main(["test"]) == 0
    rows = manifest.load(photos, folds=3, fold=1, group=r"(\d)\.png")
    held_out = [rows.paths[row] for row in rows.rows("test")]
    assert paths_tested() == {f"photos/{path}" for path in held_out}
    photos.rename("moved")
    assert cli.main(["test", "--data.root", "moved"]) == 0
    assert paths_tested() == {f"moved/{path}" for path in held_out}


# layers of settings, and verbs that start from a checkpoint


def test_fit_prints_what_came_of_it_and_test_writes_into_the_run_of_its_checkpoint(photos, capsys):
    assert cli.main(FIT) == 0
    out = capsys.readouterr().out
    for part in ("photos: 120 images, 3 classes", "epoch 1/1", "best: epoch 1  val/loss", f"run: {RUN} (", "cli test"):
        assert part in out
    assert cli.main([*FIT, "--data.image_size", "40"]) == 0
    best, other = str(RUN / "checkpoints" / "best.ckpt"), RUN.with_name("version_1")
    RUN.with_name("version_7").mkdir()  # a fit that was killed before its first checkpoint
    assert locate().run == other
    assert cli.main(["test", "--ckpt_path", best]) == 0
    assert sorted(p.name for p in RUN.parent.iterdir()) == ["version_0", "version_1", "version_7"]
    result, rows = json.loads((RUN / "test_metrics.json").read_text()), read_csv(RUN / "predictions.csv")
    assert result["n"] == len(rows) == 24
    assert (result["class_names"], result["checkpoint"]) == (sorted(COLOURS), best)
    guess, true = [row["label"] for row in rows], [row["true"] for row in rows]
    assert result["test/accuracy"] == pytest.approx(reference.accuracy_score(true, guess))
    assert result["test/f1"] == pytest.approx(reference.f1_score(true, guess, average="macro", zero_division=0))
    probabilities = np.array([[float(row[f"p:{name}"]) for name in sorted(COLOURS)] for row in rows])
    area = reference.roc_auc_score(true, probabilities, multi_class="ovr")
    assert result["test/auroc"] == pytest.approx(area, abs=1e-6)
    assert not (other / "predictions.csv").exists()


def test_layers_signature_run_config_command_line(photos, capsys):
    assert cli.main([*FIT, "--data.batch_size", "5", "--data.resize", "pad", "--model.warmup", "0.2"]) == 0
    Path("over.yaml").write_text(yaml.safe_dump({"data": {"resize": "crop"}, "model": {"warmup": 0.3}}))
    more = f"--ckpt_path {RUN}/checkpoints/last.ckpt --config over.yaml --model.warmup 0.4 --trainer.max_epochs 2"
    assert cli.main(["fit", *more.split()]) == 0
    resumed = RUN.with_name("version_1")
    config = yaml.safe_load((resumed / "config.yaml").read_text())
    assert config["model"]["optimizer"] == "adam"  # signature
    assert config["data"]["batch_size"] == 5  # the run
    assert config["model"]["name"] == "squeezenet1_1"
    assert config["data"]["resize"] == "crop"  # --config
    assert config["model"]["warmup"] == 0.4  # command line
    assert checkpoint_of(resumed, "last")["epoch"] == 1  # not from the start again


def test_validate_gives_the_metrics_of_the_checkpoint(at_trained, capsys):
    before = sorted(p.name for p in at_trained.parent.iterdir())
    assert cli.main(["validate", "--ckpt_path", str(at_trained)]) == 0
    out = capsys.readouterr().out
    assert f"{checkpoint_of(at_trained)['metadata']['metrics']['val/loss']:.6f}"[:6] in out
    assert sorted(p.name for p in at_trained.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        (["--trainer.check_val_every_n_epoch", "2"], 3),
        (["--trainer.check_val_every_n_epoch", "2"], 1),
        (["--trainer.val_check_interval", "2"], 1),
        (["--trainer.accumulate_grad_batches", "4"], 2),
        (["--trainer.logger", "false"], 1),
    ],
)
def test_last_checkpoint_is_truly_last_and_the_first_batch_is_drawn_once(photos, options, epochs, capsys):
    assert cli.main([*FIT, *options, "--trainer.max_epochs", str(epochs)]) == 0
    last = checkpoint_of(RUN, "last")
    assert last["epoch"] == epochs - 1
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 10 * epochs
    validated = "check_val_every_n_epoch" not in options[0] or epochs > 1
    out = capsys.readouterr().out
    assert ("best: epoch" in out) == ("next: make board" in out) == validated
    if "logger" in options[0]:
        assert not [*RUN.glob("events*"), *RUN.glob("projector*")]
    else:
        assert len(EventAccumulator(str(RUN)).Reload().Images("train/first_batch")) == 1


def test_a_users_own_checkpoints_and_loggers_come_beside_ours(photos):
    own = {
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "filename": "mine"}},
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}},
        ],
        "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "mine"}}],
    }
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": own}))
    assert cli.main([*FIT, "--config", "own.yaml"]) == 0
    assert {p.name for p in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "mine.ckpt"}
    assert (RUN / "metrics.csv").exists()
    assert list(Path("mine").rglob("metrics.csv"))


def test_network_with_batch_norm_takes_batches_of_one_and_of_none(photos):
    batch_of_one = [*FIT, "--model.name", "resnet18", "--data.batch_size", "1", "--trainer.limit_train_batches", "12"]
    for file in sorted(photos.glob("red/*.png"))[:30]:
        file.write_bytes(b"")
    assert cli.main(batch_of_one) == 0
    assert is_finite(RUN)


def test_test_uses_the_runs_own_split_unless_the_data_is_another_folder(photos, capsys):
    assert cli.main([*FIT, "--data.split_seed", "9"]) == 0
    held_out = {row["path"] for row in read_csv(RUN / "split.csv") if row["split"] == "test"}
    make_images(photos, dict.fromkeys(COLOURS, 50))  # the folder has grown since
    for options in ([], ["--data.root", "./photos"], ["--data.root", str(photos.resolve())]):
        assert cli.main(["test", *options]) == 0
        assert {Path(path).resolve() for path in paths_tested()} == {(photos / path).resolve() for path in held_out}
    photos.rename("copy")
    capsys.readouterr()
    assert cli.main(["test", "--data.root", "copy"]) == 0
    assert "its split.csv is not used" in capsys.readouterr().out
    assert json.loads((RUN / "test_metrics.json").read_text())["data"] == "copy"
    assert cli.main(["test", "--data.root", "copy", "--data.split", str(RUN / "split.csv")]) == 0
    assert paths_tested() == {f"copy/{path}" for path in held_out}


def test_checkpoint_outside_its_run_overwrites_nothing(at_trained, tmp_path, refused):
    shutil.copy(at_trained / "checkpoints" / "best.ckpt", tmp_path)
    (tmp_path / "predictions.csv").write_text("mine")
    assert "predictions.csv exists" in refused("test", "--ckpt_path", str(tmp_path / "best.ckpt"))
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    (tmp_path / "predictions.csv").unlink()
    assert cli.main(["test", "--ckpt_path", str(tmp_path / "best.ckpt")]) == 0
    made = {"predictions.csv", "test_metrics.json", "report.html"}  # the run alone knows the validation images
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", *made}


def test_checkpoint_cannot_choose_what_code_runs(at_trained, tmp_path, monkeypatch):
    Path("evil.py").write_text("open('executed', 'w')\nfrom lightning.pytorch import Callback\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    content = torch.load(at_trained / "checkpoints" / "best.ckpt", weights_only=True)
    for key in ("callbacks", "logger", "plugins", "profiler", "strategy"):
        content["metadata"]["config"]["trainer"][key] = {"class_path": "evil.Callback"}
    content["metadata"]["config"]["model"]["name"] = {"class_path": "evil.Callback"}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "best.ckpt")
    arguments = ["--ckpt_path", str(tmp_path / "run"), "--model.name", "squeezenet1_1"]
    assert cli.main(["validate", *arguments]) == 0
    assert not Path("executed").exists()


def test_nan_loss_is_never_best():
    hparams = HParams({})
    for epoch, loss in enumerate((float("nan"), 0.5, float("nan"), 0.7)):
        hparams.on_validation_end(SimpleNamespace(callback_metrics={"val/loss": loss}, current_epoch=epoch), None)
    assert hparams.best == {"val/loss": 0.5, "epoch": 2}


# refusals: exit code 2, one sentence, nothing written


UNUSABLE = {
    "nowhere": "no folder nowhere",
    "empty": "No images in empty",
    "a.jpg": "no folder a.jpg",
    "one": "one class, cat",
}


@pytest.mark.parametrize(("root", "sentence"), UNUSABLE.items())
def test_data_that_cannot_be_trained_on(workplace, refused, root, sentence):
    Path("empty").mkdir()
    Path("a.jpg").write_bytes(b"x")
    make_images(Path("one"), {"cat": 9})
    assert sentence in refused("fit", "--data.root", root)
    assert not Path("runs").exists()


def test_test_without_a_run_or_a_test_split_and_runs_that_cannot_be_written(workplace, refused, capsys):
    assert "train one first" in refused("test")
    make_images(Path("p/train"), dict.fromkeys(COLOURS, 20))
    assert cli.main(["fit", "--data.root", "p", *ONE_EPOCH]) == 0
    assert "no test" in capsys.readouterr().out
    assert "no test images" in refused("test")
    shutil.rmtree("runs")
    Path("runs").write_text("a file where the folder should be")
    assert "Cannot write into runs/" in refused("fit", "--data.root", "p", *ONE_EPOCH)


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (["--model.name", "alexnet", "--data.image_size", "62"], ["62", "63"]),
        (["--data.image_size", "0"], ["above 0"]),
        (["--data.batch_size", "0"], ["above 0"]),
        (["--data.batch_size", "85"], ["85", "84"]),
        *((["--name", name], ["--name"]) for name in ("latest", "a/b", "..", "a,b")),
        pytest.param(
            ["--trainer.accelerator", "gpu"],
            ["refuses its options (see --help trainer)", "gpu"],
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator"),
        ),
    ],
)
def test_options_that_cannot_be_used(photos, refused, options, sentences):
    sentence = refused(*FIT, *options)
    assert all(part in sentence for part in sentences)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["test", "--ckpt_path", f"{RUN}", "--data.root", "{pets}"], ["blue, green, red", "cat, dog, owl"]),
        (["test", "--ckpt_path", f"{RUN}", "--model.name", "resnet18"], ["squeezenet1_1, not of resnet18"]),
        (["fit", "--ckpt_path", f"{RUN}/checkpoints/best.ckpt"], ["last.ckpt"]),  # weights only
        (["fit", "--ckpt_path", f"{RUN}/checkpoints/last.ckpt"], ["has completed its 3 epochs"]),
    ],
)
def test_checkpoint_that_does_not_fit_the_verb(at_trained, tmp_path, refused, words, sentences):
    pets = make_images(tmp_path / "pets", {"cat": 9, "dog": 9, "owl": 9})
    sentence = refused(*(word.format(pets=pets) for word in words))
    assert all(part in sentence for part in sentences)
    assert sorted(p.name for p in at_trained.parent.iterdir()) == ["version_0"]


class Waits(TorchDispatchMode):
    """Records what would wait for an accelerator: values that Python reads, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name.lstrip("_") in {waiting.lstrip("_") for waiting in self.WAITING}:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", [[], ["--data.balance", "loss"], ["--model.label_smoothing", "0.1"]])
def test_no_training_step_waits_for_the_device(photos, monkeypatch, options):
    waits = Waits()
    step = Classifier.training_step

    def watched(self, batch, batch_idx):
        with waits:
            return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", watched)
    assert cli.main([*FIT, *options]) == 0
    assert waits.found == []
    with waits:
        float(torch.ones(1))
    assert waits.found == ["_local_scalar_dense"]  # it would have been seen
