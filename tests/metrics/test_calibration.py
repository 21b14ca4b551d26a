import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from cifar_dist.metrics.calibration import BINS, Calibration, reliability


def test_error_agrees_with_torchmetrics(scored, make):
    probabilities, labels = scored
    expected = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=10, n_bins=BINS, norm="l1"
    )
    found = make(Calibration).compute(predictions=probabilities, references=labels)
    assert found["ece"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["ece"] > 0.01


def test_brier_score_agrees_with_scikit_learn(scored, make):
    """Which has the binary form: half of ours for two classes, and the sum over one-against-the-rest for several."""
    probabilities, labels = scored
    found = make(Calibration).compute(predictions=probabilities, references=labels)["brier"]
    exact = np.clip(probabilities.astype(np.float64), 0, 1)
    one_by_one = sum(brier_score_loss(labels == k, exact[:, k], pos_label=True) for k in range(10))
    assert found == pytest.approx(one_by_one)
    two = make(Calibration).compute(predictions=[[0.3, 0.7], [0.9, 0.1]], references=[1, 1])["brier"]
    assert two == pytest.approx(2 * brier_score_loss([1, 1], [0.7, 0.1], labels=[0, 1], pos_label=1))


def test_bins_agree_with_scikit_learn(scored):
    probabilities, labels = scored
    confidence = probabilities.max(axis=1).astype(np.float64)
    found = reliability(probabilities, labels, bins=12)
    right, sure = calibration_curve(probabilities.argmax(axis=1) == labels, confidence, n_bins=12)
    filled = found.counts > 0
    np.testing.assert_allclose(found.accuracies[filled], right)
    np.testing.assert_allclose(found.confidences[filled], sure)
    np.testing.assert_array_equal(found.counts, np.histogram(confidence, np.linspace(0, 1, 13))[0])
    assert np.isnan(found.accuracies[~filled]).all()
    assert not filled.all()


def test_an_edge_belongs_to_the_bin_below_and_certainty_to_the_last():
    found = reliability(np.array([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.2, 0.8]]), np.array([0, 1, 0, 1]), bins=4)
    assert found.counts.tolist() == [0, 1, 1, 2]
    assert found.accuracies.tolist() == pytest.approx([np.nan, 0, 1, 1], nan_ok=True)
    assert found.confidences.tolist() == pytest.approx([np.nan, 0.5, 0.75, 0.9], nan_ok=True)


def test_a_hand_made_case(make):
    """All sure by 0.9, one of two right: the gap is 0.4. Squares 0.01 + 0.01 and 0.81 + 0.81, halved."""
    found = make(Calibration).compute(predictions=[[0.9, 0.1], [0.1, 0.9]], references=[0, 0])
    assert found == {"ece": pytest.approx(0.4), "brier": pytest.approx(0.82)}


def test_refuses_logits(make):
    with pytest.raises(ValueError, match="softmax"):
        make(Calibration).compute(predictions=[[3.0, -1.0]], references=[1])
