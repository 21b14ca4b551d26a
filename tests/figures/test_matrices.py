"""Matrices show their numbers, and shade them truly."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as counted

from cifar_dist import figures
from tests.figures.drawn import CIFAR10, LONG, assert_no_texts_overlap, assert_nothing_is_cut_off, labels_in, texts_of

GRID = np.array([[0.8138, 0.81, 0.681], [0.8591, np.nan, 0.8794], [0.8769, 0.5211, 0.9069]])


@pytest.mark.parametrize(
    "figure",
    [
        figures.confusion_matrix(np.eye(10, dtype=int) * 1000, CIFAR10),
        figures.confusion_matrix(np.full((10, 10), 12345), CIFAR10),
        figures.normalized_confusion_matrix(np.full((20, 20), 1000) + np.eye(20, dtype=int), [*CIFAR10, *CIFAR10]),
        figures.confusion_matrix(np.eye(3, dtype=int), [LONG] * 3),
        figures.confusion_matrix(np.array([[5]]), ["only"]),
        figures.value_grid(GRID, ["20", "50", "100"], ["64", "128", "256"], ("epochs", "batch size", "test accuracy")),
        figures.agreement_matrix([LONG, "Swin"], np.array([[1, 0.9], [0.9, 1]])),
        figures.agreement_matrix([f"run {number} of the study" for number in range(12)], np.eye(12)),
    ],
    ids=["ten", "full", "twenty", "long names", "one", "grid", "two runs", "twelve runs"],
)
def test_nothing_is_cut_off(figure):
    assert_nothing_is_cut_off(figure)


def test_numbers_of_full_matrices_do_not_run_into_each_other():
    assert_no_texts_overlap(figures.normalized_confusion_matrix(np.full((20, 20), 1000), [str(k) for k in range(20)]))
    assert_no_texts_overlap(figures.agreement_matrix([str(run) for run in range(12)], np.ones((12, 12))))


def test_confusion_matrix_shows_every_count_and_name():
    matrix = np.diag(range(90, 100))
    matrix[3, 5] = 7
    figure = figures.confusion_matrix(matrix, CIFAR10)
    assert set(CIFAR10) <= labels_in(figure)
    expected = {(k, k): str(90 + k) for k in range(10)} | {(5, 3): "7"}  # (column, row)
    assert texts_of(figure.axes[0]) == expected
    image = figure.axes[0].images[0].get_array()
    assert image[3, 5] == pytest.approx(7 / 100) and image[5, 3] == 0


def test_normalized_confusion_matrix_shows_percent_of_the_true_class():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    figure = figures.normalized_confusion_matrix(counted(true, predicted), list("abcd"))
    shares = counted(true, predicted, normalize="true")
    expected = {(column, row): f"{100 * shares[row, column]:.1f}" for row in range(4) for column in range(4)}
    assert texts_of(figure.axes[0]) == expected
    assert "share of the true class (numbers in %), square-root scale" in labels_in(figure)


@pytest.mark.parametrize("draw", [figures.confusion_matrix, figures.normalized_confusion_matrix])
def test_confusion_matrix_of_100_classes_has_no_cell_texts_and_empty_rows_are_fine(draw):
    matrix = np.eye(100, dtype=int) * 77
    matrix[4] = 0
    figure = draw(matrix, [f"class{i}" for i in range(100)])
    assert not texts_of(figure.axes[0])
    shown = labels_in(figure)
    assert "class4" not in shown and "share of the true class, square-root scale" in shown
    assert "true class (number)" in shown


def test_value_grid_shows_percent_in_place_and_leaves_unknown_cells_empty():
    titles = ("epochs", "batch size", "test accuracy")
    figure = figures.value_grid(GRID, ["20", "50", "100"], ["64", "128", "256"], titles)
    texts = texts_of(figure.axes[0])
    assert texts[2, 0] == "68.10%" and texts[0, 2] == "87.69%" and (1, 1) not in texts and len(texts) == 8
    assert {"20", "50", "100", "64", "128", "256", *titles} <= labels_in(figure)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array().filled(np.nan), GRID)


def test_value_grid_of_nothing_or_one_value_has_no_color_bar():
    assert not texts_of(figures.value_grid(np.full((2, 3), np.nan), ["1", "2"], ["a", "b", "c"]).axes[0])
    figure = figures.value_grid(np.array([[0.9]]), ["20"], ["64"])
    assert texts_of(figure.axes[0]) == {(0, 0): "90.00%"} and len(figure.axes) == 1


def test_names_of_runs_that_differ_in_the_middle_stay_different():
    names = [f"resnet18_cifar lr {number} of the study" for number in range(12)]
    assert set(names) <= labels_in(figures.agreement_matrix(names, np.eye(12)))
