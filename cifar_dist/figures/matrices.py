"""Matrices as shaded, numbered cells: confusions, and values over two settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifar_dist.figures.style import STYLE, figure_with_axes, shortened, text_color

MOST_NUMBERED_CLASSES = 20
MOST_NAMED_CLASSES = 40
_MOST_LETTERS = 40  # of a run's name


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts of true (row) against predicted (column) classes, shaded by the share of the row (its square root, so
    that rare confusions show).

    Up to 20 classes every cell that is not 0 shows its count; up to 40 classes every class is named.

    Args:
        matrix: counts, int (K, K).
        class_names: K names.
    """
    return _confusions(matrix, class_names, np.vectorize(str, otypes=[object])(matrix))


def normalized_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """As `confusion_matrix`, but the cells show what percentage of the true class they are."""
    cells = np.vectorize(lambda share: f"{100 * share:.1f}", otypes=[object])(_shares(matrix))
    return _confusions(
        matrix, class_names, cells, " (numbers in %)" if len(class_names) <= MOST_NUMBERED_CLASSES else ""
    )


def _shares(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _confusions(matrix: np.ndarray, class_names: Sequence[str], cells: np.ndarray, unit: str = "") -> Figure:
    count, shares = len(class_names), _shares(matrix)
    side = float(np.clip(3 + 0.5 * count, 5, 10))
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_with_axes(side + 1, side)
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
        number = "" if count <= MOST_NAMED_CLASSES else " (number)"
        axes.set(xlabel=f"predicted class{number}", ylabel=f"true class{number}")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        figure.colorbar(
            image, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1],
            format=PercentFormatter(xmax=1, decimals=0), label=f"share of the true class{unit}, square-root scale",
        )  # fmt: skip
        if count <= MOST_NAMED_CLASSES:
            _name_axes(axes, class_names, class_names, 10 if count <= MOST_NUMBERED_CLASSES else 7)
        if count <= MOST_NUMBERED_CLASSES:
            longest = max((len(text) for text in cells[matrix != 0]), default=0)
            size = 9 if longest < 4 or count <= 12 else 7
            _write_cells(axes, image.to_rgba(shares), np.where(matrix == 0, "", cells), size)
    return figure


def value_grid(
    values: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    titles: tuple[str, str, str] = ("", "", ""),
) -> Figure:
    """Shares over two settings as a heat map with numbers in percent, such as test accuracy by batch size and epochs.

    Args:
        values: fractions (R, C); NaN leaves a cell empty.
        row_labels: R names.
        column_labels: C names.
        titles: of the rows, of the columns, and of the values.
    """
    rows, columns = values.shape
    long, below = (min(max(map(len, labels), default=0), _MOST_LETTERS) for labels in (row_labels, column_labels))
    width, height = 2 + max(0.75 * columns, 2) + 0.08 * long, 1.2 + max(0.45 * rows, 1.5) + 0.06 * below
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_with_axes(width, height)
        image = axes.imshow(values, cmap="cividis", interpolation="nearest", aspect="auto")
        axes.set(ylabel=titles[0], xlabel=titles[1])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _name_axes(axes, row_labels, column_labels, 10, _MOST_LETTERS)
        cells = np.vectorize(lambda value: "" if np.isnan(value) else f"{value:.2%}", otypes=[object])(values)
        _write_cells(axes, image.to_rgba(values), cells, 9)
        if len(np.unique(values[np.isfinite(values)])) > 1:
            figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1), label=titles[2])
    return figure


def agreement_matrix(names: Sequence[str], matrix: np.ndarray) -> Figure:
    """Which share of the test images two runs give the same class.

    Args:
        names: R runs.
        matrix: fractions (R, R).
    """
    return value_grid(matrix, names, names, ("", "", "same prediction"))


def _name_axes(axes: Axes, rows: Sequence[str], columns: Sequence[str], size: int, most: int = 24) -> None:
    """Names of rows and columns, those of the columns turned where they are long."""
    below = [shortened(name, most) for name in columns]
    turned: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, below), default=0) > 5 else {}
    )
    axes.set_xticks(range(len(below)), below, fontsize=size, **turned)
    axes.set_yticks(range(len(rows)), [shortened(name, most) for name in rows], fontsize=size)


def _write_cells(axes: Axes, colors: np.ndarray, cells: np.ndarray, size: int) -> None:
    """Texts (R, C) in the middle of cells of some colours (R, C, 4), in black or white."""
    for row, column in zip(*np.nonzero(cells != ""), strict=True):
        color = text_color(colors[row, column, :3])
        axes.text(column, row, cells[row, column], ha="center", va="center", color=color, fontsize=size)
