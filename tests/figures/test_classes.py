"""Bars are as long as the numbers they stand for, in the order that is said."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

from cifar_dist import figures
from tests.figures.drawn import CIFAR10, LONG, assert_no_texts_overlap, assert_nothing_is_cut_off, labels_in, texts_of

HUNDRED = [f"class {number}" for number in range(100)]


def bars_of(axes):
    """Length of every bar by the name beside it, in the order drawn."""
    names = [label.get_text() for label in axes.get_yticklabels()]
    lengths = [bar.get_width() for bar in axes.patches]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    np.testing.assert_allclose(middles, axes.get_yticks())
    return dict(zip(names, lengths, strict=True))


@pytest.mark.parametrize(
    "figure",
    [
        figures.class_bars(CIFAR10, np.linspace(0, 1, 10), 0.5),
        figures.class_bars([LONG] * 20, np.ones(20), 1.0),
        figures.class_bars([LONG] * 100, np.linspace(0, 1, 100), 0.5),
        figures.class_bars(["only"], [0.3], 0.3),
        figures.top_confusions([("dog", "cat", 63), ("cat", "dog", 34)]),
        figures.top_confusions([(LONG, LONG, 12345)]),
    ],
    ids=["ten", "twenty long", "hundred long", "one", "confusions", "long confusion"],
)
def test_nothing_is_cut_off_or_covered(figure):
    assert_nothing_is_cut_off(figure)
    assert_no_texts_overlap(figure)


def test_class_bars_hold_every_accuracy_the_lowest_first_with_values_and_the_mean():
    accuracies = np.array([0.97, 0.98, 0.93, 0.81, 0.95, 0.86, 0.96, 0.955, 0.99, 1.0])
    figure = figures.class_bars(CIFAR10, accuracies, 0.9405)
    (axes,) = figure.axes
    assert bars_of(axes) == pytest.approx(dict(zip(CIFAR10, accuracies, strict=True)))
    assert list(bars_of(axes))[:2] == ["cat", "dog"] and axes.yaxis_inverted()
    assert [texts_of(axes)[1.02, row] for row in (0, 1, 9)] == ["81.0%", "86.0%", "100.0%"]
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0.9405, 0.9405] and line.get_linestyle() == "--"
    assert axes.get_xlim() == (0, 1)
    assert "mean 94.05%" in labels_in(figure)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_mean_is_whole_at_the_edges(mean):
    """Its line is two to three pixels wide in its colour, of which the axes' edge would cut one half."""
    figure = figures.class_bars(CIFAR10, np.full(10, mean), mean)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, pixels = figure.axes[0], np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    place, (low, high) = axes.transData.transform((mean, 0))[0], axes.get_window_extent().intervaly
    columns = pixels[len(pixels) - int(high) : len(pixels) - int(low), int(place) - 3 : int(place) + 4]
    coloured = (np.abs(columns - 255 * np.array(to_rgb(figures.EVALUATION))).sum(axis=2) < 60).any(axis=0)
    assert coloured.sum() >= 3


def test_class_bars_of_100_classes_name_all_of_them_in_columns():
    accuracies = np.random.default_rng(0).permutation(np.linspace(0.3, 0.9, 100))
    figure = figures.class_bars(HUNDRED, accuracies, 0.6)
    drawn = {name: length for axes in figure.axes for name, length in bars_of(axes).items()}
    assert drawn == pytest.approx(dict(zip(HUNDRED, accuracies, strict=True)))
    assert list(drawn.values()) == sorted(drawn.values())


def test_class_bars_of_more_classes_say_that_only_the_lowest_are_there():
    names = [f"class {number}" for number in range(1000)]
    figure = figures.class_bars(names, np.linspace(1, 0, 1000), 0.5)
    assert [name for axes in figure.axes for name in bars_of(axes)] == names[:-101:-1]
    assert "accuracy of a class, lowest 100 of 1,000 classes" in labels_in(figure)


@pytest.mark.parametrize("count", [3, 60])
def test_a_class_without_images_comes_last_and_says_so(count):
    accuracies = np.linspace(0.5, 1, count)
    accuracies[0] = np.nan
    figure = figures.class_bars(HUNDRED[:count], accuracies, 0.75)
    assert list(bars_of(figure.axes[-1]))[-1] == "class 0"
    assert list(texts_of(figure.axes[-1]).values())[-1] == "no images"


def test_top_confusions_are_the_ten_most_frequent_in_order():
    pairs = [("ship", "truck", count) for count in range(12)] + [("dog", "cat", 63), ("cat", "dog", 34)]
    figure = figures.top_confusions(pairs)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [63, 34, 11, 10, 9, 8, 7, 6, 5, 4]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["dog → cat", "cat → dog", "ship → truck"]
    assert axes.yaxis_inverted() and {"63", "34"} <= labels_in(figure)
    assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {figures.TRAIN.lower()}
