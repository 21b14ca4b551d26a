"""Cross-entropy (negative log-likelihood) as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = """Mean of -log p(true class) in nats. A probability below float32's smallest normal number counts as
that number, so one hopeless sample costs at most 87.3 nats."""


class CrossEntropy(evaluate.Metric):
    """``loss`` in nats per sample."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        probabilities, labels = inputs.checked(predictions, references)
        if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
            raise ValueError("every row of predictions must be probabilities that sum to 1; apply softmax to logits")
        own = probabilities[np.arange(len(labels)), labels]
        return {"loss": float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())}
