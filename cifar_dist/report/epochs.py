"""A run's epochs as a table for other programs."""

from __future__ import annotations

import csv
from pathlib import Path

from cifar_dist.run_record import Run, epoch_mean

_MEANS = ("train/loss", "train/top1")
_SCORES = ("val/loss", "val/top1")


def write_epochs(run: Run, path: Path) -> None:
    """Write a row for each evaluation: means over its epoch, scores of the split that was watched, and the learning
    rate of its last step; what was not logged is empty."""
    per_epoch, means = run.plan["steps_per_epoch"], [run.series(name) for name in _MEANS]
    scores = {name: dict(zip(*run.series(name), strict=True)) for name in _SCORES}
    rates = dict(zip(*run.series("lr"), strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        watched = [name.replace("val", run.evaluation_split) for name in _SCORES]
        rows.writerow(["epoch", "step", *_MEANS, *watched, "lr"])
        for step in sorted(scores["val/top1"]):
            found = [
                *(epoch_mean(series, per_epoch, step) for series in means),
                *(scores[name].get(step) for name in _SCORES),
            ]
            rows.writerow([f"{step / per_epoch:g}", step, *found, rates.get(step)])
