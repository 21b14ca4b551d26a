"""Whether a classifier is as sure as it is right: calibration error, Brier score, reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

BINS = 15
DESCRIPTION = f"""Expected calibration error of the top-1 confidence in {BINS} bins of equal width (Guo et al. 2017),
and the Brier score in its original, multi-class form (Brier 1950): the mean over samples of the squared differences to
the one-hot label, summed over classes. It lies between 0 and 2; for two classes it is twice the binary form."""


class Calibration(evaluate.Metric):
    """``ece`` as a fraction, and ``brier``."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        probabilities, labels = inputs.checked_probabilities(predictions, references)
        found = reliability(probabilities, labels)
        filled = found.counts > 0
        gaps = np.abs(found.accuracies - found.confidences)[filled]
        squares = (probabilities - np.eye(probabilities.shape[1])[labels]) ** 2
        return {"ece": float(gaps @ found.counts[filled] / len(labels)), "brier": float(squares.sum(axis=1).mean())}


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram: images by the probability of the class they were given.

    Attributes:
        counts: int64 (bins,), images in each bin.
        confidences: float64 (bins,), their mean probability; NaN in an empty bin.
        accuracies: float64 (bins,), the fraction that is right; NaN in an empty bin.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Put images into bins of equal width, each without its lower edge and with its upper one (Guo et al. 2017).

    Args:
        probabilities: (N, K).
        labels: int (N,).
        bins: how many.
    """
    confidence = np.asarray(probabilities, dtype=np.float64).max(axis=1)
    right = np.asarray(probabilities).argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    number = np.searchsorted(edges[1:-1], confidence)
    counts = np.bincount(number, minlength=bins)
    shares = np.where(counts > 0, counts, np.nan)
    confidences, accuracies = (np.bincount(number, weights, bins) / shares for weights in (confidence, right))
    return Reliability(counts, confidences, accuracies)
