import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from cifar_dist.metrics.balanced_accuracy import BalancedAccuracy


def test_agrees_with_scikit_learn(scored, make):
    """Class 9 doesn't occur; class 8 occurs and is never right."""
    probabilities, labels = scored
    found = make(BalancedAccuracy).compute(predictions=probabilities, references=labels)
    predicted = probabilities.argmax(axis=1)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] != pytest.approx((predicted == labels).mean())


def test_a_class_that_is_predicted_and_does_not_occur_counts_nothing(make):
    """Recall 2/3 of class 0 and 1 of class 2."""
    rows = np.eye(3)[[0, 0, 1, 2]]
    found = make(BalancedAccuracy).compute(predictions=rows, references=[0, 0, 0, 2])
    assert found == {"balanced_accuracy": pytest.approx(5 / 6)}
