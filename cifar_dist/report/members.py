"""The runs of a study, each with the numbers that a comparison shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.errors import UsageError
from cifar_dist.report.evidence import Evidence
from cifar_dist.report.grouping import Group
from cifar_dist.report.predictions import Scored
from cifar_dist.run_folder import BOOKKEEPING
from cifar_dist.run_record import Run
from cifar_dist.study.record import StudyRecord


@dataclass(frozen=True)
class Member:
    """One run of a study with what its report's folder holds; its name is as much of its path as tells it apart."""

    name: str
    run: Run
    scored: Scored
    metrics: dict[str, Any]
    evidence: Evidence

    @property
    def img_size(self) -> int | None:
        """Pixels a side that the model sees, as far as scoring or the settings say."""
        return self.metrics["cost"].get("img_size", self.run.config.model.img_size)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart.

    Raises:
        UsageError: a folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"RUN_DIR {path} is given twice; name each run once.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def spread(members: Sequence[Member], group: Group) -> dict[str, Any]:
    """Mean and standard deviation of a group's test accuracies."""
    found = [members[number].metrics["top1"] for number in group.members]
    return {"mean_top1": float(np.mean(found)), "std_top1": float(np.std(found, ddof=1)) if len(found) > 1 else None}


def missing(study: StudyRecord, members: Sequence[Member]) -> dict[str, str]:
    """The study's runs that are not among these, and where they stood."""
    here = {member.run.folder.resolve().name for member in members}
    return {name: stood for name, stood in study.runs.items() if name not in here}


def row_of(member: Member, group: str) -> dict[str, Any]:
    """A run as a row of ``comparison.csv``."""
    metrics, cost, step = member.metrics, member.metrics["cost"], member.scored.about.step
    inference, training, evaluation = cost.get("inference", {}), cost.get("training", {}), metrics["evaluation"]
    return {
        "run": member.name,
        "group": group,
        **{name: value for name, value in member.run.config.flat().items() if name not in BOOKKEEPING},
        "img_size": member.img_size,
        "data_mode": member.run.data_mode,
        "train_top1": member.run.epoch_mean("train/top1", step),
        "val_top1": evaluation["top1"] if evaluation and evaluation["split"] == "val" else None,
        "final_train_loss": member.run.epoch_mean("train/loss", member.run.last_step),
        "test_set": member.scored.about.dataset,
        "tta": member.scored.about.tta,
        "top1": metrics["top1"],
        "top1_low": metrics["top1_interval"][0],
        "top1_high": metrics["top1_interval"][1],
        "error_rate": metrics["error_rate"],
        "top3": metrics["top3"],
        "top5": metrics["top5"],
        "macro_f1": metrics["macro_avg"]["f1"],
        "loss": metrics["loss"],
        "ece": metrics["calibration"]["before"]["ece"],
        "parameters": cost.get("parameters"),
        "trained_parameters": cost.get("trained_parameters"),
        "gflops": cost.get("gflops"),
        "gmacs": cost.get("gmacs"),
        "gmacs_without_attention": cost.get("gmacs_without_attention"),
        "mfu": training.get("mfu"),
        "latency_p95_seconds": inference.get("latency_p95_seconds"),
        "latency_seconds": inference.get("latency_median_seconds"),
        "images_per_second": inference.get("images_per_second"),
        "inference_batch_size": inference.get("batch_size"),
        "inference_peak_memory_bytes": inference.get("peak_memory_bytes"),
        "device": inference.get("device"),
        "training_seconds": training.get("seconds"),
        "training_peak_memory_bytes": training.get("peak_memory_bytes"),
        "checkpoint": metrics["checkpoint"]["which"],
        "selected_on": metrics["selected_on"],
    }
