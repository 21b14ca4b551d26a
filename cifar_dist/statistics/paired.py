"""Two models on the same images."""

from __future__ import annotations

import numpy as np

from cifar_dist.statistics.comparison import Comparison
from cifar_dist.statistics.intervals import wilson_interval

EXACT_BELOW = 25  # images that one of two models alone gets right: fewer are tested exactly


def compare(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """Two models on the same images, by those that only one of them gets right.

    The interval is Newcombe's for paired proportions (1998, Statistics in Medicine 17:2635, method 10: Wilson's
    intervals squared and added, with a continuity-corrected correlation). The test is McNemar's (1947): exact binomial
    where fewer than 25 images are right for one model only, else chi-square with continuity correction. Both speak
    of new images and of these two sets of weights, not of training again (`compare_groups` does).

    Args:
        correct_a: bool (N,), whether A gets each image right.
        correct_b: bool (N,), the same of B, in the same order.

    Raises:
        ValueError: the two differ in shape, or there are no images.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    check_same_images(a, b)
    both, only_a, only_b, neither = (int(cell.sum()) for cell in (a & b, a & ~b, ~a & b, ~a & ~b))
    low, high = _newcombe(both, only_a, only_b, neither)
    p_value, test = _mcnemar(only_a, only_b)
    difference = (only_a - only_b) / len(a)
    return Comparison(difference=difference, low=low, high=high, p_value=p_value, test=test, p_corrected=p_value)


def check_same_images(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse what can't be compared: the last axis of both is the images.

    Raises:
        ValueError: the two differ in images or in axes, or there are none.
    """
    if a.shape[-1:] != b.shape[-1:] or a.ndim != b.ndim:
        raise ValueError(f"models are compared on the same images, not on {a.shape} and {b.shape}")
    if not a.size or not b.size:
        raise ValueError("a comparison needs at least one image")


def _newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """Newcombe's interval; the names of his cells e, f, g, h are both, only_a, only_b, neither."""
    count, right_a, right_b = both + only_a + only_b + neither, both + only_a, both + only_b
    p_a, p_b = right_a / count, right_b / count
    (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, count), wilson_interval(right_b, count)
    product = float(right_a) * (count - right_a) * right_b * (count - right_b)
    excess = both * neither - only_a * only_b
    phi = (max(excess - count / 2, 0) if excess > 0 else excess) / product**0.5 if product else 0.0

    def reach(of_a: float, of_b: float) -> float:
        return max(of_a**2 - 2 * phi * of_a * of_b + of_b**2, 0) ** 0.5

    difference = p_a - p_b
    return difference - reach(p_a - low_a, high_b - p_b), difference + reach(high_a - p_a, p_b - low_b)


def _mcnemar(only_a: int, only_b: int) -> tuple[float, str]:
    from scipy.stats import binomtest, chi2

    differ = only_a + only_b
    if differ < EXACT_BELOW:
        p_value = binomtest(only_a, differ).pvalue if differ else 1.0
        return float(p_value), "McNemar, exact"
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / differ
    return float(chi2.sf(statistic, 1)), "McNemar, chi-square with continuity correction"


def agreement(predicted_a: np.ndarray, predicted_b: np.ndarray) -> tuple[float, float]:
    """Share of images given the same class, and Cohen's kappa (1960): that share beyond what chance would give.

    Args:
        predicted_a: int (N,).
        predicted_b: int (N,).

    Returns:
        Both numbers. Identical predictions have kappa 1, also where they are all of one class.

    Raises:
        ValueError: the two differ in shape, or there are no images.
    """
    from sklearn.metrics import cohen_kappa_score

    a, b = np.asarray(predicted_a), np.asarray(predicted_b)
    check_same_images(a, b)
    same = float((a == b).mean())
    return same, 1.0 if same == 1 else float(cohen_kappa_score(a, b))
