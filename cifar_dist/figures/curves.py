"""Curves of one run over its optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from cifar_dist.figures.style import OTHER, STYLE, figure_with_axes, logarithmic, say

LOSS, ACCURACY = "cross-entropy loss (nats)", "top-1 accuracy"


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        label: its name in the legend.
        steps: optimizer steps, ascending.
        values: a value per step.
        color: a colour of the style.
        dashed: whether its line is.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str = OTHER
    dashed: bool = False


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
    """Loss in nats against steps; see `scale_losses`."""
    figure, axes = _step_figure(curves, axis, LOSS)
    scale_losses(axes, [curve.values for curve in curves])
    return figure


def accuracy_curves(curves: Sequence[Curve], axis: StepAxis) -> Figure:
    """Top-1 accuracy (fractions in, percent shown) against steps."""
    figure, axes = _step_figure(curves, axis, ACCURACY)
    scale_accuracies(axes, [curve.values for curve in curves])
    return figure


def lr_curve(schedule: Curve, logged: Curve, axis: StepAxis) -> Figure:
    """Learning rate against steps: the schedule's as a line, and some 40 of those that were logged as dots."""
    figure, axes = _step_figure([schedule], axis, "learning rate")
    every = 1 + len(logged.steps) // 40
    with matplotlib.rc_context(STYLE):
        axes.plot(
            logged.steps[::every], logged.values[::every], label=logged.label, color=logged.color, linestyle="none",
            marker="o", markersize=4,
        )  # fmt: skip
        axes.legend()
    axes.set_ylim(0, 1.05 * max([*schedule.values, *logged.values], default=0) or 1)
    axes.yaxis.set_major_formatter("{x:g}")
    return figure


def _step_figure(curves: Sequence[Curve], axis: StepAxis, label: str) -> tuple[Figure, Axes]:
    """Curves over optimizer steps, with epochs along the top."""
    figure, axes = figure_with_axes(7, 4)
    with matplotlib.rc_context(STYLE):
        for curve in curves:
            few = len(curve.steps) <= 30
            axes.plot(
                curve.steps, curve.values, label=curve.label, color=curve.color, linewidth=1.5,
                linestyle="--" if curve.dashed else "-",
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
        several = max((curve.steps[-1] for curve in curves if curve.steps), default=0) >= 3 * per_epoch
        epochs.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=several))
        epochs.spines["top"].set_visible(False)
        if len(curves) > 1 or axis.marked_step is not None:
            axes.legend()
    return figure, axes


def scale_losses(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """From 0, from near the lowest if all are above half of the highest, or logarithmic over more than two decades."""
    values = np.concatenate([np.asarray(curve, dtype=float) for curve in [*curves, []]])
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        say(axes, "no loss that is finite")
    elif len(finite) == len(values) and finite.min() > 0 and finite.max() > 100 * finite.min():
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
    else:
        low, high = finite.min(), finite.max()
        margin = 0.05 * (high - low)
        near = 0 < high / 2 < low and margin > 0  # from 0 such curves are a line at the top
        axes.set_ylim(low - margin if near else 0, (high + margin if near else 1.05 * high) or 1)


def scale_accuracies(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Percent, up to little more than 100."""
    if not any(len(curve) for curve in curves):
        say(axes, "no accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    low, high = axes.get_ylim()
    axes.set_ylim(top=min(high, 1 + 0.02 * (1 - low)))
