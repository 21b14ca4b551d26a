"""Cross-entropy (negative log-likelihood) as a Hugging Face `evaluate` module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import evaluate
from cifar_dist.metrics import inputs

DESCRIPTION = """Mean of -log p(true class) in nats. A probability below float64's smallest normal number counts as
that number, so one hopeless sample costs at most 708.4 nats."""


class CrossEntropy(evaluate.Metric):
    """``loss`` in nats per sample."""

    def _info(self) -> evaluate.MetricInfo:
        return inputs.describe(DESCRIPTION)

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        probabilities, labels = inputs.checked_probabilities(predictions, references)
        own = probabilities[np.arange(len(labels)), labels]
        loss = -np.log(np.clip(own, np.finfo(np.float64).tiny, 1)).mean()
        return {"loss": float(loss) + 0.0}  # of certainty alone not -0.0
