"""Intervals of one model's numbers."""

from __future__ import annotations

import numpy as np

LEVEL = 0.95  # of every interval
RESAMPLES_AT_ONCE = 500


def wilson_interval(correct: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), by SciPy.

    Raises:
        ValueError: `count` is not positive, or `correct` is not within 0 and `count`.
    """
    from scipy.stats import binomtest

    if count < 1 or not 0 <= correct <= count:  # of which some versions of SciPy make NaN
        raise ValueError(f"{correct} of {count} images is no proportion")
    found = binomtest(correct, count).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_macro_f1(
    labels: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    seed: int,
    resamples: int = 10_000,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile bootstrap interval of macro-F1 over images (Efron 1979).

    Macro-F1 depends on the images through the confusion matrix alone. So N images drawn with replacement are one
    multinomial draw of N counts over the matrix's cells. It is the mean over the classes that occur among the labels,
    of a resample over those that occur in it.

    Args:
        labels: int (N,).
        predicted: int (N,), class numbers too.
        num_classes: K, more than the highest class number.
        seed: of the resamples.
        resamples: how many are drawn.
        level: of the interval.

    Raises:
        ValueError: there are no images.
    """
    cells, counts = np.unique(np.asarray(labels) * num_classes + np.asarray(predicted), return_counts=True)
    if not len(cells):
        raise ValueError("an interval needs at least one image")
    true, called, classes = cells // num_classes, cells % num_classes, np.unique(labels)
    in_row, in_column = (true[:, None] == classes).astype(float), (called[:, None] == classes).astype(float)
    random, total, values = np.random.default_rng(seed), counts.sum(), []
    for first in range(0, resamples, RESAMPLES_AT_ONCE):
        drawn = random.multinomial(total, counts / total, min(RESAMPLES_AT_ONCE, resamples - first)).astype(float)
        hits, named, there = drawn @ (in_row * in_column), drawn @ (in_row + in_column), drawn @ in_row > 0
        values.append((2 * hits / np.maximum(named, 1)).sum(axis=1) / there.sum(axis=1))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
