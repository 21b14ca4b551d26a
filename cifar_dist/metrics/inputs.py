"""What every metric of this package takes, and how it is checked."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

import evaluate

INPUTS = """
Args:
    predictions: N rows of K scores, the highest naming the predicted class; probabilities for the cross-entropy and the
        calibration.
    references: N class numbers from 0 to K - 1.
"""


def describe(description: str) -> evaluate.MetricInfo:
    """The module card of a metric on scores and class numbers."""
    features = datasets.Features(
        {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
    )
    return evaluate.MetricInfo(description=description, citation="", inputs_description=INPUTS, features=features)


def checked(predictions: Sequence[Sequence[float]], references: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The inputs as arrays.

    Returns:
        Scores float64 (N, K) and labels int64 (N,).

    Raises:
        ValueError: there are no rows, rows differ in length, a score is not finite, or a label is no class number.
    """
    labels = np.asarray(references, dtype=np.int64)
    if len(labels) == 0:
        raise ValueError("there is nothing to score: no predictions were given")
    if len({len(row) for row in predictions}) != 1:
        raise ValueError("every row of predictions must hold one score per class")
    scores = np.asarray(predictions, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("predictions hold scores that are not finite")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"references must be class numbers from 0 to {scores.shape[1] - 1}")
    return scores, labels


def checked_probabilities(
    predictions: Sequence[Sequence[float]], references: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs as `checked`, where scores have to be probabilities.

    Raises:
        ValueError: as `checked`, or a row is negative somewhere or doesn't sum to 1.
    """
    probabilities, labels = checked(predictions, references)
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("every row of predictions must be probabilities that sum to 1; apply softmax to logits")
    return probabilities, labels
