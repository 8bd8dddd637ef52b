"""fit, validate and test as a user runs them, in process, on a small network."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from project import cli, runs
from project.batch import Batch
from project.classifier import Classifier
from project.data import manifest
from project.inference.load import locate
from project.optim import lr_factor
from project.training import callbacks
from tests.conftest import ALIVE, COLOURS, SMALL, make_images

FIT = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "1"]


def read_csv(file):
    with Path(file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def checkpoint_of(run, name="best"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


# what a run leaves


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


def test_best_checkpoint_is_weights_and_plain_metadata(at_trained):
    content = checkpoint_of(at_trained)
    assert "optimizer_states" not in content
    metadata = content["metadata"]
    assert metadata["class_names"] == sorted(COLOURS)
    assert (metadata["model"], metadata["image_size"], metadata["resize"]) == ("squeezenet1_1", 32, "stretch")
    assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
    assert metadata["config"]["data"]["root"] == "photos"
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(metadata) >= {"git_commit", "metrics"}


def test_best_is_the_epoch_with_the_lowest_validation_loss(at_trained):
    losses = [float(row["val/loss"]) for row in read_csv(at_trained / "metrics.csv") if row["val/loss"]]
    assert len(losses) == 3
    assert checkpoint_of(at_trained)["metadata"]["metrics"]["val/loss"] == pytest.approx(min(losses), abs=1e-6)


def test_last_checkpoint_is_the_end_of_the_fit_with_full_state(at_trained):
    content = checkpoint_of(at_trained, "last")
    rows = len(manifest.load(Path("photos")).rows("train"))
    assert content["global_step"] == 3 * (rows // 8)
    assert len(content["optimizer_states"]) == len(content["lr_schedulers"]) == 1
    assert content["metadata"]["class_names"] == sorted(COLOURS)


def test_split_file_is_the_manifest(at_trained):
    rows = manifest.load(Path("photos"))
    assert [row["path"] for row in read_csv(at_trained / "split.csv")] == list(rows.paths)


def test_tensorboard_holds_the_named_scalars_images_graph_and_hparams(at_trained):
    events = EventAccumulator(str(at_trained)).Reload()
    tags = events.Tags()
    validation = {f"val/{name}" for name in ("loss", "accuracy", "precision", "recall", "f1", "auroc")}
    assert validation | {"train/loss", "train/accuracy", "lr-Adam"} <= set(tags["scalars"])
    of_validation = {
        f"val/{name}" for name in ("confusion_matrix", "precision_recall", "reliability", "roc", "samples")
    }
    assert set(tags["images"]) == {"train/first_batch"} | of_validation
    assert tags["graph"]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    best = min((r for r in read_csv(at_trained / "metrics.csv") if r["val/loss"]), key=lambda r: float(r["val/loss"]))
    assert events.Scalars("val_best/accuracy")[0].value == pytest.approx(float(best["val/accuracy"]))
    assert len(events.Scalars("val/loss")) == 3


def test_config_of_a_run_reproduces_it(photos):
    assert cli.main(FIT) == 0
    assert cli.main(["fit", "--config", "runs/photos/version_0/config.yaml"]) == 0
    one, two = (checkpoint_of(Path(f"runs/photos/version_{n}"))["state_dict"] for n in (0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [Path(f"runs/photos/version_{n}/config.yaml").read_text() for n in (0, 1)]
    assert configs[0] == configs[1]


def test_seed_decides_the_weights(photos):
    assert cli.main(FIT) == cli.main([*FIT, "--seed_everything", "1"]) == 0
    one, two = (checkpoint_of(Path(f"runs/photos/version_{n}"))["state_dict"] for n in (0, 1))
    assert not torch.equal(one["network.1.classifier.1.weight"], two["network.1.classifier.1.weight"])


def test_fast_dev_run_writes_nothing(photos):
    assert cli.main([*FIT, "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs").exists()


# learning


def test_small_network_learns_colours(photos):
    """One epoch would be enough, with any seed."""
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "3", "--model.lr", "0.001"]) == 0
    assert checkpoint_of(Path("runs/photos/version_0"))["metadata"]["metrics"]["val/accuracy"] > 0.9


def test_learning_rate_is_a_pure_function_of_the_step():
    factors = [lr_factor(step, total=100, warmup=0.1) for step in range(150)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:101] == sorted(factors[10:101], reverse=True)
    assert factors[100:] == pytest.approx([0.01] * 50)  # a fit that is continued past its end does not fail
    assert lr_factor(10**6, total=float("inf"), warmup=0.1) == 1.0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.filterwarnings("ignore:.*")
def test_fit_in_bf16_with_clipping(photos, algorithm):
    clip = ["--trainer.gradient_clip_val", "0.1", "--trainer.gradient_clip_algorithm", algorithm]
    assert cli.main([*FIT, "--trainer.precision", "bf16-mixed", *clip]) == 0
    assert all(torch.isfinite(w).all() for w in checkpoint_of(Path("runs/photos/version_0"))["state_dict"].values())


def test_unreadable_training_image_is_left_out_and_named_once(photos, capsys):
    rows = manifest.load(photos)
    bad = {split: rows.paths[rows.rows(split)[-1]] for split in ("train", "val")}
    for path in bad.values():
        (photos / path).write_bytes(b"no image")
    assert cli.main([*FIT, "--trainer.max_epochs", "4"]) == 0
    out = capsys.readouterr().out
    for path in bad.values():
        assert out.count(f"left out, unreadable: photos/{path}: not an image") == 1


def test_fit_says_the_time_the_best_figures_the_run_and_what_next(photos, capsys):
    assert cli.main(FIT) == 0
    out = capsys.readouterr().out
    for said in ("photos: 120 images, 3 classes", "expected time", "epoch 1/1", "best: epoch 1", "val/accuracy"):
        assert said in out
    assert "run: runs/photos/version_0 (" in out
    assert "python -m project.cli test" in out


def test_positive_class_of_two_is_said_and_can_be_chosen(workplace, capsys):
    make_images(Path("photos"), {"red": 20, "blue": 20})
    assert cli.main(FIT) == 0
    assert "positive class: red" in capsys.readouterr().out
    assert cli.main([*FIT, "--model.positive", "blue"]) == 0
    assert "positive class: blue" in capsys.readouterr().out


# data of other kinds


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_fit_with_mixed_images(photos, mix):
    assert cli.main([*FIT, "--model.mix", mix, "--trainer.max_epochs", "2"]) == 0
    rows = [row for row in read_csv("runs/photos/version_0/metrics.csv") if row["train/accuracy"]]
    assert all(0 <= float(row["train/accuracy"]) <= 1 for row in rows)
    # a mixed image can be right in part
    assert any(abs(80 * float(row["train/accuracy"]) - round(80 * float(row["train/accuracy"]))) > 1e-3 for row in rows)
    assert cli.main(["test"]) == 0


def test_mixed_loss_is_the_mixture_of_both_losses_and_so_is_accuracy():
    torch.manual_seed(0)
    model = Classifier(["a", "b", "c"], 32, "squeezenet1_1", mix="mixup").eval()
    image, label = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    share, other = 0.7, torch.tensor([2, 2, 1, 0])
    one_hot = torch.nn.functional.one_hot

    class Fixed(torch.nn.Module):
        def forward(self, x, y):
            return x, share * one_hot(y, 3).float() + (1 - share) * one_hot(other, 3).float()

    model.mix = Fixed()
    model.log = lambda *_, **__: None
    loss, logits = model._step(Batch(image, label, label, []), "train")
    losses = [torch.nn.functional.cross_entropy(logits, y) for y in (label, other)]
    assert loss.item() == pytest.approx((share * losses[0] + (1 - share) * losses[1]).item())
    right = [(logits.argmax(1) == y).float().mean() for y in (label, other)]
    assert model.train_accuracy.compute() == pytest.approx(float(share * right[0] + (1 - share) * right[1]))
    model._step(Batch(image, label, label, []), "val")  # validation is never mixed
    assert model.val_loss.compute() == pytest.approx(losses[0].item())


def test_class_weights_are_for_the_training_loss_alone():
    torch.manual_seed(0)
    weights = [0.5, 1.0, 2.0]
    model = Classifier(["a", "b", "c"], 32, "squeezenet1_1", class_weights=weights).eval()
    image, label = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    model.log = lambda *_, **__: None
    loss, logits = model._step(Batch(image, label, label, []), "train")
    each = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert loss.item() == pytest.approx((each * torch.tensor(weights)[label]).mean().item())
    # divided by the images, not by their weights: so the mean over ranks is that of the whole batch
    halves = [model._step(Batch(image[s], label[s], label[s], []), "train")[0] for s in (slice(2), slice(2, 4))]
    assert sum(half.item() for half in halves) / 2 == pytest.approx(loss.item())
    model._step(Batch(image, label, label, []), "val")
    assert model.val_loss.compute() == pytest.approx(each.mean().item())


@pytest.mark.parametrize("balance", ["loss", "sample"])
def test_fit_on_unequal_classes_with_balance(workplace, balance):
    make_images(Path("photos"), {"red": 60, "blue": 12, "green": 12})
    assert cli.main([*FIT, "--data.balance", balance]) == 0
    assert cli.main(["test"]) == cli.main(["test", "--data.balance", "none"]) == 0


def test_fit_and_test_from_a_csv_file(photos):
    lines = [f"photos/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(photos.rglob("*.png"))]
    Path("my,list.csv").write_text("\n".join(["path,label", *lines]))
    assert cli.main(["fit", "--data.root", "my,list.csv", *SMALL, "--trainer.max_epochs", "1"]) == 0
    run = Path("runs/my-list/version_0")
    assert cli.main(["test"]) == 0
    assert {row["path"] for row in read_csv(run / "predictions.csv")} <= {line.split(",")[0] for line in lines}


def test_test_uses_the_fold_of_its_run(photos):
    assert cli.main([*FIT, "--data.folds", "4", "--data.fold", "2"]) == 0
    assert cli.main(["test"]) == 0
    rows = manifest.load(photos, folds=4, fold=2)
    tested = {row["path"] for row in read_csv("runs/photos/version_0/predictions.csv")}
    assert tested == {f"photos/{rows.paths[row]}" for row in rows.rows("test")}


def test_moved_data_is_dealt_out_as_in_the_run(workplace):
    make_images(Path("photos"), dict.fromkeys(COLOURS, 40))
    assert cli.main([*FIT, "--data.folds", "3", "--data.fold", "1", "--data.group", r"(\d)\.png"]) == 0
    shutil.copytree("photos", "moved")
    rows = manifest.load(Path("photos"), folds=3, fold=1, group=r"(\d)\.png")
    assert cli.main(["test", "--data.root", "moved"]) == 0
    tested = {row["path"] for row in read_csv("runs/photos/version_0/predictions.csv")}
    assert tested == {f"moved/{rows.paths[row]}" for row in rows.rows("test")}


# layers of settings, and verbs that start from a checkpoint


def test_layers_signature_run_config_command_line(photos, capsys):
    assert cli.main([*FIT, "--data.batch_size", "5", "--data.resize", "pad", "--model.warmup", "0.2"]) == 0
    Path("over.yaml").write_text(yaml.safe_dump({"data": {"resize": "crop"}, "model": {"warmup": 0.3}}))
    last = "runs/photos/version_0/checkpoints/last.ckpt"
    more = ["--ckpt_path", last, "--config", "over.yaml", "--model.warmup", "0.4", "--trainer.max_epochs", "2"]
    assert cli.main(["fit", *more]) == 0
    config = yaml.safe_load(Path("runs/photos/version_1/config.yaml").read_text())
    assert config["model"]["optimizer"] == "adam"  # signature
    assert config["data"]["batch_size"] == 5  # the run
    assert config["model"]["name"] == "squeezenet1_1"
    assert config["data"]["resize"] == "crop"  # --config
    assert config["model"]["warmup"] == 0.4  # command line
    assert checkpoint_of(Path("runs/photos/version_1"), "last")["epoch"] == 1  # it went on, it did not start again


def test_test_writes_into_the_run_of_its_checkpoint(photos, capsys):
    assert cli.main(FIT) == cli.main([*FIT, "--data.image_size", "40"]) == 0
    run = Path("runs/photos/version_0")
    assert cli.main(["test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 0
    assert sorted(p.name for p in run.parent.iterdir()) == ["version_0", "version_1"]
    result = json.loads((run / "test_metrics.json").read_text())
    rows = read_csv(run / "predictions.csv")
    assert result["n"] == len(rows) == 24
    assert result["class_names"] == sorted(COLOURS)
    assert result["checkpoint"] == str(run / "checkpoints" / "best.ckpt")
    guess, true = [row["label"] for row in rows], [row["true"] for row in rows]
    assert result["test/accuracy"] == pytest.approx(reference.accuracy_score(true, guess))
    assert result["test/f1"] == pytest.approx(reference.f1_score(true, guess, average="macro", zero_division=0))
    area = reference.roc_auc_score(
        true, np.array([[float(row[f"p:{name}"]) for name in sorted(COLOURS)] for row in rows]), multi_class="ovr"
    )
    assert result["test/auroc"] == pytest.approx(area, abs=1e-6)
    assert not (run.parent / "version_1" / "predictions.csv").exists()


def test_test_uses_the_runs_own_split(photos):
    assert cli.main([*FIT, "--data.split_seed", "9"]) == 0
    make_images(photos, dict.fromkeys(COLOURS, 55))  # the folder has grown since
    assert cli.main(["test"]) == 0
    run = Path("runs/photos/version_0")
    tested = {row["path"] for row in read_csv(run / "predictions.csv")}
    assert tested == {f"photos/{row['path']}" for row in read_csv(run / "split.csv") if row["split"] == "test"}


def test_unreadable_test_image_gets_an_error_row(photos):
    assert cli.main(FIT) == 0
    rows = manifest.load(photos)
    bad = rows.paths[rows.rows("test")[5]]
    (photos / bad).write_bytes(b"")
    assert cli.main(["test"]) == 0
    row = next(r for r in read_csv("runs/photos/version_0/predictions.csv") if r["path"] == f"photos/{bad}")
    assert (row["true"], row["label"], row["probability"]) == (bad.split("/")[0], "", "")
    assert "not an image" in row["error"]
    assert json.loads(Path("runs/photos/version_0/test_metrics.json").read_text())["unreadable"] == 1


def test_validate_gives_the_figures_of_the_checkpoint(at_trained, capsys):
    before = sorted(p.name for p in at_trained.parent.iterdir())
    assert cli.main(["validate", "--ckpt_path", str(at_trained)]) == 0
    out = capsys.readouterr().out
    assert f"{checkpoint_of(at_trained)['metadata']['metrics']['val/loss']:.6f}"[:6] in out
    assert sorted(p.name for p in at_trained.parent.iterdir()) == before


def test_newest_run_with_a_best_checkpoint_is_taken(photos, capsys):
    assert cli.main(FIT) == cli.main([*FIT, "--name", "other"]) == 0
    (runs.ROOT / "photos" / "version_7").mkdir()  # a fit that was killed before its first checkpoint
    assert locate().run == Path("runs/other/version_0")


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
    run = Path("runs/photos/version_0")
    last = checkpoint_of(run, "last")
    assert last["epoch"] == epochs - 1
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 10 * epochs
    validated = "check_val_every_n_epoch" not in options[0] or epochs > 1
    out = capsys.readouterr().out
    assert ("best: epoch" in out) == ("next: make board" in out) == validated
    if "logger" not in options[0]:
        assert len(EventAccumulator(str(run)).Reload().Images("train/first_batch")) == 1


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
    run = Path("runs/photos/version_0")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "mine.ckpt"}
    assert (run / "metrics.csv").exists()
    assert list(Path("mine").rglob("metrics.csv"))


def test_network_with_batch_norm_takes_batches_of_one_and_of_none(photos):
    batch_of_one = [*FIT, "--model.name", "resnet18", "--data.batch_size", "1", "--trainer.limit_train_batches", "12"]
    for file in sorted(photos.glob("red/*.png"))[:30]:
        file.write_bytes(b"")
    assert cli.main(batch_of_one) == 0
    assert all(
        torch.isfinite(w.float()).all() for w in checkpoint_of(Path("runs/photos/version_0"))["state_dict"].values()
    )


def test_other_spelling_of_the_root_keeps_the_runs_split_and_another_root_says_so(photos, capsys):
    assert cli.main([*FIT, "--data.split_seed", "9"]) == 0
    run = Path("runs/photos/version_0")
    held_out = {Path(row["path"]) for row in read_csv(run / "split.csv") if row["split"] == "test"}
    make_images(photos, dict.fromkeys(COLOURS, 50))
    for root in ("./photos", str(photos.resolve())):
        assert cli.main(["test", "--data.root", root]) == 0
        assert {Path(row["path"]).resolve() for row in read_csv(run / "predictions.csv")} == {
            (photos / path).resolve() for path in held_out
        }
    shutil.copytree("photos", "copy")
    capsys.readouterr()
    assert cli.main(["test", "--data.root", "copy"]) == 0
    assert "its split.csv is not used" in capsys.readouterr().out
    assert json.loads((run / "test_metrics.json").read_text())["data"] == "copy"
    assert cli.main(["test", "--data.root", "copy", "--data.split", str(run / "split.csv")]) == 0
    assert {Path(row["path"]) for row in read_csv(run / "predictions.csv")} == {"copy" / path for path in held_out}


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
    from types import SimpleNamespace

    from project.training.tensorboard import HParams

    figures = HParams({})
    for epoch, loss in enumerate((float("nan"), 0.5, float("nan"), 0.7)):
        figures.on_validation_end(SimpleNamespace(callback_metrics={"val/loss": loss}, current_epoch=epoch), None)
    assert figures.best == {"val/loss": 0.5, "epoch": 2}


# refusals: exit code 2, one sentence, nothing written


def test_missing_root(workplace, refused):
    assert "no folder nowhere" in refused("fit", "--data.root", "nowhere")
    assert not Path("runs").exists()


def test_empty_root(workplace, refused):
    Path("empty").mkdir()
    assert "No images in empty" in refused("fit", "--data.root", "empty")


def test_file_as_root(workplace, refused):
    Path("a.jpg").write_bytes(b"x")
    assert "a.jpg is a file" in refused("fit", "--data.root", "a.jpg")


def test_one_class_only(workplace, refused):
    make_images(Path("one"), {"cat": 9})
    assert "one class, cat" in refused("fit", "--data.root", "one")


def test_class_new_in_test(workplace, refused):
    make_images(Path("p/train"), {"cat": 9, "dog": 9})
    make_images(Path("p/test"), {"cat": 9, "dog": 9, "owl": 2})
    said = refused("fit", "--data.root", "p")
    assert "only in train: none" in said
    assert "only in test: owl" in said


def test_too_few_images_of_a_class(workplace, refused):
    make_images(Path("p"), {"cat": 9, "dog": 2})
    assert "dog (2)" in refused("fit", "--data.root", "p")


def test_all_files_unreadable(photos, refused):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    assert "None of the 84 train images can be read" in refused(*FIT)
    assert not Path("runs").exists()


def test_image_size_under_63(photos, refused):
    said = refused("fit", "--data.root", "photos", "--data.image_size", "62")
    assert "62" in said
    assert "63" in said


def test_batch_larger_than_the_training_set(photos, refused):
    said = refused(*FIT, "--data.batch_size", "85")
    assert "85" in said
    assert "84" in said


@pytest.mark.parametrize("option", ["image_size", "batch_size"])
def test_sizes_below_one(photos, refused, option):
    assert "above 0" in refused(*FIT, f"--data.{option}", "0")


def test_checkpoint_of_other_classes(at_trained, tmp_path, refused):
    make_images(tmp_path / "pets", {"cat": 9, "dog": 9, "owl": 9})
    said = refused("test", "--ckpt_path", str(at_trained), "--data.root", str(tmp_path / "pets"))
    assert "blue, green, red" in said
    assert "cat, dog, owl" in said


def test_no_run_yet(workplace, refused):
    assert "train one first" in refused("test")


def test_weights_only_checkpoint_cannot_be_continued(at_trained, refused):
    assert "last.ckpt" in refused("fit", "--ckpt_path", str(at_trained / "checkpoints" / "best.ckpt"))


def test_finished_run_has_nothing_left_to_do(at_trained, refused):
    last = str(at_trained / "checkpoints" / "last.ckpt")
    assert "has completed its 3 epochs" in refused("fit", "--ckpt_path", last)
    assert sorted(p.name for p in at_trained.parent.iterdir()) == ["version_0"]


def test_weights_of_another_network(at_trained, refused):
    said = refused("test", "--ckpt_path", str(at_trained), "--model.name", "resnet18")
    assert "squeezenet1_1, not of resnet18" in said


def test_no_accelerator(photos, refused):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert "Leave --trainer.accelerator out" in refused(*FIT, "--trainer.accelerator", "gpu")
    assert not Path("runs").exists()


def test_runs_that_cannot_be_written(photos, refused):
    Path("runs").write_text("a file where the folder should be")
    assert "Cannot write into runs/" in refused(*FIT)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes the user, which only root may")
def test_runs_without_permission(photos, refused):
    photos.parent.chmod(0o755)
    Path("runs").mkdir(mode=0o755)
    for folder in Path.cwd().resolve().parents:
        if folder.stat().st_uid == 0 and str(folder) != "/" and "pytest" in str(folder):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        said = refused(*FIT)
    finally:
        os.seteuid(0)
    assert "Cannot write into runs/: Permission denied" in said


@pytest.mark.parametrize("name", ["latest", "a/b", "..", "a,b"])
def test_unusable_run_name(photos, refused, name):
    assert "--name" in refused(*FIT, "--name", name)


def test_no_test_split(workplace, refused, capsys):
    make_images(Path("p/train"), dict.fromkeys(COLOURS, 20))
    assert cli.main(["fit", "--data.root", "p", *SMALL, "--trainer.max_epochs", "1"]) == 0
    assert "no test" in capsys.readouterr().out
    assert "no test images" in refused("test")


# speed


class Waits(TorchDispatchMode):
    """Notes what would wait for an accelerator: values that Python wants to know, shapes that values decide."""

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
