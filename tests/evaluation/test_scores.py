"""The report's scores against scikit-learn and against metrics.py, and how they are written."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from project import metrics
from project.evaluation import scores
from project.evaluation.scores import RankedScores, ScoredPredictions
from tests import test_metrics


def drawn(classes, count=300, absent=None, ties=False, seed=0):
    """True classes and probabilities."""
    present = [index for index in range(classes) if index != absent]
    probabilities, true = test_metrics.drawn(2 * seed, present, k=classes, n=count)
    probabilities = probabilities.astype(float).round(1) + 1e-3 if ties else probabilities.astype(float)
    return true, probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("classes", "absent", "positive"), [(5, None, None), (5, 1, None), (2, None, 0), (2, None, 1)])
def test_scores_are_those_of_scikit_learn_and_of_training(classes, absent, positive, ties):
    true, probabilities = drawn(classes, absent=absent, ties=ties)
    values = ScoredPredictions(true, probabilities, positive).scores()
    labels, predicted = true, probabilities.argmax(axis=1)
    average = {"average": "macro", "zero_division": 0, "labels": np.unique(true)}
    if positive is not None:
        labels, predicted, average = true == positive, predicted == positive, {}
    ranked = np.unique(true) if positive is None else [positive]
    expected = {
        "accuracy": reference.accuracy_score(labels, predicted),
        "precision": reference.precision_score(labels, predicted, **average),
        "recall": reference.recall_score(labels, predicted, **average),
        "f1": reference.f1_score(labels, predicted, **average),
        "auroc": np.mean([reference.roc_auc_score(true == c, probabilities[:, c]) for c in ranked]),
        "cross-entropy": reference.log_loss(true, probabilities, labels=range(classes)),
        "brier": ((probabilities - np.eye(classes)[true]) ** 2).sum(axis=1).mean(),
    }
    assert values == pytest.approx(expected, abs=1e-6)
    names = list("abcde")[:classes]
    training = metrics.metrics(names, None if positive is None else names[positive])
    training.update(torch.from_numpy(probabilities), torch.from_numpy(true))
    trained = {name: float(value) for name, value in training.compute().items()}
    assert trained == pytest.approx({name: values[name] for name in trained}, abs=1e-6)


def test_a_weight_of_two_counts_an_image_twice():
    true, probabilities = drawn(4, count=60, ties=True)
    weight = np.random.default_rng(1).integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weight)
    weighted = ScoredPredictions(true, probabilities).scores(weight.astype(float))
    assert weighted == pytest.approx(ScoredPredictions(true[repeated], probabilities[repeated]).scores(), abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_those_of_scikit_learn(ties):
    true, probabilities = drawn(3, ties=ties)
    ranked = RankedScores(probabilities[:, 0], true == 0)
    expected = reference.roc_curve(true == 0, probabilities[:, 0], drop_intermediate=False)
    assert np.allclose(ranked.roc(), expected[:2])
    assert np.allclose(ranked.thresholds, expected[2][1:])
    average = reference.average_precision_score(true == 0, probabilities[:, 0])
    assert ranked.average_precision() == pytest.approx(average, abs=1e-9)


def test_calibration_error_is_the_distance_of_confidence_and_accuracy_and_abstaining_keeps_the_most_confident():
    assert ScoredPredictions(np.array([0, 1] * 50), np.tile([0.9, 0.1], (100, 1))).ece() == pytest.approx(0.4)
    assert ScoredPredictions(np.zeros(100, int), np.tile([1.0, 0.0], (100, 1))).ece() == 0
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    kept, accuracy, confidence = ScoredPredictions(np.array([0, 0, 0, 1]), probabilities).coverage()
    assert (kept.tolist(), accuracy.tolist()) == ([0.25, 0.75, 1.0], [1.0, 1.0, 0.75])
    assert confidence.tolist() == [0.9, 0.8, 0.6]


def test_95_percent_intervals_contain_the_truth_about_as_often(monkeypatch):
    monkeypatch.setattr(scores, "REPEATS", 200)
    contained = 0
    for seed in range(60):
        low, high = scores.intervals(ScoredPredictions(*drawn(2, count=150, seed=seed), 1))["accuracy"]
        contained += low <= 0.7602 <= high  # P(normal(1, sqrt 2) > 0), the accuracy on such images
    assert 51 <= contained <= 60


def test_intervals_of_paired_differences_are_narrower_than_those_of_single_runs(monkeypatch):
    monkeypatch.setattr(scores, "REPEATS", 200)
    true, probabilities = drawn(3)
    better = probabilities + 0.02 * np.eye(3)[true]
    better /= better.sum(axis=1, keepdims=True)
    first, second = ScoredPredictions(true, probabilities), ScoredPredictions(true, better)
    difference, low, high = scores.differences(first, second)["cross-entropy"]
    assert difference == pytest.approx(second.scores()["cross-entropy"] - first.scores()["cross-entropy"])
    assert low < difference < high < 0
    alone = scores.intervals(first)["cross-entropy"]
    assert high - low < (alone[1] - alone[0]) / 3


def test_baseline_of_one_class_is_right_as_often_as_the_class_occurs():
    true, probabilities = drawn(3)
    baseline = ScoredPredictions(true, probabilities).constant(2).scores()
    assert baseline["accuracy"] == pytest.approx((true == 2).mean())
    assert baseline["auroc"] == 0.5


def test_a_score_below_1_is_never_written_as_1_and_differences_have_the_decimals_of_their_scores():
    for expected, name, *values in (
        ("0.912", "auroc", 0.91234),
        ("91.2 %", "accuracy", 0.91234),
        ("0.9999", "auroc", 0.9999),
        ("0.9998 to 1.0000", "auroc", 0.99984, 1.0),
        ("99.97 to 100.00 %", "recall", 0.99968, 1.0),
        ("1.000", "auroc", 1.0),
        ("1.235", "cross-entropy", 1.23456),
        ("-", "auroc", np.nan, np.nan),
    ):
        assert scores.format_score(name, *values) == expected
    for expected, name, difference, *values in (
        ("+0.010 [-0.020, +0.030]", "auroc", (0.01, -0.02, 0.03), 0.9, 0.91),
        ("+0.00005 [-0.00010, +0.00020]", "auroc", (5e-5, -1e-4, 2e-4), 0.9999, 0.99995),
        ("+1.0 [-2.0, +3.0]", "accuracy", (0.01, -0.02, 0.03), 0.9, 0.91),
        ("", "auroc", (np.nan,) * 3, np.nan, 0.5),
    ):
        assert scores.format_difference(name, difference, *values) == expected
