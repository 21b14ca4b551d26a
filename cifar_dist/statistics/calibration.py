"""Temperature scaling: one number, fitted on val, that makes a classifier's probabilities as sure as it is right."""

from __future__ import annotations

import numpy as np

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least cross-entropy (Guo et al. 2017, On calibration of modern neural networks).

    Fit it on val only: fitted on the images that calibration is measured on, it makes the measure look too good.

    The cross-entropy is convex in 1 / T, so its slope has one root at most; Brent's method (SciPy) finds it in log T
    between 0.01 and 100. Nothing is raised where there is none: if every image is right T is 0.01, since surer is
    always better, and if guessing is better than the logits T is 100.

    Args:
        logits: finite, (N, K); logarithms of probabilities are logits too.
        labels: int (N,).

    Returns:
        T, above 1 for a classifier that is too sure.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    scores, rows = np.asarray(logits, dtype=np.float64), np.arange(len(labels))
    excess = scores - scores[rows, labels][:, None]

    def slope(log_temperature: float) -> float:
        """Of the cross-entropy in 1 / T: the mean logit that is expected less the true class's."""
        return float((softmax(scores / np.exp(log_temperature), axis=1) * excess).sum(axis=1).mean())

    low, high = np.log(LOWEST_TEMPERATURE), np.log(HIGHEST_TEMPERATURE)
    if slope(low) <= 0:
        return LOWEST_TEMPERATURE
    if slope(high) >= 0:
        return HIGHEST_TEMPERATURE
    return float(np.exp(brentq(slope, low, high)))


def apply(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logarithms of the probabilities at a temperature, float64 (N, K). The predicted classes stay the same."""
    from scipy.special import log_softmax

    return log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
