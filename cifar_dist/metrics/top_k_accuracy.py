"""Top-1, top-3 and top-5 accuracy as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = """Fraction of samples whose class is among the k with the highest scores, for k = 1, 3 and 5 (or all
classes, if they are fewer). Of equal scores the lower class number comes first, as in argmax."""


class TopKAccuracy(evaluate.Metric):
    """``top1``, ``top3`` and ``top5`` as fractions."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        scores, labels = inputs.checked(predictions, references)
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        lower = np.arange(scores.shape[1]) < labels[:, None]
        ranks = ((scores > own) | ((scores == own) & lower)).sum(axis=1)
        return {f"top{k}": float((ranks < k).mean()) for k in (1, 3, 5)}
