"""Scores of an imaginary model, without ties, and what they were for."""

import numpy as np
import pytest


@pytest.fixture
def scored():
    """Probabilities float32 (500, 10) and labels int64 (500,); class 9 is never predicted and class 8 never right."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 9, 500)
    logits = random.normal(size=(500, 10))
    logits[np.arange(500), labels] += 1.5
    logits[:, 9] = -8
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities.astype(np.float32), labels


@pytest.fixture
def make(tmp_path):
    """Builds a metric whose working folder is the test's own."""
    return lambda kind: kind(keep_in_memory=True, cache_dir=str(tmp_path))
