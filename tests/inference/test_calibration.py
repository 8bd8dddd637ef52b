"""Temperature: found from predictions, kept beside the checkpoint, used when asked for."""

import shutil
from dataclasses import replace
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
    calibration.write(own, 2.0, [0.5, 1.5])
    assert (calibration.read(own), load(own).metadata.max_logits) == ((2.0, [0.5, 1.5]), [0.5, 1.5])
    images = sorted(map(str, Path("photos").rglob("*.png")))[::9]
    plain, warm = load(own).predict(images), load(own, calibrated=True).predict(images)
    assert [p.label for p in plain] == [p.label for p in warm]
    expected = calibration.at_temperature(np.array([p.probabilities for p in plain]), 2.0)
    assert np.allclose([p.probabilities for p in warm], expected, atol=1e-6)
    content = torch.load(own, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, own)
    assert calibration.read(own) == (None, [])
    assert load(own).metadata.max_logits == []
    with pytest.raises(UserError, match=r"report .*best\.ckpt finds it"):
        load(own, calibrated=True)
    calibration.write(own, None, [0.5])
    assert calibration.read(own) == (None, [0.5])
    with pytest.raises(UserError, match=r"report .*best\.ckpt finds it"):
        load(own, calibrated=True)


VALUES = [("-1", "[]"), ("NaN", "[]"), ("2.0", "[NaN]"), ("2.0", '["a"]'), ("2.0", "null"), ('"hot"', "[]")]
TEXTS = ['"temperature": %s, "max_logits": %s' % values for values in VALUES]  # noqa: UP031 (braces)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", *TEXTS])
def test_damaged_file_counts_as_missing_and_stops_only_what_needs_it(own, text):
    whole = f'{{{text}, "checkpoint": "{calibration.fingerprint(own)}"}}' if text in TEXTS else text
    own.with_suffix(".temperature.json").write_text(whole)
    assert calibration.read(own) == (None, [])
    predictor = load(own)
    with pytest.raises(UserError, match=r"No temperature is known for .*; python -m project.cli report .* finds it"):
        load(own, calibrated=True)
    with pytest.raises(UserError, match=r"have not been measured: run python -m project\.cli test RUN, and export"):
        predictor.metadata.unknown_below(0.05)


def test_every_form_of_checkpoint_has_a_fingerprint(tmp_path):
    torch.save({"a": 1}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / ".metadata").write_bytes(b"parts")
    assert len({calibration.fingerprint(file) for file in tmp_path.iterdir()}) == 2
    assert calibration.read(tmp_path / "old.ckpt") == (None, [])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_maximum_logit_is_the_logits_own_but_for_their_mean_at_any_temperature(temperature):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (500, 7)))
    expected = (logits - logits.mean(dim=1, keepdim=True)).max(dim=1).values.numpy()
    probabilities = (logits / temperature).softmax(dim=1).float().numpy()
    assert np.allclose(temperature * calibration.max_logits(probabilities), expected, atol=1e-4)
    assert np.isfinite(calibration.max_logits(np.eye(3))).all()


@pytest.mark.parametrize(("count", "kept"), [(3, 3), (201, 201), (1000, 201)])
def test_threshold_flags_at_most_the_share_of_the_validation_images_and_says_how_many(at_trained, count, kept):
    values = np.random.default_rng(0).permutation(np.arange(count) + 1.0)
    known = calibration.quantiles(values)
    assert (len(known), known[0], known[-1]) == (kept, 1, count)
    for temperature in (1.0, 2.0):
        metadata = replace(load(at_trained).metadata, max_logits=known, temperature=temperature)
        for share in (0.01, 0.05, 0.5):
            threshold, text = metadata.unknown_below(share)
            flagged = (values < temperature * threshold).mean()
            assert share - max(1 / count, 0.005) <= flagged <= share + 1e-9
            assert float(text.partition(" %")[0]) == pytest.approx(100 * flagged, abs=0.3)
            assert text.endswith("of 3 validation images" if count == 3 else "of the validation images")
