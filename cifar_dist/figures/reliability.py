"""Reliability diagrams: is a prediction of confidence p right p of the time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifar_dist.figures.style import EVALUATION, OTHER, STYLE, TRAIN


@dataclass(frozen=True)
class Reliability:
    """Predictions in B bins of equal width from 0 to 1, by the confidence in the predicted class.

    Attributes:
        title: what was done to the probabilities, such as "temperature 1.73".
        confidence: mean confidence per bin, (B,); that of an empty bin does not count.
        accuracy: fraction of right predictions per bin, (B,).
        count: predictions per bin, int (B,).
        ece: expected calibration error, a fraction.
    """

    title: str
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float


def reliability_diagram(panels: Sequence[Reliability]) -> Figure:
    """Accuracy against confidence with the gap between them, and below how many predictions there are.

    After Guo et al. 2017, "On Calibration of Modern Neural Networks". The gap of a bin runs from its accuracy to its
    mean confidence.

    Args:
        panels: one or two, such as before and after temperature scaling.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 4.4 * len(panels), 5.6), layout="constrained")
        grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
        for (above, below), panel in zip(grid.T, panels, strict=True):
            _draw_gaps(above, panel)
            edges = np.linspace(0, 1, len(panel.count) + 1)
            shares = panel.count / max(panel.count.sum(), 1)
            below.bar(edges[:-1], shares, np.diff(edges), align="edge", color="#999999", edgecolor="white")
            below.set(xlabel="confidence", xlim=(0, 1))
            below.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            below.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        grid[0, 0].set_ylabel("accuracy")
        grid[1, 0].set_ylabel("predictions")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_gaps(axes: Axes, panel: Reliability) -> None:
    """Bars of accuracy, hatched gaps to the confidence, and the diagonal."""
    edges, used = np.linspace(0, 1, len(panel.count) + 1), panel.count > 0
    left, width = edges[:-1][used], np.diff(edges)[used]
    accuracy, confidence = panel.accuracy[used], panel.confidence[used]
    axes.bar(left, accuracy, width, align="edge", color=TRAIN, edgecolor="white", label="accuracy")
    axes.bar(
        left, confidence - accuracy, width, bottom=accuracy, align="edge", color="none", edgecolor=EVALUATION,
        hatch="////", linewidth=1, label="gap to confidence",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color=OTHER, linestyle="--", linewidth=1, label="calibrated")
    axes.set(ylim=(0, 1.02), title=f"{panel.title}: ECE {panel.ece:.2%}")
    axes.title.set_fontsize(10)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
