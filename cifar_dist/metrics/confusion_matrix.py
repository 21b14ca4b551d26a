"""The confusion matrix as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = "Number of samples of each true class (row) that were given each predicted class (column)."


class ConfusionMatrix(evaluate.Metric):
    """``confusion_matrix``, K lists of K counts."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, list[list[int]]]:
        scores, labels = inputs.checked(predictions, references)
        matrix = np.zeros((scores.shape[1], scores.shape[1]), dtype=np.int64)
        np.add.at(matrix, (labels, scores.argmax(axis=1)), 1)
        return {"confusion_matrix": matrix.tolist()}
