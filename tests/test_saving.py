"""Averaged weights, and a fit that stops by itself."""

import csv
from pathlib import Path

import pytest
import torch

from project import cli
from tests.conftest import SMALL

FIT = ["fit", "--data.root", "photos", *SMALL]


def content_of(name, run=Path("runs/photos/version_0")):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_best_holds_the_averaged_weights_that_were_validated(photos, capsys):
    assert cli.main([*FIT, "--trainer.max_epochs", "2", "--average", "0.9", "--model.lr", "0.001"]) == 0
    best, last = content_of("best"), content_of("last")
    assert "current_model_state" not in best  # weights only
    same = all(torch.equal(tensor, last["state_dict"][key]) for key, tensor in best["state_dict"].items())
    assert same == (best["epoch"] == last["epoch"])
    assert not all(torch.equal(t, last["current_model_state"][k]) for k, t in last["state_dict"].items())
    capsys.readouterr()
    assert cli.main(["validate"]) == 0
    measured = capsys.readouterr().out
    assert f"{best['metadata']['metrics']['val/loss']:.5f}"[:6] in measured


def test_average_is_that_of_the_weights_after_each_step(photos, monkeypatch):
    from project.average import Average

    seen = []
    end = Average.on_train_batch_end

    def note(self, trainer, pl_module, *rest):
        seen.append(next(pl_module.parameters()).detach().clone())
        end(self, trainer, pl_module, *rest)

    monkeypatch.setattr(Average, "on_train_batch_end", note)
    assert cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.5"]) == 0
    expected = seen[0]
    for step, weights in enumerate(seen[1:], 1):
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weights
    name, tensor = next(iter(content_of("last")["state_dict"].items()))
    assert tensor.shape == expected.shape, name
    assert torch.allclose(tensor, expected, atol=1e-6)


def test_averaged_fit_goes_on_from_its_last_checkpoint(photos):
    assert cli.main([*FIT, "--trainer.max_epochs", "1", "--average", "0.9", "--model.name", "resnet18"]) == 0
    last = "runs/photos/version_0/checkpoints/last.ckpt"
    assert cli.main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert "current_model_state" in content_of("last", Path("runs/photos/version_1"))
    assert "average: 0.9" in Path("runs/photos/version_1/config.yaml").read_text()


def test_validation_that_is_cut_short_does_not_mix_up_weights_and_average(photos, monkeypatch):
    from project.classifier import Classifier

    seen = {}
    validate = Classifier.validation_step

    def cut_short(self, batch, batch_idx):
        if self.trainer.current_epoch == 1:
            raise RuntimeError("a disk fails")
        return validate(self, batch, batch_idx)

    def note(self, *_):
        seen["weights"] = {key: tensor.clone() for key, tensor in self.state_dict().items()}

    monkeypatch.setattr(Classifier, "validation_step", cut_short)
    monkeypatch.setattr(Classifier, "on_train_batch_end", note)
    with pytest.raises(RuntimeError, match="a disk fails"):
        cli.main([*FIT, "--trainer.max_epochs", "3", "--average", "0.9"])
    last = content_of("last")
    assert last["epoch"] == 1
    assert all(torch.equal(t, last["current_model_state"][k]) for k, t in seen["weights"].items())


def test_fit_stops_when_the_validation_loss_no_longer_falls_and_says_so(photos, capsys):
    options = ["--trainer.max_epochs", "9", "--patience", "2", "--model.lr", "1e-9"]
    assert cli.main([*FIT, *options]) == 0
    out = capsys.readouterr().out
    with Path("runs/photos/version_0/metrics.csv").open() as stream:
        losses = [float(row["val/loss"]) for row in csv.DictReader(stream) if row["val/loss"]]
    assert len(losses) < 9
    assert min(losses) == pytest.approx(losses[-3], abs=1e-6)
    assert f"stopped after epoch {len(losses)}: no lower val/loss in 2 epochs" in out
