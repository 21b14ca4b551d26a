"""Several runs on one test set, compared: ``comparison.html``, ``.md``, ``.json`` and ``.csv`` from their reports."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist import statistics
from cifar_dist.durable import read_json
from cifar_dist.errors import UsageError
from cifar_dist.report import comparison_figures
from cifar_dist.report.comparison_page import comparison_page
from cifar_dist.report.evidence import load_evidence
from cifar_dist.report.grouping import Group, group_runs, labels_of
from cifar_dist.report.members import Member, missing, names_of, row_of, spread
from cifar_dist.report.predictions import load_predictions
from cifar_dist.run_record import Run
from cifar_dist.statistics import agreement, compare_groups, corrected, told_apart, verdict
from cifar_dist.study.record import record_of

NAME = "comparison"


@dataclass(frozen=True)
class Comparison:
    """What was written.

    Attributes:
        title: what is compared.
        verdicts: a sentence for each pair.
        markdown: the page without what lies beside it.
        summary: as in ``comparison.json``.
        page: the HTML page's path.
    """

    title: str
    verdicts: list[str]
    markdown: str
    summary: dict[str, Any]
    page: Path


def write_comparison(runs: Sequence[Run], folders: Sequence[Path], output: Path) -> Comparison:
    """Compare runs whose reports have been written; of a study's runs, say which are missing.

    Args:
        runs: in the order in which they are to be shown.
        folders: their reports'.
        output: the folder for the comparison.

    Raises:
        UsageError: the runs were not scored on the same images in the same way, or a file is missing.
    """
    members = [
        Member(name, run, load_predictions(folder), read_json(folder / "metrics.json"), load_evidence(folder, ()))
        for name, run, folder in zip(names_of([run.folder for run in runs]), runs, folders, strict=True)
    ]
    _check_comparable(members)
    study = record_of([run.folder for run in runs])
    sizes = [member.img_size for member in members]
    groups = group_runs(runs, [member.name for member in members], sizes, study is not None)
    pairs = _pairs(members, groups)
    make_room(output)
    try:
        summary = _summary(members, groups, pairs)
        if study:
            summary["study"] = {"name": study.name, "missing": missing(study, members)}
        (output / f"{NAME}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        _write_rows(summary["runs"], output / f"{NAME}.csv")
        pictures = comparison_figures.write(members, groups, output)
        files = {"table": output / f"{NAME}.csv", "all numbers": output / f"{NAME}.json"}
        page = comparison_page(members, groups, pairs, pictures, files, study)
        page.write(output, NAME)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from None
    verdicts = [pair["verdict"] for pair in pairs]
    return Comparison(page.title, verdicts, page.markdown(output, alone=True), summary, output / f"{NAME}.html")


def make_room(output: Path) -> None:
    """Make the folder of a comparison.

    Raises:
        UsageError: it cannot be made, or not be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".room").touch()
        (output / ".room").unlink()
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from None


def left_out(output: Path, runs: Sequence[Run]) -> list[str]:
    """Runs of the comparison that lies in a folder, and would be replaced, which are not among `runs`."""
    try:
        before = [row["run"] for row in read_json(output / f"{NAME}.json")["runs"]]
    except (UsageError, OSError, KeyError, TypeError):
        return []
    folders = [run.folder.resolve() for run in runs]  # a run's name is an end of its path, longer or shorter than now
    ends = ((name, Path(name).parts) for name in before)
    return [name for name, end in ends if not any(folder.parts[-len(end) :] == end for folder in folders)]


def check_runs(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot be compared as far as their folders tell, before anything is scored.

    Raises:
        UsageError: a run is given twice, or two have other classes.
    """
    names_of([run.folder for run in runs])
    for run in runs[1:]:
        _check_classes((runs[0], run), *(each.environment["class_names"] for each in (runs[0], run)))


def check_fingerprints(a: Run, b: Run, of_a: str, of_b: str) -> None:
    """Refuse two runs whose test images are of other data.

    Raises:
        UsageError: the fingerprints of the data differ.
    """
    if of_a != of_b:
        raise UsageError(
            f"RUN_DIR {a.folder} and {b.folder} were scored on data with other fingerprints ({of_a[:12]} and"
            f" {of_b[:12]}); score both on the same files."
        )


def _check_classes(pair: tuple[Run, Run], a: Sequence[str], b: Sequence[str]) -> None:
    if a != b:
        raise UsageError(
            f"RUN_DIR {pair[0].folder} and {pair[1].folder} have other classes; compare runs on the same ones."
        )


def _check_comparable(members: Sequence[Member]) -> None:
    """Refuse runs that were scored on other images, or otherwise, than the first."""
    first = members[0].scored
    if len(first.ids) < 2:
        raise UsageError(f"{first.about.dataset} has a single image to compare runs on; take a set with more.")
    for member in members[1:]:
        other, both = member.scored, f"{members[0].run.folder} and {member.run.folder}"
        _check_classes((members[0].run, member.run), first.class_names, other.class_names)
        if not np.array_equal(other.ids, first.ids) or not np.array_equal(other.labels, first.labels):
            raise UsageError(
                f"RUN_DIR {both} were scored on other test images ({len(first.ids):,} of {first.about.dataset} and"
                f" {len(other.ids):,} of {other.about.dataset}); compare runs on the same test set."
            )
        check_fingerprints(members[0].run, member.run, first.about.fingerprint, other.about.fingerprint)
        if other.about.tta != first.about.tta:
            raise UsageError(f"RUN_DIR {both} were scored with other --tta; score them alike.")


def _pairs(members: Sequence[Member], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The test of each pair of groups, corrected for their number, and how far their predictions agree."""
    both = list(combinations(groups, 2))
    tests = corrected([compare_groups(*(_correct(members, group) for group in pair)) for pair in both])
    return [_pair(a, b, test, members) for (a, b), test in zip(both, tests, strict=True)]


def _correct(members: Sequence[Member], group: Group) -> np.ndarray:
    return np.stack([members[number].scored.correct for number in group.members])


def _pair(a: Group, b: Group, test: statistics.Comparison, members: Sequence[Member]) -> dict[str, Any]:
    runs = [[members[number].scored for number in group.members] for group in (a, b)]
    both = [agreement(first.predicted, second.predicted) for first in runs[0] for second in runs[1]]
    agree, kappa = (float(np.mean(values)) for values in zip(*both, strict=True))
    right = [_correct(members, group) for group in (a, b)]
    return {
        "a": a.name,
        "b": b.name,
        "difference": test.difference,
        "interval": [test.low, test.high],
        "p": test.p_value,
        "p_corrected": test.p_corrected,
        "test": test.test,
        "agreement": agree,
        "kappa": kappa,
        "all_of_a_right_none_of_b": int((right[0].all(axis=0) & ~right[1].any(axis=0)).sum()),
        "all_of_b_right_none_of_a": int((right[1].all(axis=0) & ~right[0].any(axis=0)).sum()),
        "told_apart": told_apart(test),
        "verdict": verdict(a.name, b.name, test),
    }


def _summary(members: Sequence[Member], groups: Sequence[Group], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of the comparison."""
    correct = np.stack([member.scored.correct for member in members])
    ids = members[0].scored.ids
    only = correct & (correct.sum(axis=0) == 1)
    about = members[0].scored.about
    return {
        "dataset": {"name": about.dataset, "fingerprint": about.fingerprint, "num_samples": len(ids), "tta": about.tta},
        "runs": [row_of(member, label) for member, label in zip(members, labels_of(groups), strict=True)],
        "groups": [
            {"name": group.name, "runs": [members[number].name for number in group.members]} | spread(members, group)
            for group in groups
        ],
        "pairs": pairs,
        "all_right": int(correct.all(axis=0).sum()),
        "none_right": int((~correct).all(axis=0).sum()),
        "only_right": {member.name: ids[row].tolist() for member, row in zip(members, only, strict=True)},
    }


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
