import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torchmetrics import MeanMetric

from project.errors import UserError
from project.evaluation.scores import ScoredPredictions
from project.metrics import Mean, metrics


def part(name, **options):
    return {"class_path": f"torchmetrics.{name}", "init_args": options}


def measured(probabilities, label, names, positive=None, more=()):
    collection = metrics(names, positive, more).clone("val/")
    for part in np.array_split(np.arange(len(label)), 3):  # in batches, one of which may be empty
        if len(part):
            collection.update(torch.tensor(probabilities[part]).float(), torch.tensor(label[part]))
    return {key.removeprefix("val/"): float(value) for key, value in collection.compute().items()}


def drawn(seed, present, k, n=200):
    random = np.random.default_rng(seed)
    label = random.choice(present, n)
    logits = random.normal(size=(n, k)).astype(np.float32)
    logits[np.arange(n), label] += 1
    logits[:, [c for c in range(k) if c not in present]] -= 20 * (seed % 2)  # never guessed, every other time
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)), label


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("names", "present", "positive"),
    [
        *((["a", "b", "c", "d"], present, None) for present in ([0, 1, 2, 3], [0, 2, 3], [1, 2], [3])),
        *((["no", "yes"], [0, 1], positive) for positive in ("no", "yes", None)),
        (["no", "yes"], [1], None),
    ],
)
def test_figures_are_scikit_learns_of_the_classes_with_images_or_of_the_positive_one_of_two(
    seed, names, present, positive
):
    probabilities, label = drawn(seed, present, k=len(names))
    guess, classes = probabilities.argmax(1), present
    average = {"average": "macro", "zero_division": 0, "labels": present}  # not those that are only predicted
    if len(names) == 2:  # the second is positive by default
        classes = [names.index(positive or "yes")]
        average = {"pos_label": classes[0]}
    areas = [reference.roc_auc_score(label == c, probabilities[:, c]) for c in classes if (label != c).any()]
    theirs = {
        "accuracy": reference.accuracy_score(label, guess),
        "precision": reference.precision_score(label, guess, **average),
        "recall": reference.recall_score(label, guess, **average),
        "f1": reference.f1_score(label, guess, **average),
        "auroc": np.mean(areas) if areas else np.nan,
    }
    found = measured(probabilities, label, names, positive)
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, abs=1e-6, nan_ok=True)


def test_without_an_image_of_the_positive_class_nothing_but_the_accuracy_is_measured():
    probabilities, label = drawn(0, [0], k=2)
    probabilities[:3] = 0.5  # is not above one half
    scored = ScoredPredictions(label, probabilities.astype(float), positive=1).scores()
    for figures in (measured(probabilities, label, ["no", "yes"]), scored):
        assert figures["accuracy"] > 0.5
        assert np.isnan([figures[name] for name in ("precision", "recall", "f1", "auroc")]).all()
    assert measured(probabilities[:3], label[:3], ["no", "yes"])["accuracy"] == 1


def test_further_metrics_have_their_class_name_and_keep_apart_from_those_that_begin_alike():
    probabilities, label = drawn(0, [0, 1, 2], k=3)
    first = label[: len(label) // 3 + 1]
    label[: len(first)] = np.where(first == 2, 0, first)  # the first batch has no image of the class 2
    guess, kept = probabilities.argmax(1), label != 2
    score = "classification.MulticlassAccuracy"
    more = [
        part("CohenKappa", task="multiclass", weights="quadratic"),
        "torchmetrics.classification.MulticlassMatthewsCorrCoef",
        part(score, average="micro"),
        part(score, average="micro", ignore_index=2),
    ]
    found = measured(probabilities, label, "abc", more=more)
    theirs = {
        "cohen_kappa": reference.cohen_kappa_score(label, guess, weights="quadratic"),
        "multiclass_matthews_corr_coef": reference.matthews_corrcoef(label, guess),
        "multiclass_accuracy": found["accuracy"],
        "multiclass_accuracy_2": reference.accuracy_score(label[kept], guess[kept]),
    }
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert found["multiclass_accuracy_2"] != pytest.approx(found["accuracy"])
    assert list(metrics("ab", None, [part("AUROC", task="multiclass")])) == [*sorted([*metrics("ab"), "auroc_2"])]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (part("CohenKappa", task="binary"), r"does not take probabilities \(B, 2\).* task multiclass does: "),
        ("torchmetrics.classification.BinaryF1Score", "as one of the task multiclass does"),
        (part("F1Score", task="multiclass", average=None), r"makes \(2,\) of a split; a metric is one number"),
        ("torchmetrics.classification.MulticlassROC", "makes tuple of a split"),
        ("torchmetrics.CohenKapa", r"no such class.* Did you mean CohenKappa\?"),
        ("torch.nn.ReLU", "ReLU does not take probabilities"),
    ],
)
def test_metric_that_is_no_number_of_probabilities_and_labels_is_refused(entry, words):
    with pytest.raises(UserError, match=rf"--model\.metrics torch.*{words}"):
        metrics(["no", "yes"], None, [entry])


def test_positive_class_must_be_one_of_two():
    with pytest.raises(UserError, match=r"maybe.*no, yes"):
        metrics(["no", "yes"], "maybe")
    with pytest.raises(UserError, match=r"the data has c0, .*, c9 and 990 more\.$"):
        metrics([f"c{index}" for index in range(1000)], "c0")


def test_the_articles_precision_and_recall_broadcast_to_a_square():
    """Its prediction is (B, 1) and its target (B,): `&` makes (B, B), and a perfect classifier gets about a half."""
    target = torch.randint(0, 2, (1000,), generator=torch.Generator().manual_seed(0))
    pred = target.unsqueeze(1)  # right every time
    true_positives, false_positives = (((pred == 1) & (target == kind)).sum() for kind in (1, 0))
    assert float(true_positives / (true_positives + false_positives)) == pytest.approx(0.5, abs=0.05)
    right = np.eye(2, dtype=np.float32)[target.numpy()]
    assert measured(right, target.numpy(), ["no", "yes"])["precision"] == 1.0


def test_the_articles_auc_ranks_one_raw_logit():
    """It ranks the logit of the positive class, though the decision is about its distance from the other one."""
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 500)
    level = random.normal(0, 5, 500)  # added to both logits: changes no probability
    logits = np.stack([level, level + np.where(label == 1, 2.0, -2.0)], axis=1).astype(np.float32)
    probabilities = torch.tensor(logits).softmax(1).numpy()
    assert reference.roc_auc_score(label, logits[:, 1]) < 0.8
    assert measured(probabilities, label, ["no", "yes"])["auroc"] == 1.0


def test_mean_weighs_its_values_and_propagates_nan():
    mean, theirs = Mean(), MeanMetric()
    for value, count in ((1.0, 64), (3.0, 10)):
        mean.update(torch.tensor(value * count), count)
        theirs.update(torch.tensor(value), weight=count)
    assert mean.compute() == theirs.compute() == pytest.approx((64 + 30) / 74)
    mean.update(torch.tensor(torch.nan), 1)
    assert mean.compute().isnan()
