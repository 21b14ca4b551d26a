"""The train/val split: a seeded, stratified choice of row numbers, the same on every process and machine."""

from __future__ import annotations

import numpy as np

from cifar_dist.errors import UsageError


def stratified_split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set a share of each class apart.

    val has round(N * val_fraction) rows, shared between the classes by largest remainder. Each class is drawn by a
    generator (PCG64) of its own, seeded by (seed, class).

    Args:
        labels: whole numbers (N,).
        val_fraction: share of val, in [0, 1); 0 leaves val empty.
        seed: the split's seed.

    Returns:
        Row numbers of train and of val, int64, each sorted.

    Raises:
        UsageError: a class would be left without an image in val, or without one in train.
    """
    rows = np.arange(len(labels))
    if val_fraction == 0:
        return rows, rows[:0]
    classes, sizes = np.unique(labels, return_counts=True)
    counts = _shares(sizes, val_fraction)
    for name, size, count in zip(classes, sizes, counts, strict=True):
        if count == 0 or count == size:
            lacking = "val" if count == 0 else "train"
            raise UsageError(
                f"--val-fraction {val_fraction:g}: class {name} has {size} train images, which leaves none for "
                f"{lacking}; choose {'a larger' if count == 0 else 'a smaller'} fraction or 0 for no val."
            )
    chosen = np.zeros(len(labels), dtype=bool)
    for name, count in zip(classes, counts, strict=True):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(name)])))
        chosen[generator.permutation(rows[labels == name])[:count]] = True
    return rows[~chosen], rows[chosen]


def _shares(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Whole numbers near sizes * fraction that add up to round(sum * fraction); ties go to the first class."""
    exact = sizes * fraction
    counts = np.floor(exact).astype(np.int64)
    missing = round(float(sizes.sum() * fraction)) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts
