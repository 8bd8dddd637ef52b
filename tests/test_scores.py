"""The report's numbers against scikit-learn and against metrics.py."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from project import metrics, scores
from project.scores import Ranked, Sample


def drawn(classes, count=300, absent=None, ties=False, seed=0):
    random = np.random.default_rng(seed)
    true = random.integers(classes, size=count)
    if absent is not None:
        true[true == absent] = (absent + 1) % classes
    logits = random.normal(0, 1, (count, classes))
    logits[np.arange(count), true] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = np.round(probabilities, 1) + 1e-3
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return true, probabilities


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("absent", [None, 1])
def test_figures_of_many_classes_are_those_of_scikit_learn_and_of_training(absent, ties):
    true, probabilities = drawn(5, absent=absent, ties=ties)
    found = Sample(true, probabilities).figures()
    predicted = probabilities.argmax(axis=1)
    macro = {"average": "macro", "zero_division": 0}
    present = np.unique(true)
    aurocs = [reference.roc_auc_score(true == c, probabilities[:, c]) for c in present]
    expected = {
        "accuracy": reference.accuracy_score(true, predicted),
        "precision": reference.precision_score(true, predicted, **macro),
        "recall": reference.recall_score(true, predicted, **macro),
        "f1": reference.f1_score(true, predicted, **macro),
        "auroc": np.mean(aurocs),
        "loss": reference.log_loss(true, probabilities, labels=range(5)),
        "brier": ((probabilities - np.eye(5)[true]) ** 2).sum(axis=1).mean(),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    collection = metrics.metrics(list("abcde"))
    collection.update(torch.from_numpy(probabilities), torch.from_numpy(true))
    trained = {name: float(value) for name, value in collection.compute().items()}
    assert trained == pytest.approx({name: found[name] for name in trained}, abs=1e-6)


@pytest.mark.parametrize("positive", [0, 1])
def test_figures_of_two_classes_are_of_the_positive_one(positive):
    true, probabilities = drawn(2)
    found = Sample(true, probabilities, positive).figures()
    is_positive, predicted = true == positive, probabilities[:, positive] > 0.5
    assert found["precision"] == pytest.approx(reference.precision_score(is_positive, predicted), abs=1e-6)
    assert found["recall"] == pytest.approx(reference.recall_score(is_positive, predicted), abs=1e-6)
    assert found["f1"] == pytest.approx(reference.f1_score(is_positive, predicted), abs=1e-6)
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(is_positive, probabilities[:, positive]), abs=1e-6)
    collection = metrics.metrics(["no", "yes"], ["no", "yes"][positive])
    collection.update(torch.from_numpy(probabilities), torch.from_numpy(true))
    trained = {name: float(value) for name, value in collection.compute().items()}
    assert trained == pytest.approx({name: found[name] for name in trained}, abs=1e-6)


def test_weights_count_pictures_as_often_as_they_say():
    true, probabilities = drawn(4, count=60, ties=True)
    weight = np.random.default_rng(1).integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weight)
    weighted = Sample(true, probabilities).figures(weight.astype(float))
    assert weighted == pytest.approx(Sample(true[repeated], probabilities[repeated]).figures(), abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_those_of_scikit_learn(ties):
    true, probabilities = drawn(3, ties=ties)
    ranked = Ranked(probabilities[:, 0], true == 0)
    alarms, hits, thresholds = ranked.roc()
    expected = reference.roc_curve(true == 0, probabilities[:, 0], drop_intermediate=False)
    assert np.allclose(alarms, expected[0])
    assert np.allclose(hits, expected[1])
    assert np.allclose(thresholds, expected[2][1:])
    average = reference.average_precision_score(true == 0, probabilities[:, 0])
    assert ranked.average_precision() == pytest.approx(average, abs=1e-9)


def test_confidence_that_is_always_right_by_half_has_a_calibration_error_of_what_it_claims_too_much():
    true = np.array([0, 1] * 50)
    probabilities = np.tile([0.9, 0.1], (100, 1))
    assert Sample(true, probabilities).ece() == pytest.approx(0.4)
    assert Sample(np.zeros(100, int), np.tile([1.0, 0.0], (100, 1))).ece() == 0


def test_abstaining_answers_the_surest_first():
    true = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    answered, accuracy, sure = Sample(true, probabilities).coverage()
    assert answered.tolist() == [0.25, 0.75, 1.0]
    assert accuracy.tolist() == [1.0, 1.0, 0.75]
    assert sure.tolist() == [0.9, 0.8, 0.6]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(60):
        true, probabilities = drawn(2, count=150, seed=seed)
        low, high = scores.intervals(Sample(true, probabilities, 1), repeats=200, seed=seed)["accuracy"]
        held += low <= 0.7602 <= high  # P(normal(1, sqrt 2) > 0), the share that such pictures are right
    assert 51 <= held <= 60


def test_pairs_make_differences_surer_than_two_intervals():
    true, probabilities = drawn(3)
    better = probabilities + 0.02 * np.eye(3)[true]
    better /= better.sum(axis=1, keepdims=True)
    first, second = Sample(true, probabilities), Sample(true, better)
    difference, low, high = scores.differences(first, second, repeats=200)["loss"]
    assert difference == pytest.approx(second.figures()["loss"] - first.figures()["loss"])
    assert low < difference < high < 0
    alone = scores.intervals(first, repeats=200)["loss"]
    assert high - low < (alone[1] - alone[0]) / 3


def test_always_giving_one_class_is_right_as_often_as_it_occurs():
    true, probabilities = drawn(3)
    baseline = Sample(true, probabilities).majority(2).figures()
    assert baseline["accuracy"] == pytest.approx((true == 2).mean())
    assert baseline["auroc"] == 0.5
