"""Pictures hold the data they were given, readable, inside their frame."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from cifar_dist import figures
from cifar_dist.figures import Curve, StepAxis

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
AXIS = StepAxis(steps_per_epoch=10, marked_step=20)
CURVES = [
    Curve("train", [5, 10, 15, 20, 25, 30], [2.0, 1.5, 1.2, 1.0, 0.9, 0.8], figures.TRAIN),
    Curve("val", [10, 20, 30], [1.6, 1.1, 1.0], figures.EVALUATION),
]


def labels_in(figure):
    """Every text of the figure."""
    FigureCanvasAgg(figure).draw()
    return {artist.get_text() for artist in figure.findobj(Text)}


@pytest.mark.parametrize(
    "figure",
    [
        figures.loss_curves(CURVES, AXIS),
        figures.accuracy_curves([Curve("val", [10, 20], [0.9, 1.0])], AXIS),
        figures.lr_curve(Curve("learning rate", [1, 20], [5e-5, 1e-6]), AXIS),
        figures.confusion_matrix(np.eye(10, dtype=int) * 1000, CIFAR10),
        figures.confusion_matrix(np.eye(3, dtype=int), ["a class with a name that is very long indeed"] * 3),
    ],
    ids=["loss", "accuracy", "lr", "confusion", "long names"],
)
def test_nothing_is_cut_off(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    used, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert used.x0 >= 0 and used.y0 >= 0 and used.x1 <= width and used.y1 <= height
    assert used.width > 0.8 * width and used.height > 0.8 * height


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


def test_a_loss_over_decades_is_logarithmic_and_one_with_nan_is_drawn():
    wide = Curve("train", [1, 2, 3], [50.0, 1.0, 0.01])
    assert figures.loss_curves([wide], AXIS).axes[0].get_yscale() == "log"
    diverged = Curve("train", [1, 2], [2.0, float("nan")])
    assert figures.loss_curves([diverged], AXIS).axes[0].get_yscale() == "linear"


def test_accuracy_is_shown_in_percent():
    figure = figures.accuracy_curves([Curve("val", [1, 2], [0.0, 1.0])], AXIS)
    assert {"0%", "100%"} <= labels_in(figure)
    assert figure.axes[0].get_ylim()[1] < 1.05


def test_confusion_matrix_shows_every_count_and_name():
    matrix = np.diag(range(90, 100))
    matrix[3, 5] = 7
    shown = labels_in(figures.confusion_matrix(matrix, CIFAR10))
    assert set(CIFAR10) <= shown
    assert {str(count) for count in range(90, 100)} | {"7"} <= shown
    image = figures.confusion_matrix(matrix, CIFAR10).axes[0].images[0].get_array()
    assert image[3, 5] == pytest.approx(7 / 100) and image[5, 3] == 0


def test_confusion_matrix_of_100_classes_has_no_cell_texts_and_empty_rows_are_fine():
    matrix = np.eye(100, dtype=int) * 77
    matrix[4] = 0
    shown = labels_in(figures.confusion_matrix(matrix, [f"class{i}" for i in range(100)]))
    assert "77" not in shown and "class4" not in shown
    assert "true class (number)" in shown


def test_save_writes_a_png_that_is_not_blank(tmp_path):
    figures.save(figures.loss_curves(CURVES, AXIS), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors  # train and val in the style's own colours
