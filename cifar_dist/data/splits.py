"""The train/val split: a seeded, stratified choice of row numbers, the same on every process and machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cifar_dist.errors import UsageError


def stratified_split(
    labels: np.ndarray, val_fraction: float, seed: int, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Set a share of each class apart.

    val has round(N * val_fraction) rows, shared between the classes by largest remainder. Each class is drawn by a
    generator (PCG64) of its own, seeded by (seed, class).

    Args:
        labels: whole numbers (N,).
        val_fraction: share of val, in [0, 1); 0 leaves val empty.
        seed: the split's seed.
        class_names: what messages call the classes; without them, by number.

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
    if len(left_out := _left_out(sizes, counts)):
        worst = left_out[np.argmin(sizes[left_out])]
        name, size = class_names[classes[worst]] if class_names else classes[worst], int(sizes[worst])
        raise UsageError(
            f"--val-fraction {val_fraction:g}: class {name} has {size} train image{'s' * (size != 1)},"
            f" which leaves none for {'val' if counts[worst] == 0 else 'train'}; {_cure(sizes, val_fraction)}, or take"
            " 0 for no val."
        )
    chosen = np.zeros(len(labels), dtype=bool)
    for name, count in zip(classes, counts, strict=True):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(name)])))
        chosen[generator.permutation(rows[labels == name])[:count]] = True
    return rows[~chosen], rows[chosen]


def _left_out(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices of the classes that have all of their images, or none, in val."""
    return np.flatnonzero((counts == 0) | (counts == sizes))


def _cure(sizes: np.ndarray, fraction: float) -> str:
    """The fraction nearest to `fraction`, in hundredths, that leaves no class out; there is one from two images on."""
    if sizes.min() < 2:
        return "no fraction can mend that: add images, leave the class out, bring a val split of your own"
    fractions = sorted((hundredth / 100 for hundredth in range(1, 100)), key=lambda near: abs(near - fraction))
    return f"choose {next(near for near in fractions if not len(_left_out(sizes, _shares(sizes, near))))}"


def _shares(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Whole numbers near sizes * fraction that add up to round(sum * fraction); ties go to the first class."""
    exact = sizes * fraction
    counts = np.floor(exact).astype(np.int64)
    missing = round(float(sizes.sum() * fraction)) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts
