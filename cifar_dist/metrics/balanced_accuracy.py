"""Balanced accuracy as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = """Mean recall of the classes that occur, by scikit-learn: accuracy as it would be if all of them had the
same number of samples."""


class BalancedAccuracy(evaluate.Metric):
    """``balanced_accuracy`` as a fraction."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import recall_score

        scores, labels = inputs.checked(predictions, references)
        recall = recall_score(labels, scores.argmax(axis=1), labels=np.unique(labels), average="macro")
        return {"balanced_accuracy": float(recall)}
