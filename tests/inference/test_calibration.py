"""Temperature: found from predictions, kept beside the checkpoint, used when asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from project import load
from project.errors import UserError
from project.inference import calibration


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_that_was_put_in_is_found_and_has_the_lowest_loss(temperature):
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 2, (20_000, 5)))
    true = (logits.softmax(dim=1).numpy().cumsum(axis=1) < random.random((20_000, 1))).sum(axis=1)
    probabilities = (logits * temperature).softmax(dim=1).numpy()
    fitted = calibration.fit_temperature(true, probabilities)
    assert fitted == pytest.approx(temperature, rel=0.03)

    def loss(divisor):
        expected = (logits * temperature / divisor).softmax(dim=1)
        assert np.allclose(calibration.at_temperature(probabilities, divisor), expected, atol=1e-12)
        return float(functional.nll_loss(expected.log(), torch.from_numpy(true)))

    assert loss(fitted) < min(loss(fitted * 1.01), loss(fitted / 1.01))


@pytest.mark.parametrize("sureness", [1.0, 0.8, 0.4])
def test_predictions_that_are_all_right_or_all_wrong_give_no_temperature(sureness):
    """Surer would always be better, or never sure enough; a dozen rights must not make 0.5 a 0.9999."""
    rows = np.full((4, 3), (1 - sureness) / 2)
    rows[np.arange(4), [0, 1, 2, 0]] = sureness
    assert calibration.fit_temperature(np.array([0, 1, 2, 0]), rows) is None
    assert calibration.fit_temperature(np.array([1, 2, 0, 1]), rows) is None


@pytest.fixture
def own(at_trained, tmp_path):
    return shutil.copytree(at_trained, tmp_path / "run") / "checkpoints" / "best.ckpt"


def test_kept_temperature_is_used_when_asked_for_and_only_for_the_weights_it_was_fitted_on(own):
    calibration.write(own, 2.0)
    images = sorted(map(str, Path("photos").rglob("*.png")))[::9]
    plain, warm = load(own).predict(images), load(own, calibrated=True).predict(images)
    assert [p.label for p in plain] == [p.label for p in warm]
    expected = calibration.at_temperature(np.array([p.probabilities for p in plain]), 2.0)
    assert np.allclose([p.probabilities for p in warm], expected, atol=1e-6)
    content = torch.load(own, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, own)
    assert calibration.read(own) is None
    with pytest.raises(UserError, match=r"report .*best\.ckpt finds it"):
        load(own, calibrated=True)
    calibration.write(own, None)
    assert not own.with_suffix(".temperature.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"temperature": "hot"}', '{"temperature": -1, "checkpoint": ""}'])
def test_damaged_file_is_named(own, text):
    own.with_suffix(".temperature.json").write_text(text)
    with pytest.raises(UserError, match=r"best\.temperature\.json"):
        calibration.read(own)
