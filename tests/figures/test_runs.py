"""Pictures of several runs tell them apart and hold what each of them logged."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from cifar_dist import figures
from cifar_dist.figures import RunCurves
from cifar_dist.figures.style import setting_styles
from tests.figures.drawn import LONG, assert_no_texts_overlap, assert_nothing_is_cut_off, labels_in

NAMES = [f"run number {number} of the study" for number in range(12)]


def run(label, shift=0.0):
    epochs = [1, 2, 3]
    losses, accuracies = [2.0 + shift, 1.0 + shift, 0.5 + shift], [0.4 + shift, 0.6 + shift, 0.7 + shift]
    return RunCurves(
        label, ([0.5, 1, 2, 3], [2.5, *losses]), (epochs, losses), ([1, 3], [0.3, 0.65]), (epochs, accuracies)
    )


def lines_of(axes, style):
    return [line for line in axes.lines if line.get_linestyle() == style]


def against(x, labels):
    accuracies = np.linspace(0.9, 0.95, len(x))
    return figures.accuracy_against(x, labels, accuracies, np.c_[accuracies - 0.01, accuracies + 0.02], "GFLOPs")


@pytest.mark.parametrize(
    "figure",
    [
        figures.run_curves([run("cnn4")]),
        figures.run_curves([run(name, 0.01 * number) for number, name in enumerate(NAMES)]),
        figures.run_curves([run(f"{LONG} {LONG} {number}") for number in range(12)]),
        against([1.0], ["cnn4"]),
        against(np.geomspace(1, 500, 12), NAMES),
        against(np.geomspace(1, 5, 12), [f"{LONG} {LONG} {number}" for number in range(12)]),
    ],
    ids=["one", "twelve", "twelve long", "one point", "twelve points", "twelve long points"],
)
def test_nothing_is_cut_off_or_covered(figure):
    assert_nothing_is_cut_off(figure)
    assert_no_texts_overlap(figure)


def test_twelve_settings_look_different_and_alike_in_every_figure():
    styles = setting_styles(NAMES)
    assert len(set(styles.values())) == 12
    curves = figures.run_curves([run(name) for name in NAMES])
    points = against(range(1, 13), NAMES)
    drawn = [(line.get_color(), line.get_marker()) for line in lines_of(curves.axes[0], "-")]
    marked = [(container[0].get_color(), container[0].get_marker()) for container in points.axes[0].containers]
    assert drawn == marked == list(styles.values())


def test_run_curves_hold_loss_left_and_accuracy_right_val_solid_and_train_dashed():
    runs = [run("ViT"), run("Swin", 0.1)]
    figure = figures.run_curves(runs, "test")
    loss, accuracy = figure.axes
    for axes, name in ((loss, "loss"), (accuracy, "top1")):
        for style, split in (("-", "val"), ("--", "train")):
            for line, one in zip(lines_of(axes, style), runs, strict=True):
                np.testing.assert_array_equal(line.get_data(), getattr(one, f"{split}_{name}"))
    assert {"ViT", "Swin", "test", "train", "epoch", "cross-entropy loss (nats)"} <= labels_in(figure)
    (legend,) = figure.legends
    assert [key.get_linestyle() for key in legend.get_lines()[2:]] == ["-", "--"]


def test_more_than_six_runs_show_no_train_and_do_not_claim_to():
    figure = figures.run_curves([run(name) for name in NAMES[:7]])
    assert "train" not in labels_in(figure)
    drawn = [line for axes in figure.axes for line in lines_of(axes, "--") if len(line.get_xdata())]
    assert not drawn and len(lines_of(figure.axes[0], "-")) == 7


def test_repeated_seeds_share_a_color_and_one_entry_that_counts_them():
    figure = figures.run_curves([run("ViT"), run("Swin"), run("ViT", 0.1), run("ViT", 0.2)])
    colors = [to_hex(line.get_color()) for line in lines_of(figure.axes[0], "-")]
    assert colors[0] == colors[2] == colors[3] != colors[1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ViT (3 seeds)", "Swin", "val", "train"]


def test_runs_that_logged_nothing_or_diverged_do_not_stop_the_picture():
    diverged = RunCurves("diverged", ([1, 2], [2.0, float("nan")]))
    figure = figures.run_curves([diverged, RunCurves("nothing")])
    assert {"diverged", "nothing", "no accuracy"} <= labels_in(figure)
    assert "no loss that is finite" in labels_in(figures.run_curves([]))


def test_points_stand_at_cost_and_accuracy_with_their_interval():
    intervals = np.array([[0.985, 0.9895], [0.987, 0.991]])
    figure = figures.accuracy_against([8.3, 30.8], ["ViT", "Swin"], [0.9878, 0.9893], intervals, "latency (ms)")
    axes = figure.axes[0]
    for container, x, y, (low, high) in zip(axes.containers, [8.3, 30.8], [0.9878, 0.9893], intervals, strict=True):
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_data(), [[x], [y]])
        np.testing.assert_allclose(bars.get_segments()[0], [[x, low], [x, high]])
    assert axes.get_xscale() == "linear"
    assert {"ViT", "Swin", "latency (ms)", "top-1 accuracy on test"} <= labels_in(figure)


def test_costs_over_more_than_a_factor_of_ten_are_logarithmic_and_a_zero_is_not():
    wide = against([1.0, 20.0], ["a", "b"])
    assert wide.axes[0].get_xscale() == "log" and {"1", "2", "5", "10", "20"} <= labels_in(wide)
    assert against([0.0, 20.0], ["a", "b"]).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("costs", [[26.3, 26.4], [0.5, 0.5], [1.0, 1.01, 50.0]], ids=["near", "same", "logarithmic"])
def test_costs_that_are_nearly_equal_look_so_and_intervals_are_seen(costs):
    """Two points a hundredth apart are at most a twentieth of the picture apart."""
    axes = against(costs, [f"run {number}" for number in range(len(costs))]).axes[0]
    places = axes.transLimits.transform(axes.transScale.transform([(cost, 0.92) for cost in costs]))[:, 0]
    assert places[1] - places[0] < 0.05 and places.min() > 0.02 and places.max() < 0.98
    low, high = axes.get_ylim()
    assert low < 0.89 and high > 0.97


@pytest.mark.parametrize("others", [[], [9.0], [3.04, 3.05, 9.0], [900.0]], ids=["alone", "linear", "near", "log"])
def test_intervals_of_one_cost_stand_side_by_side(others):
    """Five of one cost, in two settings, are a little apart about it; the others stay where they are."""
    axes = against([*[3.0] * 5, *others], [*"aabbb", *"c" * len(others)]).axes[0]
    drawn = np.concatenate([container.lines[0].get_xdata() for container in axes.containers])
    places = axes.transLimits.transform(axes.transScale.transform([(cost, 0.92) for cost in (*drawn, 3.0)]))[:, 0]
    assert (np.diff(np.sort(places[:5])) > 0.005).all() and abs(places[:5] - places[-1]).max() < 0.0151
    assert places[:5].mean() == pytest.approx(places[-1])
    assert drawn[5:].tolist() == others
    bars = np.concatenate([container.lines[2][0].get_segments() for container in axes.containers])
    np.testing.assert_allclose(bars[:, 0, 0], drawn)


@pytest.mark.parametrize(("count", "other"), [(6, 9.0), (10, 9.0), (10, 300.0), (80, 2.0)])
def test_many_intervals_of_one_cost_stay_close_to_it(count, other):
    axes = against([1.0] * count + [other], ["a"] * count + ["b"]).axes[0]
    drawn = np.concatenate([container.lines[0].get_xdata() for container in axes.containers])
    places = axes.transLimits.transform(axes.transScale.transform([(cost, 0.92) for cost in (*drawn[:-1], 1.0)]))[:, 0]
    assert abs(places - places[-1]).max() < 0.0151 and places.min() > -0.001
    assert len(set(drawn)) == count + 1 and drawn[-1] == other


def test_many_costs_in_a_row_are_where_they_are():
    """Each less than a hundredth of the axis from the next."""
    costs = 1 + 0.003 * np.arange(12)
    axes = against(costs, NAMES).axes[0]
    assert [float(container.lines[0].get_xdata()[0]) for container in axes.containers] == costs.tolist()


def test_equal_accuracies_of_huge_test_sets_are_not_torn_apart_and_none_is_above_100_percent():
    figure = figures.accuracy_against([1, 2], ["a", "b"], [0.9001, 0.9], np.full((2, 2), 0.9), "GFLOPs")
    low, high = figure.axes[0].get_ylim()
    assert high - low > 0.01
    top = figures.accuracy_against([1], ["a"], [1.0], np.array([[0.99, 1.0]]), "GFLOPs").axes[0].get_ylim()[1]
    assert 1 < top < 1.01


def test_a_cost_that_was_not_measured_is_said_and_seeds_share_an_entry():
    figure = against([1.0, 2.0, float("nan"), float("nan"), 3.0], ["a", "a", "b", "c", "c"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b (not measured)", "c"]
    assert len(labels_in(against([float("nan")], ["a"]))) > 0


def test_short_runs_are_seen_beside_long_ones():
    def axes_of(*lengths):
        def points(last):
            return (range(1, last + 1), np.linspace(2.0, 0.5, last))

        runs = [RunCurves(f"{last} epochs", ((), ()), points(last), ((), ()), points(last)) for last in lengths]
        figure = figures.run_curves(runs)
        assert_nothing_is_cut_off(figure)
        return figure.axes[0]

    assert axes_of(10, 200).get_xscale() == "log" and axes_of(10, 40).get_xscale() == "linear"
