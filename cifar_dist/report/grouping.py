"""Which runs of a study are repeats of one another, and what to call them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_dist.report.endings import was_cut
from cifar_dist.report.tables import shown
from cifar_dist.run_folder import BOOKKEEPING
from cifar_dist.run_record import Run

_ELSEWHERE = {*BOOKKEEPING, "micro_batch_size", "auto_micro_batch", "ddp_timeout", "data_mode", "skip_corrupt"}

MOST_NAMED = 4  # settings in a name
LONGEST = 60  # characters of a name by settings, above which the runs' own are taken if they are shorter
_MACHINE = ("device", "num_processes")


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


def group_runs(
    runs: Sequence[Run], names: Sequence[str], img_sizes: Sequence[int | None], of_study: bool = False
) -> list[Group]:
    """Put runs that differ in their seed alone together, in the order in which they were given.

    ``--max-steps`` is a setting where it cut the training, a shuffle window where it shuffled, and data are the same
    wherever they lie. Runs with the same settings and the same seed are no repeats: then those of one device and number
    of processes go together, and further ones open groups of their own. A group is named by its model and by the
    settings in which the groups of that model differ, of many by those that it shares with the fewest; groups that
    would have one name take the names of their first runs. Where such names are long, or the runs are a study's, all
    are named by what people have called their runs, if that is shorter.

    Args:
        runs: what was trained.
        names: what each is called, all different.
        img_sizes: pixels that each model sees a side. Where all are known they count, and not whether they were asked
            for.
        of_study: whether they are a study's.
    """
    datasets: dict[Any, str] = {}
    kept = [_settings(run, datasets) for run in runs]
    if all(img_sizes):
        kept = [{**settings, "img_size": size} for settings, size in zip(kept, img_sizes, strict=True)]
    alike = [repr({**settings, "seed": None}) for settings in kept]
    times = Counter(map(repr, kept))
    doubled = {key for key, settings in zip(alike, kept, strict=True) if times[repr(settings)] > 1}
    members: dict[tuple[str, int], list[int]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for number, (run, key) in enumerate(zip(runs, alike, strict=True)):
        key += str([run.environment.get(fact) for fact in _MACHINE]) * (key in doubled)
        seed = kept[number]["seed"]
        members.setdefault((key, seen[key, seed]), []).append(number)
        seen[key, seed] += 1
    first = [kept[numbers[0]] for numbers in members.values()]
    differing, groups = _differing(first), []
    for settings, numbers in zip(first, members.values(), strict=True):
        name = _name(settings, [other for other in first if other["model"] == settings["model"]])
        groups.append(Group(name, tuple(numbers), {key: settings[key] for key in differing}))
    groups = _told_apart(groups, names)
    called = [_called([names[number] for number in group.members]) for group in groups]
    lengths = [len(group.name) for group in groups]
    usable = all(called) and len(set(called)) == len(called) and sum(map(len, called)) < sum(lengths)
    if usable and (of_study or max(lengths) > LONGEST):
        return [replace(group, name=name) for group, name in zip(groups, called, strict=True)]
    return groups


def labels_of(groups: Sequence[Group]) -> list[str]:
    """Each run's group, by name, in the order of the runs."""
    named = {number: group.name for group in groups for number in group.members}
    return [named[number] for number in range(len(named))]


def _called(names: Sequence[str]) -> str:
    """What people have called these repeats, without their seeds; empty if that is not one name, or a default one."""
    found = {re.sub(r"_seed\d+$", "", name) for name in names}
    return found.pop() if len(found) == 1 and not re.search(r"-\d{8}-\d{6}(-\d{3})?$", "".join(found)) else ""


def _settings(run: Run, datasets: dict[Any, str]) -> dict[str, Any]:
    """All settings that make another training, the seed among them; `datasets` are the places of data seen so far."""
    found = {key: value for key, value in run.config.flat().items() if key not in _ELSEWHERE}
    place = found["dataset"]
    found["dataset"] = datasets.setdefault(run.environment.get("data_fingerprint", place), place)
    if run.data_mode != "stream":
        found["shuffle_window"] = None  # what is in memory is shuffled as a whole
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


def _name(settings: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> str:
    """The model and what differs among `rivals`, the groups of that model; what is off where all else is shared."""
    times = {key: sum(repr(other[key]) == repr(settings[key]) for other in rivals) for key in _differing(rivals)}
    named = [key for key in times if settings[key] is not None and settings[key] is not False]
    if named and min(times[key] for key in named) > 1:
        named = list(times)
    rarest = sorted(named, key=lambda key: times[key])[:MOST_NAMED]
    words = [settings["model"]]
    for key in named:
        if key in rarest:
            name, value = key.replace("_", " "), settings[key]
            value = Path(value).name if key == "init_weights" and value else value
            words.append(name if value is True else f"{name} {shown(value)}")
    return ", ".join([*words, "…"] if len(named) > MOST_NAMED else words)


def grid_axes(groups: Sequence[Group]) -> tuple[str, str] | None:
    """The two settings of a grid, such as batch size and epochs, if these alone tell the groups apart.

    A size of images that every model has for itself is none of them.
    """
    names = [name for name in groups[0].settings if name != "img_size" or not _follows_model(groups)]
    if len(groups) < 3 or len(names) != 2:
        return None
    if len({repr(group.settings) for group in groups}) < len(groups):
        return None
    rows, columns = names
    values = {name: {repr(group.settings[name]) for group in groups} for name in (rows, columns)}
    return (rows, columns) if all(len(found) > 1 for found in values.values()) else None


def _follows_model(groups: Sequence[Group]) -> bool:
    """Whether there is one size of images for each model."""
    found = {(group.settings.get("model"), group.settings["img_size"]) for group in groups}
    return len(found) == len({model for model, _ in found})
