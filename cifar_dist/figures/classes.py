"""Bars: accuracy per class, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar_dist.figures.style import EVALUATION, STYLE, TRAIN, figure_with_axes, shortened

MOST_BARS = 100
MOST_VALUED_BARS = 20
_COLUMN = 34
_SHOWN_CONFUSIONS = 10


def class_bars(class_names: Sequence[str], accuracies: Sequence[float], mean: float) -> Figure:
    """Accuracy per class as bars, the lowest first, and the mean as a dashed line.

    Up to 20 classes the values stand beside the bars; more stand in columns, and of more than 100 classes the 100
    lowest are shown.

    Args:
        class_names: K names.
        accuracies: K fractions; NaN for a class without images.
        mean: a fraction.
    """
    values = np.asarray(accuracies, dtype=float)
    order = np.argsort(values, kind="stable")[:MOST_BARS]
    count = len(order)
    columns = 1 if count <= MOST_BARS // 2 else -(-count // _COLUMN)
    rows = -(-count // columns)
    few = count <= MOST_VALUED_BARS
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7 if columns == 1 else 11, 1.6 + (0.32 if few else 0.17) * rows), layout="constrained")
        for column, axes in enumerate(figure.subplots(1, columns, sharex=True, squeeze=False)[0]):
            shown = order[column * rows : (column + 1) * rows]
            axes.barh(range(len(shown)), values[shown], color=TRAIN, height=0.75)
            names = [shortened(class_names[number]) for number in shown]
            axes.set_yticks(range(len(shown)), names, fontsize=10 if few else 7)
            axes.set(xlim=(0, 1), ylim=(rows - 0.4, -0.6))
            axes.set_xticks(np.linspace(0, 1, 6))
            axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            axes.tick_params(axis="y", length=0)
            for row, value in enumerate(values[shown]):
                if np.isnan(value):
                    axes.text(0.01, row, "no images", va="center", fontsize=7)
                elif few:
                    axes.text(1.02, row, f"{value:.1%}", va="center", fontsize=9)
            line = axes.axvline(
                mean, color=EVALUATION, linestyle="--", linewidth=1.5, label=f"mean {mean:.2%}", clip_on=False, zorder=3
            )
        lowest = f", lowest {count} of {len(values):,} classes" if len(values) > count else ""
        figure.supxlabel(f"accuracy of a class{lowest}", fontsize=10)
        figure.legend(handles=[line], loc="outside upper right")
    return figure


def top_confusions(pairs: Sequence[tuple[str, str, int]]) -> Figure:
    """The ten most frequent confusions as bars, the most frequent first.

    Args:
        pairs: true class, predicted class and how many images, which is more than 0 for one at least.
    """
    found = sorted((pair for pair in pairs if pair[2] > 0), key=lambda pair: -pair[2])[:_SHOWN_CONFUSIONS]
    figure, axes = figure_with_axes(7, 1.2 + 0.32 * len(found))
    with matplotlib.rc_context(STYLE):
        axes.yaxis.grid(False)
        counts = [count for _, _, count in found]
        bars = axes.barh(range(len(found)), counts, color=TRAIN, height=0.75)
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=9)
        names = [f"{shortened(true)} → {shortened(predicted)}" for true, predicted, _ in found]
        axes.set_yticks(range(len(found)), names)
        axes.set(xlabel="images (true → predicted)", ylim=(len(found) - 0.4, -0.6))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
    return figure
