"""What is to be scored of a run, and whether that has been done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar_dist.config import DataConfig
from cifar_dist.data import data_fingerprint
from cifar_dist.errors import UsageError
from cifar_dist.recovery import checkpoint
from cifar_dist.report import check_fingerprints, report_folder, saved_scores
from cifar_dist.run_record import Run


@dataclass(frozen=True)
class EvalSpec:
    """What a run is to be scored on, and how.

    Attributes:
        which: the checkpoint: best, last, or what its folder is called.
        own: the run's data, where they are now.
        other: another set, as ``--data`` names it; None for the run's own test split.
        fingerprint: of the data as they are now; None where the run's own are not at hand.
        tta: none, flip or flip-shift.
        precision: of the forward pass.
        folder: of the report.
    """

    which: str
    own: DataConfig
    other: str | None
    fingerprint: str | None
    tta: str
    precision: str
    folder: Path


def choose_specs(runs: Sequence[Run], which: str, other: str | None, tta: str) -> list[EvalSpec]:
    """What to score of each run, after seeing that these are the same images wherever the data are at hand.

    Args:
        runs: they are compared, if there are several.
        which: the checkpoint: best, last, or its folder. A run that keeps no best gives its last.
        other: a data set to score instead of the runs' own test splits.
        tta: none, flip or flip-shift.

    Raises:
        UsageError: there is no such checkpoint, or the data cannot be used or are not the same.
    """
    specs = [_choose(run, which, other, tta) for run in runs]
    at_hand = [(run, spec.fingerprint) for run, spec in zip(runs, specs, strict=True) if spec.fingerprint is not None]
    for run, fingerprint in at_hand[1:]:
        check_fingerprints(at_hand[0][0], run, at_hand[0][1], fingerprint)
    return specs


def _choose(run: Run, wanted: str, other: str | None, tta: str) -> EvalSpec:
    which = wanted
    if which == "best" and checkpoint.exists(run.folder) and not checkpoint.keeps_best(run.folder):
        print("checkpoint  the run has no best one; the last is scored", flush=True)
        which = "last"
    elif which not in ("best", "last"):
        which = _named(run, which)
    own = run.config.data
    if other is not None and _have_moved(run, other):
        print(f"data        those of {run.folder} are read from {other}", flush=True)
        own, other = run.data_at(other), None
    fingerprint = _fingerprint(own, other)
    folder = report_folder(run.folder, "best" if wanted == "best" else which, other, fingerprint, tta)
    return EvalSpec(which, own, other, fingerprint, tta, precision_of(run), folder)


def _named(run: Run, which: str) -> str:
    """What a checkpoint's folder is called that is named so, or by its path."""
    inside = run.folder / "checkpoints"
    for place in (Path(which), inside / which, run.folder / which):
        folder, name = os.path.split(os.path.realpath(place))
        if folder == os.path.realpath(inside) and os.path.isdir(place):
            return name
    there = ", ".join(sorted(path.name for path in inside.glob("step-*")))
    raise UsageError(
        f"--checkpoint {which}: neither best nor last, nor one of {run.folder} ({there or 'none is there'})."
    )


def _have_moved(run: Run, place: str) -> bool:
    """Whether a run's data are gone, and files of their names and sizes are at another place."""
    trained_on = run.environment.get("data_fingerprint")
    if trained_on is None or _fingerprint(run.data_at(place)) != trained_on:
        return False
    return _fingerprint(run.config.data) is None  # asked last: the Hub may take its time to be missing


def _fingerprint(own: DataConfig, other: str | None = None) -> str | None:
    """Of the data to score, None where the run's own are not at hand; nothing is decoded."""
    try:
        return data_fingerprint(own, other)
    except UsageError:
        if other is not None:
            raise
        return None


def precision_of(run: Run) -> str:
    """How a run is scored: as it was trained, but fp16 on a GPU only."""
    precision = run.config.run.precision
    return "fp32" if precision == "fp16" and not torch.accelerator.is_available() else precision


def is_done(run: Run, spec: EvalSpec) -> bool:
    """Whether a report's predictions are what scoring would find now; what is gone cannot have changed."""
    scored = saved_scores(spec.folder)
    if scored is None:
        return False
    about = scored.about
    if (about.checkpoint, about.tta, about.precision) != (spec.which, spec.tta, spec.precision):
        return False
    if spec.fingerprint not in (None, about.fingerprint):
        return False
    return not checkpoint.exists(run.folder) or checkpoint.find(run.folder, spec.which).digest == about.digest
