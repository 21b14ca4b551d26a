"""Which runs of a study are repeats of one another, and what to call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cifar_dist.report.endings import was_cut
from cifar_dist.report.tables import NOT_SETTINGS, shown
from cifar_dist.run_record import Run

_ELSEWHERE = {*NOT_SETTINGS, "micro_batch_size", "auto_micro_batch", "ddp_timeout", "data_mode"}


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but the seed.

    Attributes:
        name: the settings in which it differs from the other groups.
        members: numbers of its runs.
        settings: those settings, by name.
    """

    name: str
    members: tuple[int, ...]
    settings: dict[str, Any]


def group_runs(runs: Sequence[Run], names: Sequence[str]) -> list[Group]:
    """Put runs that differ in their seed alone together, in the order in which they were given.

    ``--max-steps`` is a setting where it cut the training. A run with a seed that its group has already is no repeat
    (it was trained elsewhere, or on other processes) and opens a group of its own. A group is named by its model and by
    the settings in which the groups of that model differ; groups that would have one name take the names of their first
    runs.

    Args:
        runs: what was trained.
        names: what each is called, all different.
    """
    kept = [_settings(run) for run in runs]
    members: dict[tuple[str, int], list[int]] = {}
    seen: Counter[str] = Counter()
    for number, settings in enumerate(kept):
        members.setdefault((repr({**settings, "seed": None}), seen[repr(settings)]), []).append(number)
        seen[repr(settings)] += 1
    first = [kept[numbers[0]] for numbers in members.values()]
    differing, groups = _differing(first), []
    for settings, numbers in zip(first, members.values(), strict=True):
        alike = _differing([other for other in first if other["model"] == settings["model"]])
        name = _name(settings["model"], {key: settings[key] for key in alike})
        groups.append(Group(name, tuple(numbers), {key: settings[key] for key in differing}))
    return _told_apart(groups, names)


def _settings(run: Run) -> dict[str, Any]:
    """All settings that make another training, the seed among them."""
    found = {key: value for key, value in run.config.flat().items() if key not in _ELSEWHERE}
    cut = was_cut(run) and (run.config.run.max_steps or 0) < run.plan["schedule_steps"]
    return found if cut else {**found, "max_steps": None}


def _told_apart(groups: list[Group], names: Sequence[str]) -> list[Group]:
    """The groups with names that all differ."""
    times = Counter(group.name for group in groups)
    by_run = [replace(group, name=names[group.members[0]]) for group in groups]
    mixed = [other if times[group.name] > 1 else group for group, other in zip(groups, by_run, strict=True)]
    return mixed if len({group.name for group in mixed}) == len(mixed) else by_run


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of settings that are not the same everywhere, the seed aside."""
    return [key for key in settings[0] if key != "seed" and len({repr(each[key]) for each in settings}) > 1]


def _name(model: str, own: dict[str, Any]) -> str:
    words = [model]
    for key, value in own.items():
        if value not in (None, False):
            words.append(key.replace("_", " ") if value is True else f"{key.replace('_', ' ')} {shown(value)}")
    return ", ".join(words) if len(words) <= 5 else f"{', '.join(words[:5])}, …"


def grid_axes(groups: Sequence[Group]) -> tuple[str, str] | None:
    """The two settings of a grid, such as batch size and epochs, if these alone tell the groups apart."""
    if len(groups) < 3 or len(groups[0].settings) != 2:
        return None
    if len({repr(group.settings) for group in groups}) < len(groups):
        return None
    rows, columns = groups[0].settings
    values = {name: {repr(group.settings[name]) for group in groups} for name in (rows, columns)}
    return (rows, columns) if all(len(found) > 1 for found in values.values()) else None
