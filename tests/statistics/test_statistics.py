"""Intervals and comparisons against statsmodels, scikit-learn, published tables, and simulated truths."""

import numpy as np
import pytest
from scipy.stats import binom, norm, ttest_ind
from sklearn.metrics import cohen_kappa_score, f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cifar_dist import statistics
from cifar_dist.statistics import Comparison, compare, compare_groups, told_apart, verdict
from cifar_dist.statistics.label_errors import label_issues

NEWCOMBE_TABLE_III = [  # right by both, A only, B only, neither; the limits that the paper prints for its method 10
    ((36, 12, 2, 0), (0.0569, 0.3404)),
    ((20, 12, 2, 16), (0.0562, 0.3292)),
    ((18, 12, 2, 18), (0.0562, 0.3290)),
    ((36, 14, 0, 0), (0.1528, 0.4167)),
    ((18, 14, 0, 18), (0.1441, 0.3963)),
    ((2, 97, 1, 0), (0.8721, 0.9854)),
    ((0, 30, 0, 0), (0.8395, 1.0)),
    ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ((30, 0, 0, 24), (-0.0358, 0.0358)),
]
FAGERLAND = [  # Fagerland, Lydersen and Laake 2017, chapter 8: more right by B, by negative correlation and without it
    ((1, 1, 7, 12), (-0.5069, -0.0256)),
    ((59, 6, 16, 80), (-0.1186, -0.0046)),
]


def paired(both, only_a, only_b, neither):
    cells = np.repeat(np.array([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=bool), (both, only_a, only_b, neither), axis=0)
    return compare(cells[:, 0], cells[:, 1])


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (10, 10), (7, 10), (9321, 10_000), (1, 3)])
def test_wilson_agrees_with_statsmodels(correct, count):
    for level in (0.95, 0.9):
        expected = proportion_confint(correct, count, alpha=1 - level, method="wilson")
        assert statistics.wilson_interval(correct, count, level) == pytest.approx(expected, abs=1e-12)


def test_wilson_refuses_what_is_no_proportion():
    for correct, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            statistics.wilson_interval(correct, count)


def predictions(random, count, classes, accuracy=0.7):
    """Low class numbers are given too often, so that recall isn't F1."""
    labels, wrong = random.integers(0, classes, count), random.integers(0, classes, (2, count)).min(axis=0)
    return labels, np.where(random.random(count) < accuracy, labels, wrong)


def test_macro_f1_interval_is_that_of_resampled_images():
    """The same quantiles as of a plain bootstrap that draws images and asks scikit-learn, but for chance."""
    random = np.random.default_rng(0)
    labels, predicted = predictions(random, 150, 4, accuracy=0.4)
    predicted[:9] = 4
    rows = random.integers(0, 150, (800, 150))
    plain = [
        f1_score(labels[row], predicted[row], labels=range(4), average="macro", zero_division=0) for row in rows
    ]  # classes 4 and 5 are not there, and the first may be predicted
    found = statistics.bootstrap_macro_f1(labels, predicted, 6, seed=1)
    assert found == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.006)
    narrower = statistics.bootstrap_macro_f1(labels, predicted, 6, seed=1, level=0.8)
    assert narrower == pytest.approx(np.quantile(plain, [0.1, 0.9]), abs=0.006)


def test_macro_f1_interval_is_a_function_of_its_seed_and_does_not_depend_on_the_number_of_classes():
    labels, predicted = predictions(np.random.default_rng(2), 10_000, 100)
    found = statistics.bootstrap_macro_f1(labels, predicted, 100, seed=3, resamples=700)
    assert found == statistics.bootstrap_macro_f1(labels, predicted, 100, seed=3, resamples=700)
    assert found != statistics.bootstrap_macro_f1(labels, predicted, 100, seed=4, resamples=700)
    point = f1_score(labels, predicted, average="macro")
    assert found[0] < point < found[1] < found[0] + 0.03


@pytest.mark.parametrize("count", [1, 2, 5])
def test_macro_f1_interval_of_few_images_a_class_is_of_the_classes_that_a_resample_has(count):
    labels = np.repeat(np.arange(20), count)
    assert statistics.bootstrap_macro_f1(labels, labels, 20, seed=0) == (1.0, 1.0)
    if count == 1:
        return  # too coarse a distribution for its quantiles to be compared
    predicted = np.where(np.random.default_rng(1).random(len(labels)) < 0.2, (labels + 1) % 20, labels)
    rows = np.random.default_rng(2).integers(0, len(labels), (800, len(labels)))
    plain = [
        f1_score(labels[row], predicted[row], labels=np.unique(labels[row]), average="macro", zero_division=0)
        for row in rows
    ]
    found = statistics.bootstrap_macro_f1(labels, predicted, 20, seed=1)
    assert found == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)


def test_macro_f1_interval_covers_the_truth():
    """Of images drawn from known cells, whose F1 is known: about 95 of 100 intervals hold it."""
    random = np.random.default_rng(5)
    cells = np.array([[0.25, 0.05, 0.03], [0.02, 0.3, 0.02], [0.04, 0.04, 0.25]])
    truth = (2 * cells.diagonal() / (cells.sum(0) + cells.sum(1))).mean()
    held = 0
    for trial in range(600):
        drawn = random.choice(9, 400, p=cells.ravel() / cells.sum())
        low, high = statistics.bootstrap_macro_f1(drawn // 3, drawn % 3, 3, seed=trial, resamples=400)
        held += low <= truth <= high
    assert 0.92 < held / 600 < 0.975


@pytest.mark.parametrize(("cells", "limits"), NEWCOMBE_TABLE_III + FAGERLAND)
def test_paired_interval_is_the_published_one(cells, limits):
    found = paired(*cells)
    assert (found.low, found.high) == pytest.approx(limits, abs=1e-4)
    assert found.difference == pytest.approx((cells[1] - cells[2]) / sum(cells))


@pytest.mark.parametrize("differ", [(0, 0), (3, 1), (12, 12), (24, 0), (24, 1), (13, 12), (60, 35)])
def test_mcnemar_agrees_with_statsmodels(differ):
    found, exact = paired(40, *differ, 10), sum(differ) < 25
    assert found.p_value == pytest.approx(mcnemar([[40, differ[0]], [differ[1], 10]], exact=exact).pvalue)
    assert ("exact" in found.test) == exact


def test_the_corrected_chi_square_does_not_count_a_tie_as_a_difference():
    """Where statsmodels' |0| - 1 squared is 1."""
    assert paired(40, 20, 20, 10).p_value == 1


def test_paired_interval_covers_the_truth():
    random = np.random.default_rng(6)
    cells, held = np.array([0.85, 0.05, 0.03, 0.07]), 0
    for drawn in random.multinomial(400, cells, 1500):
        found = paired(*drawn)
        held += found.low <= cells[1] - cells[2] <= found.high
    assert 0.93 < held / 1500 < 0.97


def test_a_paired_test_that_rejects_goes_with_an_interval_without_0():
    """Both ways, for all small tables; where they part the sentence says so, as tested below."""
    for differ in range(1, 40):
        for only_b in range(differ // 2 + 1):
            found = paired(320, differ - only_b, only_b, 40)
            assert not (found.p_value < 0.05 and found.low <= 0)
            assert not (found.p_value > 0.1 and found.low > 0)


@pytest.mark.parametrize("function", [compare, statistics.agreement, compare_groups])
def test_other_images_or_none_are_refused(function):
    axes = (2,) if function is compare_groups else ()
    with pytest.raises(ValueError, match="same images"):
        function(np.ones((*axes, 3)), np.ones((*axes, 4)))
    with pytest.raises(ValueError, match="at least one"):
        function(np.ones((*axes, 0)), np.ones((*axes, 0)))


def test_agreement():
    random = np.random.default_rng(7)
    a, b = predictions(random, 500, 10)
    share, kappa = statistics.agreement(a, b)
    assert share == (a == b).sum() / 500
    assert kappa == pytest.approx(cohen_kappa_score(a, b))
    assert statistics.agreement([0, 0, 1, 1], [0, 0, 1, 0]) == (0.75, pytest.approx(0.5))  # chance agrees on half
    assert statistics.agreement([2, 2], [2, 2]) == (1.0, 1.0)


def test_holm_agrees_with_statsmodels():
    random = np.random.default_rng(8)
    for count in (1, 2, 6, 15):
        p_values = random.random(count) ** 3
        assert statistics.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert statistics.holm([]) == []
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_all_pairs_are_corrected_together():
    results = [paired(80, 15, 3, 2), paired(80, 9, 9, 2), paired(80, 12, 6, 2)]
    found = statistics.corrected(results)
    assert [one.p_corrected for one in found] == pytest.approx(statistics.holm([one.p_value for one in results]))
    assert {one.pairs for one in found} == {3}
    assert [one.p_value for one in found] == [one.p_value for one in results]


MEAN_A, MEAN_B, IMAGE_STD, GROUP_STD, NOISE_STD = 2.0, 1.9, 1.5, 0.5, 0.7


def simulated(random, seeds, count, seed_std):
    """Two groups of runs on the same images: an image is hard for all, for a group, or once; a run is good or bad."""
    hard = random.normal(0, IMAGE_STD, count)
    groups = []
    for number, mean in zip(seeds, (MEAN_A, MEAN_B), strict=True):
        level = mean + hard + random.normal(0, GROUP_STD, count) + random.normal(0, seed_std, (number, 1))
        groups.append(level + random.normal(0, NOISE_STD, (number, count)) > 0)
    return groups


def true_difference(seed_std):
    spread = (IMAGE_STD**2 + GROUP_STD**2 + NOISE_STD**2 + seed_std**2) ** 0.5
    return norm.cdf(MEAN_A / spread) - norm.cdf(MEAN_B / spread)


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 3), (1, 4)])
@pytest.mark.parametrize("seed_std", [0.0, 0.05, 0.3])
def test_interval_over_images_and_seeds_covers_the_truth(seeds, seed_std):
    """Where seeds don't matter, where they matter as images do, and where nothing else matters."""
    random, truth, trials = np.random.default_rng(9), true_difference(seed_std), 800
    held = sum(
        found.low <= truth <= found.high
        for found in (compare_groups(*simulated(random, seeds, 600, seed_std)) for _ in range(trials))
    )
    assert 0.92 < held / trials < 0.99


def test_groups_of_very_many_images_are_students_t_test_of_accuracies():
    """When images no longer scatter, what is left is Welch's test over the seeds."""
    random = np.random.default_rng(10)
    accuracies = [0.7 + 0.05 * random.random(4), 0.72 + 0.05 * random.random(3)]
    groups = [np.arange(100_000) < 100_000 * group[:, None] for group in accuracies]
    groups = [np.stack([random.permutation(run) for run in group]) for group in groups]
    found = compare_groups(*groups)
    expected = ttest_ind(*accuracies, equal_var=False)
    interval = expected.confidence_interval()
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.02)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.001)


def test_the_difference_of_groups_by_hand():
    assert compare_groups([[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0]]).difference == 0.625 - 0.25


def test_groups_swap_sides():
    a, b = simulated(np.random.default_rng(11), (2, 3), 500, 0.1)
    one, other = compare_groups(a, b), compare_groups(b, a)
    assert (one.low, one.high, one.p_value) == pytest.approx((-other.high, -other.low, other.p_value))


def test_one_run_each_is_the_paired_test():
    a, b = simulated(np.random.default_rng(12), (1, 1), 300, 0.0)
    found, expected = compare_groups(a, b), compare(a[0], b[0])
    for name in ("difference", "low", "high", "p_value", "test"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))


def test_groups_interval_and_test_always_agree():
    random = np.random.default_rng(13)
    seen = set()
    for _ in range(200):
        found = compare_groups(*simulated(random, (3, 3), 3000, 0.02))
        rejected = bool(found.p_value < 0.05)
        assert rejected == (not found.low <= 0 <= found.high)
        seen.add(rejected)
    assert seen == {True, False}


@pytest.mark.parametrize("right", [0, 13, 20])
def test_identical_runs_do_not_differ(right):
    """Nor are few images certainty: the interval is about as wide as that of one run each, by another method."""
    runs = np.arange(20) < right
    found, single = compare_groups([runs, runs], [runs, runs]), compare(runs, runs)
    assert (found.difference, found.p_value) == (0, 1)
    assert -found.low == found.high == pytest.approx(single.high, rel=0.45)


@pytest.mark.parametrize("seeds", [(1, 2), (2, 2), (1, 3), (3, 3)])
@pytest.mark.parametrize("count", [6, 10, 100])
@pytest.mark.parametrize("seed_std", [0.0, 0.5])
def test_equal_settings_are_rarely_called_different(seeds, count, seed_std):
    random, trials = np.random.default_rng(14), 500
    alarms = 0
    for _ in range(trials):
        level = random.normal(1, 1.5, count)
        groups = [level + random.normal(0, seed_std, (n, 1)) + random.normal(0, 1, (n, count)) > 0 for n in seeds]
        found = compare_groups(*groups)
        assert -1 <= found.low <= found.difference <= found.high <= 1
        alarms += found.p_value < 0.05
    assert alarms / trials < 0.09


def said(difference, low, high, p_value, pairs=1, p_corrected=None):
    numbers = {"difference": difference / 100, "low": low / 100, "high": high / 100, "p_value": p_value, "test": "t"}
    return verdict("A", "B", Comparison(**numbers, p_corrected=p_corrected or p_value, pairs=pairs))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0.3, 0.1, 0.5, 0.004), "A is better than B by 0.3 points (95 % CI 0.1 to 0.5, p = 0.004)"),
        (
            (-0.3, -0.5, -0.1, 0.001, 6, 0.0043),
            "B is better than A by 0.3 points (95 % CI 0.1 to 0.5 of this pair alone; p = 0.0043, corrected"
            " for 6 pairs)",
        ),
        ((0.1, -0.2, 0.4, 0.5), "A and B can't be told apart (difference 0.1 points, 95 % CI -0.2 to 0.4, p = 0.5)"),
        ((0, -0.2, 0.2, 1), "A and B can't be told apart (difference 0.0 points, 95 % CI -0.2 to 0.2, p = 1)"),
        (
            (0.3, 0.1, 0.5, 0.02, 6, 0.12),
            "A and B can't be told apart among 6 pairs (difference 0.3 points; the corrected p = 0.12 decides,"
            " the 95 % CI 0.1 to 0.5 is of this pair alone)",
        ),
        (
            (0.3, 0.1, 0.5, 0.06),
            "A and B can't be told apart (difference 0.3 points, 95 % CI 0.1 to 0.5, p = 0.06:"
            " the test is stricter than the interval)",
        ),
        (
            (0.06, -0.0013, 0.125, 0.031),
            "A and B can't be told apart (difference 0.060 points, 95 % CI -0.001 to 0.125, p = 0.031:"
            " the interval is stricter than the test)",
        ),
        ((0.4, 0.004, 0.8, 0.0497), "A is better than B by 0.400 points (95 % CI 0.004 to 0.800, p = 0.0497)"),
        ((4, 3, 5, 1e-9), "A is better than B by 4.0 points (95 % CI 3.0 to 5.0, p < 0.001)"),
        (
            (0.4, -0.3, 1.1, 0.050001),
            "A and B can't be told apart (difference 0.4 points, 95 % CI -0.3 to 1.1, p = 0.05)",
        ),
        ((0.4, 0.1, 0.8, 0.049996), "A is better than B by 0.4 points (95 % CI 0.1 to 0.8, p = 0.049996)"),
    ],
)
def test_verdicts(arguments, sentence):
    assert said(*arguments) == sentence


def test_six_images_against_none_of_ten_thousand_are_the_rare_case():
    found = paired(9690, 6, 0, 304)
    assert found.p_value == pytest.approx(2 * binom.cdf(0, 6, 0.5))
    assert found.low < 0
    assert "the interval is stricter" in verdict("A", "B", found)


def compared(difference, low, high, p):
    return Comparison(difference=difference, low=low, high=high, p_value=p, test="t", p_corrected=p)


def test_the_better_one_of_two_may_be_the_second():
    assert told_apart(compared(-0.003, -0.005, -0.001, 0.004))
    assert not told_apart(compared(-0.003, -0.006, 0.001, 0.004))
    assert not told_apart(compared(0.003, -0.001, 0.006, 0.004))


def test_an_end_of_exactly_0_needs_no_more_digits():
    assert verdict("A", "B", compared(0.003, 0.0, 0.006, 0.04)).startswith(
        "A and B can't be told apart (difference 0.3 points, 95 % CI 0.0 to 0.6"
    )


def test_a_class_with_a_single_image_may_be_suggested():
    """Its threshold is that image's 0.6, which the third, labelled 0, reaches with 0.7."""
    found = label_issues(np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]]), np.array([0, 1, 0, 0]))
    assert found.tolist() == [2]
