import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from cifar_dist.data.splits import stratified_split
from cifar_dist.errors import UsageError

LABELS = np.random.default_rng(0).choice(5, size=1003, p=[0.4, 0.3, 0.2, 0.07, 0.03])


def test_partition_is_complete_and_sorted():
    train, val = stratified_split(LABELS, 0.1, 42)
    assert sorted([*train, *val]) == list(range(len(LABELS)))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()


@pytest.mark.parametrize("fraction", [0.05, 0.1, 1 / 3, 0.5, 0.9])
def test_sizes_agree_with_scikit_learn(fraction):
    _, val = stratified_split(LABELS, fraction, 0)
    total = round(len(LABELS) * fraction)
    _, theirs = train_test_split(LABELS, test_size=total, stratify=LABELS, random_state=0)
    assert len(val) == total
    assert np.abs(np.bincount(LABELS[val]) - np.bincount(theirs)).max() <= 1
    assert np.abs(np.bincount(LABELS[val]) - np.bincount(LABELS) * fraction).max() < 1


def test_seed_decides_and_nothing_else():
    first = stratified_split(LABELS, 0.1, 42)[1]
    np.random.seed(1)
    assert np.array_equal(first, stratified_split(LABELS.astype(np.uint8), 0.1, 42)[1])
    assert not np.array_equal(first, stratified_split(LABELS, 0.1, 43)[1])


def test_choice_is_pinned():
    """The same rows on every machine and version: a change here changes everybody's val."""
    assert stratified_split(np.arange(40) % 2, 0.2, 42)[1].tolist() == [9, 14, 17, 18, 28, 30, 33, 39]


def test_a_class_does_not_move_the_others():
    merged = np.where(LABELS == 4, 3, LABELS)
    ours, other = stratified_split(LABELS, 0.25, 3)[1], stratified_split(merged, 0.25, 3)[1]
    for label in (0, 1, 2):
        a, b = ours[LABELS[ours] == label], other[LABELS[other] == label]
        assert len(set(a) ^ set(b)) <= 1


def test_drawn_evenly():
    """Over many seeds, each row of a class is in val about as often as any other."""
    labels = np.arange(60) % 3
    times = np.bincount(np.concatenate([stratified_split(labels, 0.25, seed)[1] for seed in range(2000)]), minlength=60)
    expected = 2000 * 0.25
    assert ((times - expected) ** 2 / (expected * 0.75)).sum() < 110  # chi2(57), 1e-5


def test_zero_leaves_val_empty():
    train, val = stratified_split(LABELS, 0.0, 42)
    assert len(val) == 0 and np.array_equal(train, np.arange(len(LABELS)))


@pytest.mark.parametrize(("fraction", "lacking"), [(0.1, "val"), (0.9, "train")])
def test_small_class_is_refused(fraction, lacking):
    labels = np.array([0] * 50 + [1] * 2)
    with pytest.raises(UsageError, match=f"--val-fraction {fraction}.*class 1 has 2 .* none for {lacking}"):
        stratified_split(labels, fraction, 0)
