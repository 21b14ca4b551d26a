"""A reliability diagram shows each bin's accuracy, its gap and its share of the predictions."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from cifar_dist import figures
from cifar_dist.figures import Reliability
from tests.figures.drawn import assert_no_texts_overlap, assert_nothing_is_cut_off, labels_in

BINS = Reliability(
    "as trained", np.array([np.nan, 0.4, 0.7, 0.9]), np.array([np.nan, 0.5, 0.6, 0.6]), np.array([0, 10, 30, 60]), 0.22
)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_cut_off_or_covered(count):
    figure = figures.reliability_diagram([BINS, BINS][:count])
    assert_nothing_is_cut_off(figure)
    assert_no_texts_overlap(figure)


def test_bars_are_accuracies_gaps_reach_to_confidence_and_empty_bins_have_none():
    above, below = figures.reliability_diagram([BINS]).axes
    bars, gaps = above.containers
    assert [bar.get_height() for bar in bars] == pytest.approx([0.5, 0.6, 0.6])
    assert [bar.get_x() for bar in bars] == pytest.approx([0.25, 0.5, 0.75])
    assert [gap.get_y() for gap in gaps] == pytest.approx([0.5, 0.6, 0.6])
    assert [gap.get_y() + gap.get_height() for gap in gaps] == pytest.approx([0.4, 0.7, 0.9])
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0, 0.1, 0.3, 0.6])
    (diagonal,) = above.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]


def test_bins_lie_where_scikit_learn_has_them():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 2000)
    right = rng.uniform(0, 1, 2000) < confidence**2
    accuracy, mean = calibration_curve(right, confidence, n_bins=8)
    count = np.histogram(confidence, bins=8, range=(0, 1))[0]
    above, _ = figures.reliability_diagram([Reliability("test", mean, accuracy, count, 0.1)]).axes
    for bar, inside, height in zip(above.containers[0], mean, accuracy, strict=True):
        assert bar.get_x() <= inside <= bar.get_x() + bar.get_width()
        assert bar.get_height() == pytest.approx(height)


def test_before_and_after_stand_side_by_side_with_their_errors():
    after = Reliability("temperature 1.73", BINS.confidence, BINS.confidence, BINS.count, 0.0)
    figure = figures.reliability_diagram([BINS, after])
    assert {"as trained: ECE 22.00%", "temperature 1.73: ECE 0.00%"} <= labels_in(figure)
    assert [gap.get_height() for gap in figure.axes[1].containers[1]] == pytest.approx([0, 0, 0])


def test_no_predictions_at_all_are_an_empty_diagram():
    nothing = Reliability("none", np.full(5, np.nan), np.full(5, np.nan), np.zeros(5, int), 0.0)
    above, below = figures.reliability_diagram([nothing]).axes
    assert not above.patches and [bar.get_height() for bar in below.patches] == [0] * 5
