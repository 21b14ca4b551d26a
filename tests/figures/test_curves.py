"""Curves of one run hold the data they were given."""

import numpy as np
import pytest

from cifar_dist import figures
from cifar_dist.figures import Curve, StepAxis
from tests.figures.drawn import assert_nothing_is_cut_off, labels_in

AXIS = StepAxis(steps_per_epoch=10, marked_step=20)
CURVES = [
    Curve("train", [5, 10, 15, 20, 25, 30], [2.0, 1.5, 1.2, 1.0, 0.9, 0.8], figures.TRAIN),
    Curve("val", [10, 20, 30], [1.6, 1.1, 1.0], figures.EVALUATION),
]


@pytest.mark.parametrize(
    "figure",
    [
        figures.loss_curves(CURVES, AXIS),
        figures.accuracy_curves([Curve("val", [10, 20], [0.9, 1.0])], AXIS),
        figures.lr_curve(Curve("schedule", [1, 20], [5e-5, 1e-6]), Curve("log", [20], [1e-6]), AXIS),
    ],
    ids=["loss", "accuracy", "lr"],
)
def test_nothing_is_cut_off(figure):
    assert_nothing_is_cut_off(figure)


def test_curves_share_one_figure_with_steps_epochs_and_the_checkpoint():
    figure = figures.loss_curves(CURVES, AXIS)
    axes = figure.axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    for curve in CURVES:
        np.testing.assert_array_equal(drawn[curve.label].get_xdata(), curve.steps)
        np.testing.assert_array_equal(drawn[curve.label].get_ydata(), curve.values)
    assert drawn["checkpoint (step 20)"].get_xdata() == [20, 20]
    assert {"optimizer step", "epoch", "cross-entropy loss (nats)", "train", "val"} <= labels_in(figure)
    top = axes.child_axes[0]
    assert top.get_xlim() == pytest.approx(np.array(axes.get_xlim()) / 10)
    assert axes.get_ylim()[0] == 0


def test_losses_that_are_all_high_fill_the_picture():
    low, high = figures.loss_curves([Curve("train", [1, 2, 3], [2.3, 2.0, 1.9])], AXIS).axes[0].get_ylim()
    assert 1.8 < low < 1.9 and 2.3 < high < 2.4
    assert figures.loss_curves([Curve("train", [1], [2.3])], AXIS).axes[0].get_ylim()[0] == 0


def test_a_loss_over_decades_is_logarithmic_in_plain_numbers_and_one_with_nan_is_drawn():
    wide = figures.loss_curves([Curve("train", [1, 2, 3], [50.0, 1.0, 0.01])], AXIS)
    assert wide.axes[0].get_yscale() == "log"
    assert {"0.1", "1", "10"} <= labels_in(wide)
    diverged = Curve("train", [1, 2], [2.0, float("nan")])
    assert figures.loss_curves([diverged], AXIS).axes[0].get_yscale() == "linear"


def test_a_run_that_diverged_at_once_or_was_never_evaluated_says_so():
    diverged = Curve("train", [1, 2], [float("nan"), float("inf")])
    assert "no loss that is finite" in labels_in(figures.loss_curves([diverged], AXIS))
    assert "no accuracy" in labels_in(figures.accuracy_curves([], AXIS))


def test_accuracy_is_shown_in_percent():
    figure = figures.accuracy_curves([Curve("val", [1, 2], [0.0, 1.0])], AXIS)
    assert {"0%", "100%"} <= labels_in(figure)
    assert figure.axes[0].get_ylim()[1] < 1.05


@pytest.mark.parametrize("rates", [[1e-3, 1e-3 - 1e-9], [0.5, 0.4], [0.0, 0.0]], ids=["constant", "cut", "none"])
def test_a_learning_rate_has_room_above(rates):
    axes = figures.lr_curve(Curve("schedule", [1, 2], rates), Curve("log", [1], rates[:1]), AXIS).axes[0]
    low, high = axes.get_ylim()
    assert low == 0 and (high - max(rates)) / high > 0.04


def test_a_learning_rate_that_was_logged_against_the_schedule_shows():
    """The line is the schedule at every step; of many logged rates some are drawn, each where it was logged."""
    steps = list(range(1, 1001))
    schedule = Curve("schedule", steps, [1 - step / 1000 for step in steps], figures.TRAIN)
    logged = Curve("log", steps[9::10], [0.7] * 100, figures.EVALUATION)
    axes = figures.lr_curve(schedule, logged, AXIS).axes[0]
    line, dots = (next(one for one in axes.lines if one.get_label() == name) for name in ("schedule", "log"))
    np.testing.assert_array_equal(line.get_data(), (schedule.steps, schedule.values))
    assert dots.get_linestyle() == "None" and dots.get_marker() == "o"
    assert 20 <= len(dots.get_xdata()) <= 50 and set(dots.get_xdata()) <= set(logged.steps)
    assert set(dots.get_ydata()) == {0.7}
    assert {"schedule", "log", "learning rate"} <= labels_in(axes.figure)
