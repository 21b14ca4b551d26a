"""What a comparison says first: of what it is, what has the highest accuracy, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cifar_dist.report.grouping import Group
from cifar_dist.report.members import Member, spread
from cifar_dist.report.predictions import AVERAGED
from cifar_dist.report.tables import mean_and_deviation, percent

_MOST_NAMES = 3


def title(groups: Sequence[Group]) -> str:
    """Their names, if they are few."""
    names = [group.name for group in groups]
    if len(names) == 2:
        return " against ".join(names)
    return _listed(names) if len(names) <= _MOST_NAMES else f"{len(names)} settings compared"


def headline(members: Sequence[Member], groups: Sequence[Group], pairs: Sequence[dict[str, Any]]) -> str:
    """The result in a sentence."""
    about, count = members[0].scored.about, len(members[0].scored.ids)
    images = f"{count:,} test images of {about.dataset}{AVERAGED[about.tta]}"
    if all(member.scored.about.checkpoint == "last" for member in members):
        images += ", each at its last checkpoint"
    if len(groups) == 1:
        mean = mean_and_deviation([member.metrics["top1"] for member in members], percent)
        return f"{len(members)} runs of one setting have a mean accuracy of {mean} (standard deviation) on {images}."
    means = [spread(members, group)["mean_top1"] for group in groups]
    return f"Of {len(members)} runs on {images}, {_ahead(groups, means, pairs, len(members))}."


def _ahead(groups: Sequence[Group], means: Sequence[float], pairs: Sequence[dict[str, Any]], runs: int) -> str:
    """Which settings have the highest accuracy, of repeats the mean, and from which it can't be told apart."""
    what, accuracy = ("settings", "mean accuracy") if runs > len(groups) else ("runs", "accuracy")
    best, named = highest(means), [group.name for group in groups]
    if len(best) == len(groups):
        return f"{'both' if len(best) == 2 else f'all {len(best)}'} {what} have the same {accuracy}"
    winners = {named[number] for number in best}
    alike = list(dict.fromkeys(
        name
        for pair in pairs
        if not pair["told_apart"] and len({pair["a"], pair["b"]} & winners) == 1
        for name in (pair["a"], pair["b"])
        if name not in winners
    ))  # fmt: skip
    others = _listed(alike) if len(alike) <= _MOST_NAMES else f"{len(alike)} others"
    chance = "chance" if runs > len(groups) else "the choice of test images"  # all that single runs can tell
    lone = runs > len(groups) and any(len(group.members) == 1 for group in groups)
    assumed = ", if seeds matter alike in all settings" * lone
    sure = f"but can't be told apart from {others}" if alike else f"by more than {chance} explains{assumed}"
    first = _listed([named[number] for number in best]) if len(best) <= _MOST_NAMES else f"{len(best)} {what}"
    if len(best) > 1:
        return f"{first} share the highest {accuracy}, {percent(max(means))}, {sure}"
    alone = " in a single run" * (runs > len(groups) and len(groups[best[0]].members) == 1)
    return f"{first} has the highest {accuracy}, {percent(max(means))}{alone}, {sure}"


def highest(means: Sequence[float]) -> list[int]:
    """Numbers of the highest; means that differ by rounding alone are equal."""
    return [number for number, mean in enumerate(means) if math.isclose(mean, max(means), abs_tol=1e-9)]


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``; no commas between names that have some."""
    if len(names) < 3 or any("," in name for name in names):
        return " and ".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
