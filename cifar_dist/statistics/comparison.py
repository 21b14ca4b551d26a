"""What every comparison of two models says, its p-value among others', and the sentence for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SIGNIFICANT = 0.05  # a corrected p below it tells two models apart


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A against B.

    Attributes:
        difference: accuracy of A minus accuracy of B.
        low: lower end of the difference's 95 % interval, which no correction has widened.
        high: its upper end.
        p_value: of the hypothesis that A and B are equally accurate.
        test: name of the test.
        p_corrected: `p_value` corrected for all pairs that are compared; `p_value` itself for one pair.
        pairs: how many are compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    p_corrected: float
    pairs: int = 1


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected so that the chance of any false alarm stays below their level (Holm 1979), in their order."""
    raw = np.asarray(p_values, dtype=float)
    order = raw.argsort(kind="stable")
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1)), 1)
    return adjusted.tolist()


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """All comparisons of a report with `p_corrected` by `holm` and the number of `pairs`."""
    adjusted = holm([one.p_value for one in comparisons])
    return [
        replace(one, p_corrected=p_value, pairs=len(comparisons))
        for one, p_value in zip(comparisons, adjusted, strict=True)
    ]


def told_apart(result: Comparison) -> bool:
    """Whether one of two models is better: the corrected p is below 0.05, and the 95 % interval leaves out 0."""
    return result.p_corrected < SIGNIFICANT and (result.low > 0 or result.high < 0)


def verdict(name_a: str, name_b: str, result: Comparison) -> str:
    """One sentence on two models, with the difference in percentage points.

    The better one is named where they are `told_apart`. Where only one of test and interval speaks for a difference the
    sentence says which decides: an interval is of its pair alone, so the p corrected for several pairs is stricter; of
    a single pair McNemar's exact or continuity-corrected p often is, and rarely the interval (six images against none
    of 10,000).
    """
    if result.difference < 0:
        name_a, name_b = name_b, name_a
        result = replace(result, difference=-result.difference, low=-result.high, high=-result.low)
    rejected, apart = result.p_corrected < SIGNIFICANT, result.low > 0
    digits = _digits(result)
    points, low, high = (
        f"{round(100 * value, digits) + 0.0:.{digits}f}" for value in (result.difference, result.low, result.high)
    )
    p = f", {_p(result.p_corrected)}"
    if result.pairs > 1:
        p = f" of this pair alone;{p[1:]}, corrected for {result.pairs} pairs"
    numbers = f"95 % CI {low} to {high}{p}"
    if told_apart(result):
        return f"{name_a} is better than {name_b} by {points} points ({numbers})"
    alike = f"{name_a} and {name_b} can't be told apart"
    if apart and result.pairs > 1:
        return (
            f"{alike} among {result.pairs} pairs (difference {points} points; the corrected"
            f" {_p(result.p_corrected)} decides, the 95 % CI {low} to {high} is of this pair alone)"
        )
    reason = ""
    if apart:
        reason = ": the test is stricter than the interval"
    elif rejected:
        reason = ": the interval is stricter than the test"
    return f"{alike} (difference {points} points, {numbers}{reason})"


def _digits(result: Comparison) -> int:
    """Decimals, at least one, that don't turn an end of the interval into 0."""
    ends = [100 * end for end in (result.low, result.high) if end]
    return next((digits for digits in range(1, 5) if all(round(end, digits) for end in ends)), 5)


def _p(p_value: float) -> str:
    """Two significant digits, or as many as it takes to stay on its side of 0.05."""
    if p_value < 0.001:
        return "p < 0.001"
    texts = (f"{p_value:.{digits}g}" for digits in range(2, 17))
    return "p = " + next((t for t in texts if (float(t) < SIGNIFICANT) == (p_value < SIGNIFICANT)), str(p_value))
