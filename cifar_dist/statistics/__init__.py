"""How sure a report's numbers are, and whether two models differ: intervals, paired tests, corrected p-values.

Accuracies and their differences are fractions; differences are A minus B. Models are compared on the same images, so
on what they disagree about and not on two accuracies.
"""

from cifar_dist.statistics.comparison import Comparison, corrected, holm, told_apart, verdict
from cifar_dist.statistics.intervals import bootstrap_macro_f1, wilson_interval
from cifar_dist.statistics.paired import agreement, compare
from cifar_dist.statistics.seeds import compare_groups

__all__ = [
    "Comparison",
    "agreement",
    "bootstrap_macro_f1",
    "compare",
    "compare_groups",
    "corrected",
    "holm",
    "told_apart",
    "verdict",
    "wilson_interval",
]
