"""Precision, recall, F1 and support of every class as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = """Precision, recall, F1 and support of every class, with their mean over the classes that
occur among the references (macro) and over samples (weighted), by scikit-learn. What would be 0/0 is 0: a class that is
never predicted has precision 0, one without samples recall 0."""

NAMES = ("precision", "recall", "f1")


class ClassificationReport(evaluate.Metric):
    """``classes``, a list of K dicts in class order, and the dicts ``macro_avg`` and ``weighted_avg``."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, Any]:
        from sklearn.metrics import precision_recall_fscore_support

        scores, labels = inputs.checked(predictions, references)
        predicted, numbers, occurring = scores.argmax(axis=1), range(scores.shape[1]), np.unique(labels)

        def mean(average: str) -> dict[str, float]:
            values = precision_recall_fscore_support(
                labels, predicted, labels=occurring, average=average, zero_division=0
            )
            return dict(zip(NAMES, map(float, values[:3]), strict=True))

        rows = zip(*precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0), strict=True)
        classes = [dict(zip(NAMES, map(float, row[:3]), strict=True)) | {"support": int(row[3])} for row in rows]
        return {"classes": classes, "macro_avg": mean("macro"), "weighted_avg": mean("weighted")}
