import pytest
from sklearn.metrics import classification_report, precision_recall_fscore_support

from cifar_dist.metrics.classification_report import ClassificationReport

KEYS = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}


def test_agrees_with_scikit_learn(scored, make):
    probabilities, labels = scored
    found = make(ClassificationReport).compute(predictions=probabilities, references=labels)
    expected = classification_report(
        labels, probabilities.argmax(1), labels=range(10), output_dict=True, zero_division=0
    )
    for number in range(10):
        for ours, theirs in KEYS.items():
            assert found["classes"][number][ours] == pytest.approx(expected[str(number)][theirs])
    expected |= classification_report(  # class 9 does not occur
        labels, probabilities.argmax(1), labels=range(9), output_dict=True, zero_division=0
    )
    for mean in ("macro", "weighted"):
        for ours in ("precision", "recall", "f1"):
            assert found[f"{mean}_avg"][ours] == pytest.approx(expected[f"{mean} avg"][KEYS[ours]])


def test_a_hand_made_case(make):
    """True 0: two right, one called 1. True 1: one right. Class 2 is neither there nor predicted."""
    rows = {0: [1.0, 0.0, 0.0], 1: [0.0, 1.0, 0.0]}
    found = make(ClassificationReport).compute(predictions=[rows[p] for p in (0, 0, 1, 1)], references=[0, 0, 0, 1])
    assert found["classes"] == [
        {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3},
        {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]
    assert found["macro_avg"]["precision"] == pytest.approx(0.75)
    assert found["macro_avg"]["recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["weighted_avg"]["precision"] == pytest.approx((3 * 1 + 1 * 0.5) / 4)


def test_macro_means_are_over_the_classes_that_occur(make):
    """As balanced accuracy: class 2 is only predicted, class 3 not even that."""
    labels, predicted = [0, 0, 0, 1, 1, 1], [0, 0, 2, 1, 1, 0]
    rows = [[float(number == guess) for number in range(4)] for guess in predicted]
    found = make(ClassificationReport).compute(predictions=rows, references=labels)["macro_avg"]
    expected = precision_recall_fscore_support(labels, predicted, labels=[0, 1], average="macro")
    assert tuple(found.values()) == pytest.approx(expected[:3])
    assert found["recall"] == pytest.approx(2 / 3)


def test_the_precision_of_a_class_that_is_never_predicted_is_0_in_the_means_too(make):
    found = make(ClassificationReport).compute(predictions=[[1.0, 0.0]] * 4, references=[0, 0, 1, 1])
    assert found["macro_avg"]["precision"] == found["weighted_avg"]["precision"] == 0.25
