"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cifar_dist import figures
from cifar_dist.report.evidence import choose
from cifar_dist.report.grouping import Group, grid_axes, labels_of
from cifar_dist.report.members import Member
from cifar_dist.report.sheets import as_seen, caption, empty_maps
from cifar_dist.report.tables import shown

CAPTIONS = {
    "curves": "Loss and accuracy of all runs against epochs",
    "grid": "Test accuracy over the two settings that differ, of repeats the mean; colours from lowest to highest",
    "gflops": "Accuracy against arithmetic, with its 95 % intervals",
    "latency": "Accuracy against latency of one image, with its 95 % intervals",
    "parameters": "Accuracy against size, with its 95 % intervals",
    "training_time": "Accuracy against training time, with its 95 % intervals",
    "agreement": "Share of test images that two runs give the same class",
    "only_right": "Some of the images that only one run gets right (its name), and what the surest of the others says",
    "grad_cam": "Grad-CAM of the same test images for every run, each for the class it predicts",
}
MOST_ALONE = 16
COSTS = {
    "gflops": ("GFLOPs per image", lambda cost: cost["gflops"]),
    "latency": ("latency of one image (ms)", lambda cost: 1e3 * cost["inference"]["latency_median_seconds"]),
    "parameters": ("parameters (M)", lambda cost: cost["parameters"] / 1e6),
    "training_time": ("training time (min)", lambda cost: cost["training"]["seconds"] / 60),
}


def write(members: Sequence[Member], groups: Sequence[Group], output: Path) -> dict[str, Path]:
    """Draw and save what there is; pictures by name."""
    labels = labels_of(groups)
    drawn: dict[str, Figure | None] = {
        "curves": _curves(members, labels),
        "grid": _grid(members, groups),
        "agreement": _agreement(members),
        "only_right": _only_right(members),
        "grad_cam": _same_images(members),
    }
    drawn |= {name: _against(members, labels, name) for name in COSTS}
    return figures.save_all(drawn, output)


def captions(members: Sequence[Member], groups: Sequence[Group]) -> dict[str, str]:
    """What is said below each picture of this comparison."""
    said = dict(CAPTIONS)
    if len(members) > len(groups):
        said["curves"] += "; repeats share a colour"
    for name in ("gflops", "parameters"):
        costs = [found.get(name) for member in members if (found := member.metrics["cost"])]
        if len(set(costs)) < len(costs):
            said[name] += "; runs that cost the same are drawn side by side"
    return said


def _curves(members: Sequence[Member], labels: Sequence[str]) -> Figure:
    def points(member: Member, key: str) -> tuple[list[float], list[float]]:
        steps, values = member.run.series(key)
        return [step / member.run.plan["steps_per_epoch"] for step in steps], values

    splits = [member.run.evaluation_split for member in members]
    mixed = len(set(splits)) > 1
    curves = [
        figures.RunCurves(
            f"{label} (on test)" if mixed and split == "test" else label,
            *(points(member, key) for key in ("train/loss", "val/loss", "train/top1", "val/top1")),
        )
        for member, label, split in zip(members, labels, splits, strict=True)
    ]
    return figures.run_curves(curves, "val, or test where said so" if mixed else splits[0])


def _against(members: Sequence[Member], labels: Sequence[str], name: str) -> Figure:
    x_label, cost_of = COSTS[name]
    metrics = [member.metrics for member in members]

    def cost(found: dict) -> float:
        try:
            return float(cost_of(found["cost"]))
        except (KeyError, TypeError):
            return float("nan")

    intervals = np.array([found["top1_interval"] for found in metrics])
    return figures.accuracy_against(
        [cost(found) for found in metrics], labels, [found["top1"] for found in metrics], intervals, x_label
    )


def _grid(members: Sequence[Member], groups: Sequence[Group]) -> Figure | None:
    axes = grid_axes(groups)
    if axes is None:
        return None
    rows, columns = (
        sorted({group.settings[name] for group in groups}, key=lambda v: (str(type(v)), v)) for name in axes
    )
    values = np.full((len(rows), len(columns)), np.nan)
    for group in groups:
        place = rows.index(group.settings[axes[0]]), columns.index(group.settings[axes[1]])
        values[place] = np.mean([members[number].metrics["top1"] for number in group.members])
    names = [name.replace("_", " ") for name in axes]
    return figures.value_grid(
        values, [*map(shown, rows)], [*map(shown, columns)], (names[0], names[1], "test accuracy")
    )


def _agreement(members: Sequence[Member]) -> Figure:
    predicted = np.stack([member.scored.predicted for member in members])
    matrix = (predicted[:, None] == predicted[None]).mean(axis=2)
    return figures.agreement_matrix([member.name for member in members], matrix)


def _only_right(members: Sequence[Member]) -> Figure | None:
    """Images that one run alone gets right, as far as some report holds their pixels."""
    correct = np.stack([member.scored.correct for member in members])
    images: list[np.ndarray] = []
    captions: list[str] = []
    for position in np.flatnonzero(correct.sum(axis=0) == 1):
        sample_id = int(members[0].scored.ids[position])
        right = members[int(correct[:, position].argmax())]
        wrong = max((m for m in members if m is not right), key=lambda m: float(m.scored.probabilities[position].max()))
        holders = [m.evidence for m in members if m.evidence.holds([sample_id])]
        if holders and len(images) < MOST_ALONE:
            images.append(holders[0].image(sample_id))
            captions.append("\n".join((right.name, caption(wrong.scored, int(position), "\n"))))
    return figures.image_gallery(images, captions) if images else None


def map_words(members: Sequence[Member]) -> str:
    """How many of the maps of the same images are empty; nothing where none is."""
    first = members[0].scored
    ids = [int(first.ids[row]) for row in choose(first).shared]
    empty = {member.name: empty_maps(member.evidence, ids) for member in members}
    counts = ", ".join(f"{count} of {name}" for name, count in empty.items() if count)
    return f"Of the {len(ids)} Grad-CAM maps of each run, some are empty, all black: {counts}." if counts else ""


def _same_images(members: Sequence[Member]) -> Figure | None:
    """The first image of each class as every run sees it; runs without maps are left out."""
    first = members[0].scored
    rows = choose(first).shared
    ids = [int(first.ids[row]) for row in rows]
    maps = [[map for i in ids if (map := member.evidence.map("grad_cam", i)) is not None] for member in members]
    able = [(member, found) for member, found in zip(members, maps, strict=True) if len(found) == len(ids)]
    if not able:
        return None
    size = max(len(found[0]) for _, found in able)
    seen = [
        [
            figures.Seen(
                as_seen(map, size).clip(0, 1),
                first.class_names[member.scored.predicted[row]],
                bool(member.scored.correct[row]),
            )
            for map, row in zip(found, rows, strict=True)
        ]
        for member, found in able
    ]
    images = [as_seen(members[0].evidence.image(sample_id), size) for sample_id in ids]
    true = [first.class_names[first.labels[row]] for row in rows]
    return figures.cam_grid(images, true, [member.name for member, _ in able], seen)
