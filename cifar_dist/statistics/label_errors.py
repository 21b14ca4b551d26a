"""Images whose label is probably wrong."""

from __future__ import annotations

import numpy as np

MOST_SUSPECTED = 0.1  # of the images; of ten test sets that were checked by people the worst had 10.1 % label errors
LEAST_TRUST = 0.5
ROUNDING = 1e-9  # by which the mean of equal probabilities may lie above them


def can_tell(suspected: int, count: int, trust: float) -> bool:
    """Whether so many suspects of `count` images may be label errors, not just mistakes of the model.

    Northcutt et al. (2021b, Pervasive Label Errors in Test Sets) found 0.15 to 10.1 % wrong labels in ten well-known
    test sets (CIFAR-10 0.54 %, CIFAR-100 5.9 %). Where more than a tenth is suspected, it is the model that is unsure.
    So it is where the mean probability of the labels, which makes the thresholds of `label_issues`, is below one half:
    it takes another class there for likely enough that it holds to be more likely wrong than right.

    Args:
        suspected: rows that `label_issues` finds.
        count: images.
        trust: `mean_probability` of their labels.
    """
    return suspected <= MOST_SUSPECTED * count and trust > LEAST_TRUST


def mean_probability(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """What a model gives the labels, int (N,), on average, by its probabilities (N, K)."""
    return float(probabilities[np.arange(len(labels)), labels].mean())


def label_issues(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Suspected label errors by confident learning (Northcutt et al. 2021), the most suspicious first.

    A class's threshold is the mean probability that images labelled so have of it. An image is suspected where, of
    the classes at or above their thresholds, the most probable one isn't its label. The order is that of the
    normalised margin: the label's probability less the highest other one's.

    A mean is a high threshold: images that the model is less sure of than usual aren't suspected, so wrong labels among
    them are missed. The model must not have been trained on the images: it would have learnt the wrong labels too.

    Args:
        probabilities: (N, K).
        labels: int (N,). A class without images is never suggested.

    Returns:
        Row numbers, int64, between none and N of them.
    """
    scores, given = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    rows, classes = np.arange(len(given)), scores.shape[1]
    own, counts = scores[rows, given], np.bincount(given, minlength=classes)
    sums = np.bincount(given, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(scores >= thresholds * (1 - ROUNDING), scores, -np.inf)
    suspected = (confident.max(axis=1) > -np.inf) & (confident.argmax(axis=1) != given)
    others = scores.copy()
    others[rows, given] = -np.inf
    margin = own - others.max(axis=1)
    return rows[suspected][margin[suspected].argsort(kind="stable")]
