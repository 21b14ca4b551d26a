"""Pictures of a report: data in, figure out, in one colour-blind safe style (Okabe and Ito's palette).

Figures are made through matplotlib's objects, not pyplot, so nothing is shared between them and no
display is needed. `save` writes one; the file's ending chooses the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

TRAIN, EVALUATION, OTHER = "#0072B2", "#D55E00", "#000000"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}
MOST_NUMBERED_CLASSES = 20
MOST_NAMED_CLASSES = 40


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: its name in the legend.
        steps: optimizer steps, ascending.
        values: a value per step.
        color: a colour of the style.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str = OTHER


@dataclass(frozen=True)
class StepAxis:
    """What the horizontal axis of every curve shows.

    Attributes:
        steps_per_epoch: optimizer steps an epoch, for the axis of epochs at the top.
        marked_step: the step of the evaluated checkpoint, or None.
    """

    steps_per_epoch: int
    marked_step: int | None = None


def loss_curves(curves: Sequence[Curve], axis: StepAxis) -> Figure:
    """Loss in nats against steps; starts at 0 unless the curves span more than two decades."""
    values = np.concatenate([np.asarray(curve.values, dtype=float) for curve in curves])
    figure, axes = _step_figure(curves, axis, "cross-entropy loss (nats)")
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) == len(values) and positive.max() > 100 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05 * values[np.isfinite(values)].max())
    return figure


def accuracy_curves(curves: Sequence[Curve], axis: StepAxis) -> Figure:
    """Top-1 accuracy (fractions in, percent shown) against steps."""
    figure, axes = _step_figure(curves, axis, "top-1 accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    low, high = axes.get_ylim()
    axes.set_ylim(top=min(high, 1 + 0.02 * (1 - low)))
    return figure


def lr_curve(curve: Curve, axis: StepAxis) -> Figure:
    """Learning rate against steps."""
    figure, axes = _step_figure([curve], axis, "learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    return figure


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts of true (row) against predicted (column) classes, shaded by the share of the row (its square root, so
    that rare confusions show).

    Up to 20 classes every cell that is not 0 shows its count; up to 40 classes every class is named.

    Args:
        matrix: counts, int (K, K).
        class_names: K names.
    """
    count = len(class_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(3 + 0.5 * count, 5, 10))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
        number = "" if count <= MOST_NAMED_CLASSES else " (number)"
        axes.set(xlabel=f"predicted class{number}", ylabel=f"true class{number}")
        axes.spines[:].set_visible(False)
        figure.colorbar(
            image, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1],
            format=PercentFormatter(xmax=1, decimals=0), label="share of the true class",
        )  # fmt: skip
        if count <= MOST_NAMED_CLASSES:
            small = 10 if count <= MOST_NUMBERED_CLASSES else 7
            names = [_shortened(name) for name in class_names]
            turned: dict[str, Any] = (
                {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {}
            )
            axes.set_xticks(range(count), names, fontsize=small, **turned)
            axes.set_yticks(range(count), names, fontsize=small)
        if count <= MOST_NUMBERED_CLASSES:
            _number_cells(axes, matrix, shares)
    return figure


def _number_cells(axes: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    size = 9 if matrix.max() < 1000 else 8
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if shares[row, column] > 0.35 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=size)


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _step_figure(curves: Sequence[Curve], axis: StepAxis, label: str) -> tuple[Figure, Axes]:
    """Curves over optimizer steps, with epochs along the top."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            few = len(curve.steps) <= 30
            axes.plot(
                curve.steps, curve.values, label=curve.label, color=curve.color, linewidth=1.5,
                marker="o" if few else None, markersize=4,
            )  # fmt: skip
        if axis.marked_step is not None:
            axes.axvline(
                axis.marked_step,
                color=OTHER,
                linestyle=":",
                linewidth=1,
                label=f"checkpoint (step {axis.marked_step:,})",
            )
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True))
        per_epoch = axis.steps_per_epoch
        to_epochs = (lambda steps: np.asarray(steps) / per_epoch, lambda epochs: np.asarray(epochs) * per_epoch)
        epochs = axes.secondary_xaxis("top", functions=to_epochs)
        epochs.set_xlabel("epoch")
        several = max(curve.steps[-1] for curve in curves) >= 3 * per_epoch
        epochs.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=several))
        epochs.spines["top"].set_visible(False)
        if len(curves) > 1 or axis.marked_step is not None:
            axes.legend()
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure; `path`'s ending chooses the format (``.png``)."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
