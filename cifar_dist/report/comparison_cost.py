"""What the runs of a comparison cost, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cifar_dist.memory import MIB
from cifar_dist.page import Table, Text
from cifar_dist.report.grouping import Group
from cifar_dist.report.members import Member, row_of
from cifar_dist.report.tables import quantity, taken

# Columns of the studies' tables: which number of a run, and how it is shown.
_Columns = dict[str, tuple[str, Callable[[float], str]]]
_TRAINING: _Columns = {
    "parameters (M)": ("parameters", lambda count: quantity(count / 1e6)),
    "of them trained (M)": ("trained_parameters", lambda count: quantity(count / 1e6)),
    "GFLOPs": ("gflops", quantity),
    "GMACs": ("gmacs", quantity),
    "GMACs without attention": ("gmacs_without_attention", quantity),
    "training time": ("training_seconds", taken),
    "memory, training (MiB)": ("training_peak_memory_bytes", lambda count: f"{count / MIB:,.0f}"),
    "MFU (%)": ("mfu", lambda share: f"{100 * share:,.1f}"),
}
_INFERENCE: _Columns = {
    "memory, inference (MiB)": ("inference_peak_memory_bytes", lambda count: f"{count / MIB:,.0f}"),
    "latency (ms)": ("latency_seconds", lambda seconds: f"{1e3 * seconds:,.2f}"),
    "p95 (ms)": ("latency_p95_seconds", lambda seconds: f"{1e3 * seconds:,.2f}"),
    "images/s": ("images_per_second", "{:,.0f}".format),
}


def cost_tables(members: Sequence[Member], groups: Sequence[Group]) -> list[Table | Text]:
    """What each group cost; of repeats the mean."""
    training, inference = [], []
    each = [[row_of(members[number], group.name) for number in group.members] for group in groups]
    for group, found in zip(groups, each, strict=True):
        sizes, devices = (each_of(row[name] for row in found) for name in ("inference_batch_size", "device"))
        size, trained, *others = (_mean(found, name, show) for name, show in _TRAINING.values())
        whole = trained != "–" and all(row["trained_parameters"] == row["parameters"] for row in found)
        training.append((group.name, size, "all" if whole else trained, *others))
        cells = [_mean(found, name, show) for name, show in _INFERENCE.values()]
        inference.append((group.name, *cells, sizes, devices))
    if all(row[2] in ("all", "–") for row in training):
        training = [(*row[:2], "–", *row[3:]) for row in training]
    repeats = [Text("Of several runs of one setting the means are given.")] if len(members) > len(groups) else []
    return [
        *_known(("settings", *_TRAINING), training),
        *_known(("settings", *_INFERENCE, "batch size", "inference on"), inference),
        *repeats,
    ]


def _known(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[Table]:
    """A table without the columns in which nothing is known; none if that is all but the first."""
    kept = [column for column in range(len(header)) if any(row[column] != "–" for row in rows)]
    table = Table([header[column] for column in kept], [tuple(row[column] for column in kept) for row in rows])
    return [table] if len(kept) > 1 else []


def each_of(values: Iterable[Any]) -> str:
    """The different values that are known."""
    return "; ".join(str(value) for value in dict.fromkeys(values) if value is not None) or "–"


def _mean(rows: Sequence[dict[str, Any]], name: str, show: Callable[[float], str]) -> str:
    known = [row[name] for row in rows if row[name] is not None]
    return show(float(np.mean(known))) if known else "–"
