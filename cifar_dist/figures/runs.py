"""Several runs in one picture: their curves, and their accuracy against what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cifar_dist.figures.curves import ACCURACY, LOSS, scale_accuracies, scale_losses
from cifar_dist.figures.style import OTHER, STYLE, figure_with_axes, logarithmic, setting_styles, shortened

_MOST_WITH_TRAIN = 6
_FAR_APART = 5  # times as many epochs
_APART, _REACH = 0.01, 0.015  # of the axis: between runs of one cost, and the most that one is drawn beside it
Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class RunCurves:
    """What one run of a comparison logged: epochs, ascending, and values; both empty where it logged nothing.

    Attributes:
        label: the run's settings; runs of one label are repeated seeds.
        train_loss: nats.
        val_loss: nats.
        train_top1: fractions.
        val_top1: fractions.
    """

    label: str
    train_loss: Points = ((), ())
    val_loss: Points = ((), ())
    train_top1: Points = ((), ())
    val_top1: Points = ((), ())


def run_curves(runs: Sequence[RunCurves], evaluation_split: str = "val") -> Figure:
    """Loss and accuracy of all runs against epochs; repeated seeds are thinner lines of one colour.

    Val is solid. Train, dashed, is left out of a picture of more than 6 labels. Epochs are on a logarithmic axis where
    some runs are five times as long as others.

    Args:
        runs: of about 12 labels at most.
        evaluation_split: what the solid lines are called.
    """
    styles, seeds = setting_styles(run.label for run in runs), Counter(run.label for run in runs)
    if len(styles) > _MOST_WITH_TRAIN:
        runs = [replace(run, train_loss=((), ()), train_top1=((), ())) for run in runs]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5 + 0.1 * len(styles)), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, label in ((left, LOSS), (right, ACCURACY)):
            axes.set(xlabel="epoch", ylabel=label)
        for run in runs:
            width = 1.6 if seeds[run.label] == 1 else 0.9
            _draw_pair(left, (run.train_loss, run.val_loss), styles[run.label], width)
            _draw_pair(right, (run.train_top1, run.val_top1), styles[run.label], width)
        scale_losses(left, [points[1] for run in runs for points in (run.train_loss, run.val_loss)])
        scale_accuracies(right, [points[1] for run in runs for points in (run.train_top1, run.val_top1)])
        ends = [max(points[0]) for run in runs for points in (run.val_loss, run.val_top1) if len(points[0])]
        far_apart = bool(ends) and max(ends) >= _FAR_APART * min(ends) > 0
        for axes in (left, right):
            if far_apart:
                axes.set_xscale("log")
                logarithmic(axes.xaxis)
            else:
                axes.set_xlim(left=0)
        keys = []
        for label, (color, marker) in styles.items():
            times = f" ({seeds[label]} seeds)" if seeds[label] > 1 else ""
            keys.append(Line2D([], [], color=color, marker=marker, markersize=5, label=shortened(label, 44) + times))
        keys.append(Line2D([], [], color=OTHER, label=evaluation_split))
        if len(styles) <= _MOST_WITH_TRAIN:
            keys.append(Line2D([], [], color=OTHER, linestyle="--", linewidth=1, label="train"))
        figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


def _draw_pair(axes: Axes, pair: tuple[Points, Points], style: tuple[str, str], width: float) -> None:
    """A run's train, dashed and fainter, and val with some ten markers."""
    (train, val), (color, marker) = pair, style
    axes.plot(
        *train, color=color, linestyle="--", linewidth=0.6 * width, alpha=0.7, marker="." if len(train[0]) < 3 else None
    )
    every = max(1, len(val[0]) // 10)
    axes.plot(*val, color=color, linewidth=width, marker=marker, markersize=2 + 1.5 * width, markevery=every)


def accuracy_against(
    x: Sequence[float], labels: Sequence[str], accuracies: Sequence[float], intervals: np.ndarray, x_label: str
) -> Figure:
    """Accuracy with its interval against a cost such as GFLOPs or latency, a colour and marker per label.

    The axis of costs is logarithmic where they differ by more than a factor of 10. It reaches at least a fifth beyond
    the lowest and the highest, so that costs that are nearly equal stand close together; accuracies likewise span at
    least a point. Runs of exactly one cost stand side by side, at most 1.5 % of the axis beside it, or their intervals
    would hide each other; marks are hollow, so that those of nearly one cost are seen through each other.

    Args:
        x: costs of N runs, at least 0; NaN where unknown, then the legend says so.
        labels: N names, about 12 different ones at most; runs of one label are repeated seeds.
        accuracies: N fractions.
        intervals: low and high ends, fractions (N, 2).
        x_label: what the costs are, with their unit.
    """
    costs, ends, middle = np.asarray(x, dtype=float), np.asarray(intervals, dtype=float), np.asarray(accuracies)
    styles = setting_styles(labels)
    figure, axes = figure_with_axes(8, 4 + 0.1 * len(styles))
    with matplotlib.rc_context(STYLE):
        finite = costs[np.isfinite(costs)]
        if len(finite) and finite.max() > 0:
            if finite.min() > 0 and finite.max() > 10 * finite.min():
                axes.set_xscale("log")
                logarithmic(axes.xaxis)
            axes.set_xlim(finite.min() / 1.2, 1.2 * finite.max())
            costs = _side_by_side(axes, costs)
        for label, (color, marker) in styles.items():
            rows = np.flatnonzero([other == label for other in labels])
            errors = np.abs(ends[rows].T - middle[rows])
            known = "" if np.isfinite(costs[rows]).any() else " (not measured)"
            axes.errorbar(
                costs[rows], middle[rows], yerr=errors, color=color, marker=marker, linestyle="none",
                markersize=5, capsize=2, linewidth=1.2, markerfacecolor="none", label=shortened(label, 34) + known,
            )  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, middle.min() - 0.005), max(high, middle.max() + 0.005))
        scale_accuracies(axes, [accuracies])
        axes.set(xlabel=x_label, ylabel=f"{ACCURACY} on test")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _side_by_side(axes: Axes, costs: np.ndarray) -> np.ndarray:
    """Costs (N,), those that are equal moved a little apart about it; all others stay as they are."""
    scale, moved = axes.transScale + axes.transLimits, costs.copy()
    for cost in np.unique(costs[np.isfinite(costs)]):
        rows = np.flatnonzero(costs == cost)
        if len(rows) > 1:
            reach = min(_REACH, _APART * (len(rows) - 1) / 2)
            places = scale.transform((cost, 1))[0] + np.linspace(-reach, reach, len(rows))
            moved[rows] = scale.inverted().transform(np.column_stack([places, np.ones(len(rows))]))[:, 0]
    return moved
