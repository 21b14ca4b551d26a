"""Temperatures against PyTorch and a known truth; label errors that were planted."""

import numpy as np
import pytest
import torch

from cifar_dist.statistics import calibration
from cifar_dist.statistics.label_errors import can_tell, label_issues, mean_probability


def drawn(temperature, count=20_000, classes=10, seed=0):
    """Logits that are too sure by a known temperature: labels are drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(seed)
    true = random.normal(0, 2, (count, classes))
    labels = (true + random.gumbel(size=true.shape)).argmax(axis=1)
    return temperature * true, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature):
    assert calibration.fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_has_a_lower_cross_entropy_in_torch():
    logits, labels = drawn(1.7, count=500)
    found = calibration.fit_temperature(logits.astype(np.float32), labels)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(torch.tensor(logits) / temperature, torch.tensor(labels)).item()

    grid = np.geomspace(calibration.LOWEST_TEMPERATURE, calibration.HIGHEST_TEMPERATURE, 2000)
    assert loss(found) <= min(map(loss, grid))


def test_adding_to_a_row_changes_nothing():
    logits, labels = drawn(1.7, count=500)
    shifted = logits + np.arange(500)[:, None]
    assert calibration.fit_temperature(shifted, labels) == pytest.approx(calibration.fit_temperature(logits, labels))


def test_the_ends():
    """All right: the surer the better, also where the loss has long been 0. Never right: the less sure the better."""
    for margin in (0.01, 3.0, 1e4):
        right = margin * np.eye(5)
        assert calibration.fit_temperature(right, np.arange(5)) == calibration.LOWEST_TEMPERATURE
        assert calibration.fit_temperature(right, (np.arange(5) + 1) % 5) == calibration.HIGHEST_TEMPERATURE


def test_apply_is_log_softmax():
    logits, _ = drawn(1.0, count=50)
    found = calibration.apply(logits, 1.6)
    np.testing.assert_allclose(found, torch.tensor(logits / 1.6).log_softmax(1).numpy(), atol=1e-12)
    assert np.isfinite(calibration.apply(np.array([[1e5, 0.0]]), 0.01)).all()


def test_label_issues_by_hand():
    """Thresholds: class 0 (0.9 + 0.6 + 0.2) / 3 = 0.567, class 1 (0.8 + 0.3) / 2 = 0.55, class 2 has no images."""
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.6, 0.4, 0.0],
            [0.2, 0.7, 0.1],  # 1 is above its threshold: suspected, margin -0.5
            [0.2, 0.8, 0.0],
            [0.57, 0.3, 0.13],  # 0 is above its threshold: suspected, margin -0.27
        ]
    )
    assert label_issues(probabilities, np.array([0, 0, 0, 1, 1])).tolist() == [2, 4]
    assert label_issues(probabilities[:, :2], np.array([0, 0, 0, 1, 1])).tolist() == [2, 4]


def test_a_class_the_model_is_never_sure_of_is_held_to_its_own_threshold():
    """Of image 2 class 1 is the most probable and not suspicious: images of class 1 have 0.9. Class 0's have 0.4."""
    probabilities = np.array([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25], [0.4, 0.5, 0.1], [0.05, 0.9, 0.05]])
    assert label_issues(probabilities, np.array([0, 0, 0, 1])).tolist() == []
    assert label_issues(probabilities, np.array([0, 0, 2, 1])).tolist() == [2]  # class 0 is confident, though second


def test_a_label_that_is_likeliest_yet_below_its_threshold_ranks_by_the_next_class():
    """Thresholds 0.767 and 0.25: images 1 and 2 are suspected with margins 0.4 and 0.2."""
    probabilities = np.array([[1.0, 0.0], [0.7, 0.3], [0.6, 0.4], [0.75, 0.25], [0.75, 0.25]])
    assert label_issues(probabilities, np.array([0, 0, 0, 1, 1])).tolist() == [2, 1]


def test_planted_label_errors_are_found():
    random = np.random.default_rng(3)
    truth = random.integers(0, 10, 5000)
    logits = random.normal(0, 1, (5000, 10))
    logits[np.arange(5000), truth] += 5
    probabilities = np.exp(calibration.apply(logits, 1.0))
    flipped = random.random(5000) < 0.05
    labels = np.where(flipped, (truth + random.integers(1, 10, 5000)) % 10, truth)
    found = label_issues(probabilities, labels)
    assert flipped[found].mean() > 0.95
    assert flipped[found].sum() > 0.65 * flipped.sum()
    assert flipped[found[:100]].mean() > 0.98
    rest = probabilities.copy()
    rest[np.arange(5000), labels] = 0
    margins = (probabilities[np.arange(5000), labels] - rest.max(axis=1))[found]
    assert (np.diff(margins) >= 0).all()


@pytest.mark.parametrize(
    ("suspected", "trust", "told"), [(0, 0.9, True), (1000, 0.51, True), (1001, 0.9, False), (5, 0.49, False)]
)
def test_what_suspects_more_than_a_tenth_or_doubts_most_labels_cannot_tell(suspected, trust, told):
    assert can_tell(suspected, 10_000, trust) == told


def test_the_mean_probability_of_labels_by_hand():
    assert mean_probability(np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([0, 0])) == pytest.approx(0.6)
