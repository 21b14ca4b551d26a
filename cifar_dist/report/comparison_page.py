"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.page import Files, Page, Picture, Section, Table, Text
from cifar_dist.report import comparison_figures
from cifar_dist.report.comparison_cost import cost_tables, each_of
from cifar_dist.report.endings import cut_warning, epochs_of, steps_of, steps_trained, was_cut
from cifar_dist.report.grouping import Group
from cifar_dist.report.headline import headline, highest, title
from cifar_dist.report.members import Member, missing, row_of, spread
from cifar_dist.report.tables import interval, mean_and_deviation, percent, shown, while_training
from cifar_dist.study.record import StudyRecord

MOST_CLASSES, MOST_SETTINGS = 20, 8  # of a table of single classes


def comparison_page(
    members: Sequence[Member], groups: Sequence[Group], pairs: list[dict[str, Any]], pictures: dict[str, Path],
    files: dict[str, Path], study: StudyRecord | None,
) -> Page:  # fmt: skip
    """The comparison for people: which is better first, then at what cost."""
    about, warnings = members[0].scored.about, _warnings(members)
    captions = comparison_figures.captions(members, groups)

    def drawn(*names: str) -> list[Picture]:
        return [Picture(pictures[name], captions[name]) for name in names if name in pictures]

    empty = [Text(words)] if (words := comparison_figures.map_words(members)) else []
    best = {groups[n].name for n in highest([spread(members, group)["mean_top1"] for group in groups])}
    absent = missing(study, members) if study else {}
    if study and absent:
        are = "is" if len(absent) == 1 else "are"
        warnings.append(f"{len(absent)} of the {len(study.runs)} runs of this study {are} missing.")
    if not about.own_data:
        warnings.insert(0, f"{about.dataset} is another set than the runs' own, of which train and val are.")
    return Page(
        f"Study {study.name}: {title(groups)}" if study else title(groups),
        [Text(headline(members, groups, pairs), strong=True), *(Text(warning, strong=True) for warning in warnings)],
        [
            Section(
                "Missing runs",
                [Table(("run", "where it stood when last compared"), list(absent.items()))] if absent else [],
            ),
            Section("Settings", _settings(members, groups)),
            Section("Accuracy", [*_accuracies(members, groups), *drawn("grid", "curves")]),
            Section("Accuracy per class", _per_class(members, groups)),
            Section("Which is better", _verdicts(pairs, groups, best)),
            Section("Cost", [*cost_tables(members, groups), *drawn(*comparison_figures.COSTS)]),
            Section(
                "Where they differ", [*_only(members, groups), *empty, *drawn("agreement", "only_right", "grad_cam")]
            ),
            Section("Files", [Files(files)]),
        ],
    )


def _warnings(members: Sequence[Member]) -> list[str]:
    """Those of the runs' reports, with the runs' names where not all have it; one for all that were cut."""
    cut = [member for member in members if was_cut(member.run) and steps_trained(member.run)]
    names = dict[str, list[str]]()
    for member in members:
        for warning in member.metrics["warnings"]:
            if member not in cut or warning != cut_warning(member.run):
                names.setdefault(warning, []).append(member.name)
    found = [
        warning if len(named) == len(members) else f"{', '.join(named)}: {warning}" for warning, named in names.items()
    ]
    if cut:
        after = ", ".join(f"{member.name} after {steps_of(member.run)}" for member in cut)
        found.insert(0, f"Not all runs were trained to the end of their schedule; cut: {after}.")
    return found


def _accuracies(members: Sequence[Member], groups: Sequence[Group]) -> list[Table | Text]:
    """Accuracies of each run and means of repeats; then each run's other numbers."""
    rows: list[tuple[str, ...]] = []
    further = [f"top{k}" for k in (3, 5) if k < len(members[0].scored.class_names)]
    for group in groups:
        runs = [members[number] for number in group.members]
        found = [run.metrics | row_of(run, group.name) for run in runs]
        if len(runs) > 1:
            names = ("top1", *further, "train_top1", "val_top1")
            test, *places, train, val = (mean_and_deviation([one[name] for one in found], percent) for name in names)
            rows.append((group.name, f"mean of {len(runs)} runs", test, "", *places, "", train, val))
        for run, one in zip(runs, found, strict=True):
            rows.append(
                (
                    group.name,
                    run.name,
                    percent(one["top1"]),
                    interval(one["top1_interval"]),
                    *(percent(one[name]) for name in (*further, "error_rate")),
                    *(_percent_or_dash(one[name]) for name in ("train_top1", "val_top1")),
                )
            )
    strong = [number for number, row in enumerate(rows) if not row[3]]
    tops = (f"top-{name[3:]}" for name in further)
    header: tuple[str, ...] = ("settings", "run", "test", "95 % interval", *tops, "error", "train", "val")
    if all(row[0] == row[1] for row in rows):  # as of a study's runs without repeats
        header, rows = header[1:], [row[1:] for row in rows]
    words = "± is the sample standard deviation (n - 1) over the n runs of a setting, not an interval of their mean."
    explained = (
        f"Intervals of accuracies are Wilson's score intervals, of the test images.{f' {words}' if strong else ''}"
        f" Train is the mean over the checkpoint's epoch, the train loss below over the last; both are taken"
        f" {_while_training(members)}."
    )
    if len(groups) > 2:
        explained += " The highest of several test accuracies flatters its setting: what is to be chosen, rather than"
        explained += " compared, is chosen by val."
    return [Table(header, rows, strong), Text(explained), _other_numbers(members, groups)]


def _while_training(members: Sequence[Member]) -> str:
    found = {while_training(member.run.config) for member in members}
    return found.pop() if len(found) == 1 else "while training, on what each run makes of its images and labels"


def _other_numbers(members: Sequence[Member], groups: Sequence[Group]) -> Table:
    found = [
        (
            member.metrics["macro_avg"]["f1"],
            member.metrics["loss"],
            row_of(member, "")["final_train_loss"],
            member.metrics["calibration"]["before"]["ece"],
        )
        for member in members
    ]
    rows, strong = list[tuple[str, ...]](), list[int]()
    for group in groups:
        if len(group.members) > 1:
            columns = zip(*(found[number] for number in group.members), strict=True)
            strong.append(len(rows))
            rows.append(
                (f"mean of {group.name}", *(mean_and_deviation(values, _four_digits) for values in columns), "", "", "")
            )
        for number in group.members:
            values = ("–" if value is None else _four_digits(value) for value in found[number])
            member = members[number]
            scored = f"{member.scored.about.step / member.run.plan['steps_per_epoch']:g}"
            rows.append((member.name, *values, epochs_of(member.run), scored, member.metrics["selected_on"]))
    header = ("run", "macro F1", "loss (nats)", "final train loss", "ECE", "epochs", "scored at epoch", "selected on")
    return Table(header, rows, strong)


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def _per_class(members: Sequence[Member], groups: Sequence[Group]) -> list[Table | Text]:
    """Each class's accuracy by setting, of repeats the mean, the best in bold; nothing where that would be too much."""
    names = members[0].scored.class_names
    if len(names) > MOST_CLASSES or not 1 < len(groups) <= MOST_SETTINGS:
        return []
    found = [[members[number].metrics["classes"] for number in group.members] for group in groups]
    rows, best = list[tuple[str, ...]](), set[tuple[int, int]]()
    for row, name in enumerate(names):
        if found[0][0][row]["support"]:
            means = [float(np.mean([classes[row]["recall"] for classes in runs])) for runs in found]
            first = highest(means)
            best |= {(len(rows), column + 1) for column in first if len(first) < len(means)}
            rows.append((name, *map(percent, means)))
    words = "The best of each class is bold, unless all are equal; whether it is so by chance was not tested."
    return [Table(("class", *(group.name for group in groups)), rows, strong_cells=best), Text(words)]


def _settings(members: Sequence[Member], groups: Sequence[Group]) -> list[Text | Table]:
    """All settings in which the groups differ: a model is compared as it was trained."""
    names = groups[0].settings
    twice = len({repr(group.settings) for group in groups}) < len(groups)
    again = "Runs with the same settings and the same seed are no repeats; they are compared with each other."
    rows = [(name.replace("_", " "), *(shown(group.settings[name]) for group in groups)) for name in names]
    for name, label in (("num_processes", "processes"), ("device", "trained on")):
        found = [each_of(members[number].run.environment.get(name) for number in group.members) for group in groups]
        rows += [(label, *found)] if len(set(found)) > 1 else []
    if not rows:
        return [Text(f"All settings are the same. {again}")] if twice else []
    unequal = ", but not all runs were trained to their end" if any(was_cut(member.run) for member in members) else ""
    own = "mean", "std", "interpolation"
    if "model" in names and any(getattr(member.run.config.model, name) is None for member in members for name in own):
        unequal = f" (mean, std and interpolation are each model's own where they were not set){unequal}"
    words = f"All other settings are the same{unequal}."
    words += " What is compared is a model as it was trained, not an architecture alone."
    if len(members) == len(groups):
        words += " Each was trained once: intervals are of the test images, and say nothing of other seeds."
    words += f" {again}" * twice
    return [Table(("setting", *(group.name for group in groups)), rows), Text(words)]


def _percent_or_dash(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _verdicts(pairs: list[dict[str, Any]], groups: Sequence[Group], best: set[str]) -> list[Text | Table]:
    """A sentence for each pair, of many only for those with the best; a table of all."""
    if not pairs:
        return [Text("All runs have the same settings but the seed: there is nothing to compare.")]
    rows = [
        (
            f"{pair['a']} / {pair['b']}",
            f"{100 * pair['difference']:+.2f}",
            f"{100 * pair['interval'][0]:+.2f} to {100 * pair['interval'][1]:+.2f}",
            *("< 0.001" if p < 0.001 else f"{p:.2g}" for p in (pair["p"], pair["p_corrected"])),
            percent(pair["agreement"]),
            pair["test"],
        )
        for pair in pairs
    ]
    corrected, alone = "", ""
    if len(pairs) > 1:
        alone = " of the pair alone"
        corrected = (
            f" What decides is p corrected for {len(pairs)} pairs (Holm, 1979): of many intervals some leave out 0 by"
            " chance."
        )
    header = ("pair", "difference (points)", f"95 % interval{alone}", "p", "p, corrected", "same prediction", "test")
    lone, seeds = [group.name for group in groups if len(group.members) == 1], ""
    if len(lone) < len(groups):
        seeds = " Several runs of one setting are repeats: what differs between their seeds counts too. Same prediction"
        seeds += " is the mean over pairs of their runs."
        assumed = "Seeds are taken to matter there as in the other setting of a pair, which only repeats can tell."
        if any(len(group.members) == 2 for group in groups):
            seeds += " Two runs tell little of how much seeds matter: with three or more intervals are much narrower."
        seeds += f" Trained once: {'; '.join(lone)}. {assumed}" * bool(lone)
    single = [pair["test"].startswith("McNemar") for pair in pairs]
    methods = " Of two single runs the interval is Newcombe's (1998) and the test McNemar's." * any(single)
    methods += " Of repeats, interval and test are Student's t over images and seeds." * (not all(single))
    return [
        *(Text(pair["verdict"], strong=True) for pair in pairs if len(pairs) <= 3 or best & {pair["a"], pair["b"]}),
        Table(header, rows),
        Text(f"Tests are paired: they look at the same images.{methods}{corrected}{seeds}"),
    ]


def _only(members: Sequence[Member], groups: Sequence[Group]) -> list[Table | Text]:
    """How many images only one setting gets right; of repeats, only one run."""
    sides = {group.name: group.members for group in groups}
    if len(groups) == 1:
        sides = {member.name: (number,) for number, member in enumerate(members)}
    correct = np.stack([member.scored.correct for member in members])
    always = np.stack([correct[list(numbers)].all(axis=0) for numbers in sides.values()])
    ever = np.stack([correct[list(numbers)].any(axis=0) for numbers in sides.values()])
    rows = [(f"only {name}", f"{(always[row] & (ever.sum(axis=0) == 1)).sum():,}") for row, name in enumerate(sides)]
    every, none = correct.all(axis=0).sum(), (~correct).all(axis=0).sum()
    some = correct.shape[1] - every - none - (always & (ever.sum(axis=0) == 1)).sum()
    rows += [("several, or only some repeats" if len(groups) < len(members) else "several", f"{some:,}")] * bool(some)
    rows += [("all", f"{every:,}"), ("none", f"{none:,}")]
    words = "A setting with repeats is right where all its runs are, and wrong where none is."
    return [Table(("right", "images"), rows), *[Text(words)] * (1 < len(groups) < len(members))]
