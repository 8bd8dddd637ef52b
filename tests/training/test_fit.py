"""fit, validate and test as a user runs them, in process, on a small network."""

import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
import yaml
from sklearn.metrics import cohen_kappa_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from project import cli, files
from project.batch import Batch
from project.classifier import Classifier
from project.data import manifest
from project.errors import UserError
from project.inference.load import locate
from project.metrics import Score
from project.training import fit
from project.training.tensorboard import HParams
from tests.conftest import ALIVE, COLOURS, SMALL, make_images, read_csv
from tests.same_run import checkpoint

ONE_EPOCH = [*SMALL, "--trainer.max_epochs", "1"]
FIT = ["fit", "--data.root", "photos", *ONE_EPOCH]
TEST = ["test", "--report", "false"]
RANKS = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices"]
CLIPPED = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "0.1"]
CLIPPED += ["--trainer.gradient_clip_algorithm"]
SMOOTHED = ["--data.balance", "loss", "--model.label_smoothing", "0.1"]
RUN = Path("runs/photos/version_0")


def predicted(run=RUN):
    return {row["path"]: row for row in read_csv(run / "predictions.csv")}


def test_checkpoints_are_the_weights_of_the_lowest_loss_and_the_full_state_of_the_end(at_trained):
    best, last, rows = checkpoint(at_trained, "best"), checkpoint(at_trained), manifest.load(Path("photos"))
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
    assert len(list(at_trained.glob("events.out.tfevents*"))) == 1
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    best = min((r for r in read_csv(at_trained / "metrics.csv") if r["val/loss"]), key=lambda r: float(r["val/loss"]))
    assert events.Scalars("val_best/accuracy")[0].value == pytest.approx(float(best["val/accuracy"]))


@pytest.mark.slow
def test_config_of_a_run_reproduces_it_another_seed_gives_other_weights_and_steps_draw_anew(photos, monkeypatch):
    drawn, step = [], Classifier.training_step
    monkeypatch.setattr(
        Classifier, "training_step", lambda *arguments: drawn.append(tuple(torch.rand(3).tolist())) or step(*arguments)
    )
    config = ["--config", f"{RUN}/config.yaml"]
    assert cli.main(FIT) == cli.main(["fit", *config]) == cli.main(["fit", *config, "--seed_everything", "1"]) == 0
    assert drawn[:10] == drawn[10:20] != drawn[20:]
    assert len(set(drawn[:10])) == 10
    one, two, other = (checkpoint(RUN.with_name(f"version_{n}"), "best")["state_dict"] for n in range(3))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["network.1.classifier.1.weight"], other["network.1.classifier.1.weight"])
    assert (RUN / "config.yaml").read_text() == (RUN.with_name("version_1") / "config.yaml").read_text()


@pytest.mark.parametrize("options", [[], [*CLIPPED, "norm"], pytest.param([*CLIPPED, "value"], marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.slow
def test_small_network_learns_colours_also_in_bf16_with_clipped_gradients(photos, options):
    """One epoch would be enough, with any seed."""
    assert cli.main([*FIT, *ALIVE, "--trainer.max_epochs", "3", "--model.lr", "0.001", *options]) == 0
    assert checkpoint(RUN, "best")["metadata"]["metrics"]["val/accuracy"] > 0.9


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
    model.mix.forward = lambda x, y: (x, share * one_hot(y, 3).float() + (1 - share) * one_hot(other, 3).float())
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


@pytest.mark.slow
def test_further_metric_is_in_every_place_and_that_of_the_predictions(photos, capsys):
    kappa = ["--model.metrics+=torchmetrics.CohenKappa", "--model.metrics.task=multiclass"]
    assert cli.main([*FIT, *ALIVE, "--model.lr", "0.001", *kappa]) == cli.main(["test"]) == 0
    assert "  cohen_kappa " in capsys.readouterr().out
    rows = list(predicted().values())
    labels = [[sorted(COLOURS).index(row[name]) for row in rows] for name in ("true", "label")]
    tested = json.loads((RUN / "test_metrics.json").read_text())
    assert tested["test/cohen_kappa"] == pytest.approx(cohen_kappa_score(*labels))
    (logged,) = (float(row["val/cohen_kappa"]) for row in read_csv(RUN / "metrics.csv") if row["val/cohen_kappa"])
    events = EventAccumulator(str(RUN)).Reload()
    for tag in ("val/cohen_kappa", "val_best/cohen_kappa"):
        assert events.Scalars(tag)[0].value == pytest.approx(logged)
    assert "cohen_kappa" in (RUN / "report.html").read_text()
    assert cli.main(["validate"]) == 0
    assert f"val/cohen_kappa {logged:.3f}" in capsys.readouterr().out


def by_formula(loss, logits, target, weights, smoothing):
    """Mean over the images, in float64."""
    logits, target = logits.detach().double(), target.double() * (1 - smoothing) + smoothing / 3
    p, weights = logits.softmax(1), torch.tensor(weights or [1.0] * 3).double()
    if loss == "bce":
        each = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), target, reduction="none").mean(1)
        return (each * (target @ weights)).mean().item()
    return (-(target * weights * p.log() * ((1 - p) ** 2 if loss == "focal" else 1)).sum(1)).mean().item()


CROSS_ENTROPY = "torch.nn.CrossEntropyLoss"


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "bce", CROSS_ENTROPY])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_every_loss_takes_weights_smoothing_and_mixed_labels_in_training_and_none_of_them_in_validation(
    loss, weights, smoothing, mix
):
    model, batch = classifier_and_batch(loss=loss, class_weights=weights, label_smoothing=smoothing, mix=mix)
    labels = torch.nn.functional.one_hot(batch.label, 3)
    mixed = 0.7 * labels + 0.3 * labels.flip(0) if mix != "none" else labels
    if mix != "none":
        model.mix.forward = lambda x, y: (x, mixed.float())
    value, logits = model._step(batch, "train")
    assert value.item() == pytest.approx(by_formula(loss, logits, mixed, weights, smoothing), rel=1e-5)
    assert model.train_loss.compute().item() == pytest.approx(value.item())
    value.backward()
    assert sum(p.grad.abs().sum() for p in model.network.parameters()) > 0
    if mix == "none":  # an image counts the same in every share of the batch
        parts = [Batch(*(column[rows] for column in batch[:3]), []) for rows in (slice(1), slice(1, 4))]
        shares = [model._step(part, "train")[0].item() * len(part.label) for part in parts]
        assert sum(shares) / 4 == pytest.approx(value.item(), rel=1e-5)
    model._step(batch, "val")
    assert model.val_loss.compute().item() == pytest.approx(by_formula(loss, logits, labels, None, 0.0), rel=1e-5)
    assert not [key for key in model.state_dict() if not key.startswith("network.")]


LOSS = """
import torch
from torch import nn


class Focal(nn.Module):
    def __init__(self, gamma: float = 0.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, target):
        each = nn.functional.cross_entropy(logits, target, reduction="none")
        return ((1 - torch.exp(-each)) ** self.gamma * each).mean()


class Learned(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Cut(nn.CrossEntropyLoss):
    def forward(self, logits, target):
        return super().forward(logits.detach(), target)
"""


@pytest.fixture
def own_losses(workplace, monkeypatch):
    Path("losses.py").write_text(LOSS)
    monkeypatch.syspath_prepend(workplace)
    yield
    sys.modules.pop("losses", None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"loss": "losses.Focal", "class_weights": [1, 2, 3]},
            "--data.balance loss does nothing in --model.loss losses",
        ),
        ({"loss": "losses.Focal", "label_smoothing": 0.2}, "--model.label_smoothing 0.2 does nothing in --model.loss"),
        ({"loss": "torch.nn.MultiMarginLoss", "mix": "cutmix"}, r"the labels \(B, 3\) of --model.mix cutmix: "),
        ({"loss": "torch.nn.BCEWithLogitsLoss"}, r"BCEWithLogitsLoss does not take labels \(B,\): "),
        ({"loss": "torch.nn.Softmax"}, r"torch.nn.Softmax does not take labels \(B,\): "),
        ({"loss": "losses.Learned"}, "losses.Learned has weights of its own, which no optimizer trains"),
        ({"loss": "losses.Cut"}, r"losses.Cut makes no loss: neither a mean nor \(B,\), with a gradient"),
        ({"loss": "losses.Focus"}, r"--model.loss losses.Focus: there is no such class.* Did you mean Focal\?"),
    ],
)
def test_option_that_does_nothing_in_a_loss_and_what_is_no_loss_are_refused(own_losses, options, words):
    with pytest.raises(UserError, match=words):
        classifier_and_batch(**options)


@pytest.mark.slow
def test_own_loss_and_no_default_of_the_weights_that_it_does_not_take(own_losses, photos, capsys):
    Path("own.yaml").write_text("model: {loss: {class_path: losses.Focal, init_args: {gamma: 2}}}")
    assert cli.main([*FIT, "--config", "own.yaml"]) == 0
    assert cli.main([*FIT, "--model.loss", "focal", "--name", "ours"]) == 0
    ours = Path("runs/ours/version_0")
    one, two = (checkpoint(run, "best")["metadata"] for run in (RUN, ours))
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4)
    assert one["config"]["model"]["loss"] == {"class_path": "losses.Focal", "init_args": {"gamma": 2.0}}
    assert cli.main(["test", str(RUN), "--trust", "losses.Focal"]) == cli.main(["test", str(ours)]) == 0
    tested = [json.loads((run / "test_metrics.json").read_text()) for run in (RUN, ours)]
    assert tested[0]["test/loss"] == pytest.approx(tested[1]["test/loss"], rel=1e-4)
    assert "  loss " in capsys.readouterr().out.splitlines()[-3]  # beside the cross-entropy
    make_images(Path("two"), {"red": 20, "blue": 20})
    two = [*FIT, "--model.weights", str(ours), "--data.root", "two", "--config", "own.yaml"]
    assert cli.main(two) == cli.main([*two, "--model.freeze", "backbone", "--data.augment", "none"]) == 0
    assert "head: trained, because the solution has the lowest cross-entropy" in capsys.readouterr().out
    recorded = checkpoint(Path("runs/two/version_0"), "best")["metadata"]["config"]["model"]
    assert recorded["label_smoothing"] == 0  # by default 0.1 with a new head above weights


@pytest.mark.parametrize(("balance", "mix"), [("loss", "mixup"), ("sample", "cutmix")])
@pytest.mark.slow
def test_fit_on_unequal_classes_with_balance_and_mixed_images(workplace, balance, mix):
    make_images(Path("photos"), {"red": 60, "blue": 12, "green": 12})
    assert cli.main([*FIT, "--data.balance", balance, "--model.mix", mix]) == 0
    (share,) = (float(row["train/accuracy"]) for row in read_csv(RUN / "metrics.csv") if row["train/accuracy"])
    assert 0 <= share <= 1
    assert cli.main(TEST) == cli.main([*TEST, "--data.balance", "none"]) == 0


def test_fit_and_test_from_a_csv_file_with_an_unreadable_image(photos, capsys):
    lines = [f"photos/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(photos.rglob("*.png"))]
    Path("my,list.csv").write_text("\n".join(["path,label", *lines]))
    assert cli.main(["fit", "--data.root", "my,list.csv", *ONE_EPOCH]) == 0
    run = Path("runs/my-list/version_0")
    held_out = {row["path"]: row["label"] for row in read_csv(run / "split.csv") if row["split"] == "test"}
    bad, label = held_out.popitem()
    Path(bad).write_bytes(b"no image")
    assert cli.main(TEST) == 0
    assert capsys.readouterr().out.count(f"left out, unreadable: {bad}: not an image") == 1
    row = predicted(run).pop(bad)
    assert predicted(run).keys() - {bad} == held_out.keys()
    assert (row["true"], row["label"], row["probability"]) == (label, "", "")
    assert "not an image" in row["error"]
    assert json.loads((run / "test_metrics.json").read_text())["unreadable"] == 1


@pytest.mark.slow
def test_test_uses_the_runs_own_split_unless_the_data_is_another_folder(photos, capsys):
    def held_out(root):
        rows = manifest.load(Path(root), folds=3, fold=1, group=r"(\d)\.png")
        return {f"{root}/{rows.paths[row]}" for row in rows.rows("test")}

    assert cli.main([*FIT, "--data.folds", "3", "--data.fold", "1", "--data.group", r"(\d)\.png"]) == 0
    own, run = held_out(photos), Path("runs/photos-fold1/version_0")
    make_images(photos, dict.fromkeys(COLOURS, 50))  # the folder has grown since
    for root in (None, "./photos", str(photos.resolve())):
        assert cli.main([*TEST, *(["--data.root", root] if root else [])]) == 0
        assert {str(Path(path).resolve().relative_to(Path.cwd())) for path in predicted(run)} == own
    photos.rename("moved")
    capsys.readouterr()
    assert cli.main([*TEST, "--data.root", "moved"]) == 0
    assert "so the run's split.csv is not used" in capsys.readouterr().out
    assert json.loads((run / "test_metrics.json").read_text())["data"] == "moved"
    assert predicted(run).keys() == held_out("moved")  # by the same fold and groups
    assert cli.main([*TEST, "--data.root", "moved", "--data.split", str(run / "split.csv")]) == 0
    assert predicted(run).keys() == {path.replace("photos/", "moved/") for path in own}


@pytest.mark.slow
def test_fit_prints_what_came_of_it_and_test_writes_into_the_run_of_its_checkpoint(photos, capsys):
    assert cli.main(FIT) == 0
    out = capsys.readouterr().out
    for part in ("photos: 120 images, 3 classes", "epoch 1/1", "best: epoch 1  val/loss", f"run: {RUN} (", "cli test"):
        assert part in out
    best = str(RUN / "checkpoints" / "best.ckpt")
    other = shutil.copytree(RUN, RUN.with_name("version_1"), copy_function=shutil.copy)  # newer
    RUN.with_name("version_7").mkdir()  # a fit that was killed before its first checkpoint
    assert locate().run == other
    assert cli.main(["test", "--ckpt_path", best]) == 0
    assert sorted(p.name for p in RUN.parent.iterdir()) == ["version_0", "version_1", "version_7"]
    result = json.loads((RUN / "test_metrics.json").read_text())
    assert result["n"] == len(predicted()) == 24
    assert (result["class_names"], result["checkpoint"]) == (sorted(COLOURS), best)
    assert not (other / "predictions.csv").exists()


@pytest.mark.slow
def test_layers_signature_run_config_command_line(photos):
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
    assert checkpoint(resumed)["epoch"] == 1  # not from the start again


@pytest.mark.slow
def test_resize_of_the_weights_is_recorded_and_stays_the_same_in_what_follows(photos, refused, capsys):
    own, squeezenet = "crop:bilinear:0.875", torchvision.models.get_model("squeezenet1_1")
    torch.save(squeezenet.state_dict(), "it.pth")
    weights = ["--data.resize", "weights"]
    assert cli.main([*FIT, *weights, "--model.weights", "it.pth"]) == 0
    assert f"32 px ({own})" in capsys.readouterr().out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["data"]["resize"] == own
    assert checkpoint(RUN, "best")["metadata"]["resize"] == own
    assert own in next(Path("data/cache").iterdir()).name.replace("-", ":")
    assert cli.main([*TEST, *weights]) == 0  # its checkpoint's
    more = ["fit", "--trainer.max_epochs", "2", "--resume", str(RUN), "--data.resize"]
    assert f"--data.resize {own} -> crop:" in refused(*more, "crop")
    assert cli.main([*more, "weights"]) == 0
    assert cli.main([*FIT, "--data.resize", "pad:nearest", "--model.weights", str(RUN)]) == 0
    last = RUN.with_name("version_1") / "checkpoints" / "last.ckpt"
    assert cli.main(["fit", *weights, "--ckpt_path", str(last), "--trainer.max_epochs", "2"]) == 0
    config = yaml.safe_load((RUN.with_name("version_2") / "config.yaml").read_text())
    assert config["data"]["resize"] == "pad:nearest"


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
    last = checkpoint(RUN)
    assert last["epoch"] == epochs - 1
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 10 * epochs
    validated = "check_val_every_n_epoch" not in options[0] or epochs > 1
    out = capsys.readouterr().out
    assert ("best: epoch" in out) == ("There was no validation" not in out) == validated
    assert "next: tensorboard --logdir runs |" in out
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


def own(name, **options):
    """The words that put one of Lightning's callbacks, with these options, into a fit."""
    return ["--trainer.callbacks", name, *(w for k, v in options.items() for w in (f"--trainer.callbacks.{k}", v))]


@pytest.mark.parametrize("options", [own("RichProgressBar"), own("TQDMProgressBar", refresh_rate="2")])
@pytest.mark.parametrize("shown", [[], ["--trainer.enable_progress_bar", "true"]])
def test_own_progress_bar_replaces_ours(photos, options, shown):
    assert cli.main([*FIT, *options, *shown]) == 0


@pytest.mark.parametrize("name", ["best", "last", "previous"])
def test_own_checkpoint_in_the_same_folder_does_not_replace_ours(photos, name):
    options = own("ModelCheckpoint", filename=name, save_last="link", dirpath=str(RUN.absolute() / "checkpoints"))
    assert cli.main([*FIT, *options]) == 0
    files = {"best.ckpt", "last.ckpt", "last-v1.ckpt"} | ({f"{name}-v1.ckpt"} if name != "last" else set())
    assert {path.name for path in (RUN / "checkpoints").iterdir()} >= files
    assert "optimizer_states" not in checkpoint(RUN, "best")
    assert "loop_state" in checkpoint(RUN, "last")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (own("EarlyStopping", monitor="val_loss"), ["val_loss", "val/loss, val/accuracy"]),
        (own("ModelCheckpoint", monitor="val_acc"), ["val_acc", "val/loss, val/accuracy"]),
        (
            ["--monitor", "val/acuracy"],
            ["--monitor is val/acuracy, but a fit logs val/loss, val/accuracy", "Did you mean val/accuracy?"],
        ),
        (["--monitor", "train/loss"], ["--monitor is train/loss, but a fit logs val/loss, val/accuracy"]),
        ([*own("EarlyStopping", monitor="val/loss"), "--patience", "3"], ["--patience", "leave one out"]),
        (
            [*own("EarlyStopping", monitor="val/f1"), "--patience", "3", "--monitor", "val/f1"],
            ["watch val/f1; leave one out"],
        ),
        (own("no.such.Thing"), ["--trainer.callbacks no.such.Thing", "there is no module no."]),
        (own("json.Thing"), ["json.Thing", "json has no Thing."]),
        (own("Thing"), ["Thing", "give package.module.Class"]),
        (own("EarlyStopping", moniter="x"), ["it takes no moniter. Did you mean monitor?"]),
        (own("EarlyStopping", monitor="val/loss", mode="up"), ["EarlyStopping", "`mode` can be min, max"]),
        (["--trainer.logger", "CSVLogger"], ["CSVLogger", "it needs save_dir"]),
        (["--trainer.logger", "CometLogger"], ["CometLogger", "pip install -U 'comet-ml"]),
        (["--trainer.profiler", "xla"], ["pip install -U 'torch_xla"]),
        (["--trainer.barebones", "true"], ["--trainer.barebones", "bench"]),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Lightning's XLAProfiler
def test_own_objects_that_cannot_be_used_are_refused_in_a_sentence_before_training(photos, refused, options, words):
    message = refused(*FIT, *options)
    assert all(word in message for word in words), message
    assert "Namespace" not in message
    assert not Path("runs").exists()


@pytest.mark.full
def test_callback_may_monitor_what_an_edited_classifier_logs(photos, monkeypatch, refused):
    stop = own("EarlyStopping", monitor="val/own")
    assert "val/own" in refused(*FIT, *stop)
    assert "lr-SGD` which is not available" in refused(*FIT, *own("EarlyStopping", monitor="lr-SGD"))
    assert cli.main([*FIT, *own("EarlyStopping", monitor="lr-Adam")]) == 0
    monkeypatch.setattr(inspect, "getsource", lambda _: 'self.log(f"{split}/own", loss)')
    assert "not available" in refused(*FIT, *stop)  # found after the first epoch


def test_profile_is_printed(photos, caplog):
    assert cli.main([*FIT, "--trainer.profiler", "simple"]) == 0
    assert "FIT Profiler Report" in caplog.text


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"test/auroc": float("nan"), "café": 1.5})
    assert (tmp_path / "a.json").read_text("utf-8").split() == ["{", '"test/auroc":', "null,", '"café":', "1.5", "}"]


@pytest.mark.full
def test_default_root_dir_contains_the_runs(photos, refused):
    at = ["--trainer.default_root_dir", "deep/er"]
    Path("deep").mkdir()
    assert cli.main([*FIT, *at, "--trainer.fast_dev_run", "1"]) == 0
    assert not [*Path("deep").rglob("runs")]
    assert Path("deep").is_dir()
    assert cli.main([*FIT, *at]) == cli.main([*TEST, *at]) == 0
    run = Path("deep/er/runs/photos/version_0")
    assert (run / "test_metrics.json").exists()
    assert Path("deep/er/runs/latest").resolve() == run.resolve()
    assert not Path("runs").exists()
    assert "No run in runs/" in refused(*TEST)
    (run / "status.json").write_text('{"state": "stopped"}')
    assert cli.main(["fit", *at, "--resume", "--trainer.max_epochs", "2"]) == 0
    assert checkpoint(run)["epoch"] == 1


@pytest.mark.slow
def test_runs_names_the_folder_of_all_runs_for_every_verb_that_looks_for_the_newest(photos, refused, capsys):
    at = ["--runs", "ours", "--trainer.default_root_dir", "deep"]
    assert cli.main([*FIT, *at]) == cli.main([*TEST, *at[:2]]) == cli.main(["validate", *at[:2]]) == 0
    run = Path("ours/photos/version_0")
    assert (run / "test_metrics.json").exists()
    assert Path("ours/latest").resolve() == run.resolve()
    assert not Path("runs").exists()
    assert not Path("deep").exists()
    (run / "status.json").write_text('{"state": "stopped"}')
    assert cli.main(["fit", "--runs", "ours/", "--resume", "--trainer.max_epochs", "2"]) == 0
    assert checkpoint(run)["epoch"] == 1
    assert "No run in theirs/ has a best.ckpt; train one first" in refused(*TEST, "--runs", "theirs")


@pytest.mark.slow
def test_network_with_batch_norm_takes_batches_of_one_and_of_none(photos):
    for file in sorted(photos.glob("red/*.png"))[:30]:
        file.write_bytes(b"")
    limits = ["--data.batch_size", "1", "--trainer.limit_train_batches", "12"]
    assert cli.main([*FIT, "--model.name", "resnet18", *limits]) == 0
    assert all(torch.isfinite(tensor.float()).all() for tensor in checkpoint(RUN)["state_dict"].values())


def test_checkpoint_outside_its_run_overwrites_nothing(at_trained, tmp_path, refused):
    shutil.copy(at_trained / "checkpoints" / "best.ckpt", tmp_path)
    (tmp_path / "predictions.csv").write_text("mine")
    assert "predictions.csv exists" in refused("test", "--ckpt_path", str(tmp_path / "best.ckpt"))
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    (tmp_path / "predictions.csv").unlink()
    assert cli.main(["test", "--ckpt_path", str(tmp_path / "best.ckpt")]) == 0
    made = {"predictions.csv", "test_metrics.json", "report.html"}  # the run alone knows the validation images
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", *made}


def test_validate_gives_the_metrics_of_a_checkpoint_which_cannot_choose_what_code_runs(
    at_trained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "evil.py").write_text("open('executed', 'w')\nfrom lightning.pytorch import Callback\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = checkpoint(at_trained, "best")
    for key in ("callbacks", "logger", "plugins", "profiler", "strategy"):
        content["metadata"]["config"]["trainer"][key] = {"class_path": "evil.Callback"}
    content["metadata"]["config"]["model"]["name"] = {"class_path": "evil.Callback"}
    torch.save(content, tmp_path / "other.ckpt")
    before = sorted(Path("runs").rglob("*"))
    assert cli.main(["validate", "--ckpt_path", str(tmp_path / "other.ckpt"), "--model.name", "squeezenet1_1"]) == 0
    assert f"{content['metadata']['metrics']['val/loss']:.4f}" in capsys.readouterr().out
    assert sorted(Path("runs").rglob("*")) == before
    assert not Path("executed").exists()


@pytest.mark.parametrize(("hparams", "best"), [(HParams({}), 0.5), (HParams({}, "val/f1", "max"), 0.7)])
def test_nan_is_never_best(hparams, best):
    key = hparams.monitor
    for epoch, value in enumerate((float("nan"), best, float("nan"), 0.6)):
        hparams.on_validation_end(SimpleNamespace(callback_metrics={key: value}, current_epoch=epoch), None)
    assert hparams.best == {key: best, "epoch": 2}


def test_direction_of_a_figure_is_that_of_its_metric(monkeypatch):
    kappa, error = ("torchmetrics.classification.Multiclass" + name for name in ("CohenKappa", "CalibrationError"))
    model, _ = classifier_and_batch(metrics=[kappa, error])
    directions = {str(name).removeprefix("val/"): fit.watched(model, str(name))[1] for name in model.val_metrics}
    assert directions.pop("multiclass_calibration_error") == fit.watched(model, "val/loss")[1] == "min"
    assert len(directions) == 6
    assert set(directions.values()) == {"max"}
    monkeypatch.setattr(Score, "higher_is_better", None)
    with pytest.raises(UserError, match="--monitor val/f1: its metric has no higher_is_better"):
        fit.watched(model, "val/f1")


def test_run_of_a_version_without_loss_and_monitor_is_resumed_as_it_was(trained, workplace, refused):
    for name in ("photos", "runs"):
        shutil.copytree(trained / name, name, symlinks=True)
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    del config["monitor"], config["model"]["loss"]
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    resume = ["fit", "--resume", str(RUN), "--trainer.max_epochs", "4"]
    assert "--model.loss cross_entropy -> bce" in refused(*resume, "--model.loss", "bce")
    assert cli.main(resume) == 0


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
        (["--data.batch_size", "2", *RANKS, "3"], ["3 processes", "2 images in a batch", "give --trainer.devices 2"]),
        (["--data.batch_size", "40", *RANKS, "13"], ["12 val images", "give --trainer.devices 12"]),
        *((["--name", name], ["--name"]) for name in ("latest", "a/b", "..", "a,b")),
        *(
            ([f"--trainer.{limit}", "0.01"], [f"--trainer.{limit} 0.01 is less than one of", "batches; give 1"])
            for limit in ("overfit_batches", "limit_train_batches", "limit_val_batches")
        ),
        (["--data.resize", "crop:cubic"], ["There is no resize crop:cubic; give stretch"]),
        (["--data.resize", "weights"], ["--model.weights none of squeezenet1_1 has no known resize; give others"]),
        (["--data.root", "nowhere"], ["no folder nowhere"]),
        (["--data.root", "empty"], ["No images in empty"]),
        (["--data.root", "a.jpg"], ["a.jpg is neither a folder nor a CSV file"]),
        (["--data.root", "one"], ["one class, cat", "give one/cat"]),
        pytest.param(
            ["--trainer.accelerator", "gpu"],
            ["Trainer does not accept these options", "gpu"],
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator"),
        ),
    ],
)
def test_what_cannot_be_trained_on_or_used_is_refused_before_there_is_a_run(photos, refused, options, sentences):
    Path("empty").mkdir()
    Path("a.jpg").write_bytes(b"x")
    make_images(Path("one"), {"cat": 9})
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

    WAITING = ("local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.__name__.split(".")[0].lstrip("_")) in self.WAITING:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", [[], ["--data.balance", "sample"]])
def test_overfit_batches_trains_on_the_same_shuffled_batches_in_each_epoch(photos, monkeypatch, options):
    batches, step = [], Classifier.training_step
    monkeypatch.setattr(
        Classifier, "training_step", lambda self, batch, index: batches.append(batch) or step(self, batch, index)
    )
    assert cli.main([*FIT, "--trainer.max_epochs", "3", "--trainer.overfit_batches", "2", *options]) == 0
    first = batches[:2]
    assert len(batches) == 6
    for batch, same in zip(batches, 3 * first, strict=True):
        assert torch.equal(batch.row, same.row)
        assert torch.equal(batch.image, same.image)
    assert len(first[0].label.unique()) > 1
    assert not torch.equal(first[0].row, first[1].row)


@pytest.mark.parametrize(
    "options", [[], *(["--model.loss", loss, *SMOOTHED] for loss in ("cross_entropy", "focal", "bce", CROSS_ENTROPY))]
)
def test_no_training_step_waits_for_the_device_and_a_fast_dev_run_leaves_nothing(photos, monkeypatch, options):
    waits, step = Waits(), Classifier.training_step

    def watched(self, batch, batch_idx):
        with waits:
            return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", watched)
    assert cli.main([*FIT, *options, "--trainer.fast_dev_run", "3"]) == 0
    assert not Path("runs").exists()
    assert waits.found == []
    with waits:
        float(torch.ones(1))
    assert waits.found == ["local_scalar_dense"]  # it would have been seen


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_fit_keeps_freed_memory_for_the_next_step(at_trained):
    """So that the kernel need not clear it again; the fit has run in this process."""
    import resource  # not on Windows

    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1000


@pytest.mark.slow
def test_report_and_test_of_a_checkpoint_outside_runs_may_be_repeated(tested, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tested)
    file = str(shutil.copy(tested / "runs/photos/version_0/checkpoints/best.ckpt", tmp_path / "mine.ckpt"))
    (tmp_path / "predictions.csv").write_text("my own")
    assert "may be your own" in refused("report", file)
    assert [path.name for path in tmp_path.iterdir() if path != tmp_path / "mine.ckpt"] == ["predictions.csv"]
    (tmp_path / "predictions.csv").unlink()
    for verb in (["report"], ["test", "--ckpt_path"], ["report"]):
        assert cli.main([*verb, file]) == 0
