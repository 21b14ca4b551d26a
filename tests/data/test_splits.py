import re

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


@pytest.mark.parametrize(
    ("sizes", "fraction", "message"),
    [
        ((50, 2), 0.1, "class 1 has 2 train images, which leaves none for val; choose 0.26, or take 0 for no val"),
        ((50, 2), 0.9, "class 1 has 2 train images, which leaves none for train; choose 0.75, or take 0"),
        ((50, 3, 2), 0.9, "class 2 has 2 train images, which leaves none for train; choose"),
        ((200, 200, 3), 0.001, "class 2 has 3 train images, which leaves none for val; choose"),
        ((50, 1, 2), 0.1, "class 1 has 1 train image, which leaves none for val; no fraction can mend that: add"),
        ((50, 1), 0.9, "class 1 has 1 train image, which leaves none for train; no fraction can mend that: add"),
    ],
)
def test_a_class_too_small_is_named_with_the_fraction_that_works(sizes, fraction, message):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.raises(UsageError, match=f"--val-fraction {fraction}: {message}") as error:
        stratified_split(labels, fraction, 0)
    named = re.search(r"choose (0\.\d+)", str(error.value))
    for hundredth in range(1, 100) if named else ():
        if abs(hundredth / 100 - fraction) < abs(float(named[1]) - fraction) - 1e-9:
            with pytest.raises(UsageError):
                stratified_split(labels, hundredth / 100, 0)
    if named:
        both = stratified_split(labels, float(named[1]), 0)
        assert all(set(labels[part]) == set(range(len(sizes))) for part in both)


def test_a_class_is_called_by_its_name():
    with pytest.raises(UsageError, match="class newt has 2 train images"):
        stratified_split(np.repeat([0, 2], [50, 2]), 0.1, 0, ("cat", "dog", "newt"))


@pytest.mark.parametrize("smallest", [2, 3, 4, 7, 20])
def test_some_fraction_always_works_from_two_images_on(smallest):
    labels = np.repeat(np.arange(30), np.random.default_rng(smallest).integers(smallest, 50, 30))
    for fraction in (0.001, 0.999):
        try:
            stratified_split(labels, fraction, 0)
        except UsageError as error:
            stratified_split(labels, float(re.search(r"choose (0\.\d+)", str(error))[1]), 0)
