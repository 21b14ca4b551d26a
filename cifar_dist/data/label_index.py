"""Labels of a streamed split and the rows of its shards: read once, then kept in the cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from cifar_dist.config import DataConfig
from cifar_dist.data.resident import cache_entry
from cifar_dist.data.shards import Shards
from cifar_dist.data.sources import Source
from cifar_dist.durable import fsync
from cifar_dist.errors import UsageError, first_line

Index = tuple[np.ndarray, np.ndarray]  # int64 (R,) labels of all rows; int64 (shards,) rows of each shard


def label_index(source: Source, split: str, config: DataConfig, num_shards: int) -> Index:
    """The index of a split that is read in `num_shards` parts, from the cache or else from its labels.

    Raises:
        UsageError: the data are damaged or empty, a label is no class, or the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_entry(source, split, config)
    entry = folder.with_name(f"{folder.name}.labels.npz")
    num_classes = len(source.class_names)
    try:
        if not entry.exists():
            entry.parent.mkdir(parents=True, exist_ok=True)
        elif isinstance(kept := _read(entry, num_classes, num_shards), tuple):
            return kept  # without the lock, which a cache that can only be read has no place for
        with FileLock(entry.with_name(f"{entry.name}.lock")):
            found = _read(entry, num_classes, num_shards) if entry.exists() else None
            if isinstance(found, str):
                print(f"cache {entry} {found}: reading the labels of {split} again", file=sys.stderr, flush=True)
            if not isinstance(found, tuple):
                found = _labels(source, split)
                _write(entry, found)
            return found
    except OSError as error:
        raise UsageError(
            f"--cache-dir {entry.parent}: the labels cannot be kept there ({error.strerror or error}); name a folder"
            " with room that can be written."
        ) from None


def _read(entry: Path, num_classes: int, num_shards: int) -> Index | str:
    """The kept index, or what is wrong with it."""
    try:
        with entry.open("rb") as file, np.load(file) as found:
            labels, shard_rows = found["labels"], found["shard_rows"]
    except Exception as error:  # an archive can be damaged in many ways
        return f"is damaged ({first_line(error)})"
    if labels.dtype != np.int64 or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        return "is damaged (it holds other labels)"
    if len(shard_rows) != num_shards or shard_rows.sum() != len(labels):
        return f"is of {len(labels)} rows in {len(shard_rows)} shards, now there are {num_shards} shards"
    return labels, shard_rows


def _write(entry: Path, index: Index) -> None:
    """Keep the index, so that it survives; the caller holds the lock."""
    for left_over in entry.parent.glob(f".tmp-*-{entry.name}"):
        left_over.unlink()
    aside = entry.with_name(f".tmp-{os.getpid()}-{entry.name}")
    try:
        with aside.open("wb") as file:
            np.savez(file, labels=index[0], shard_rows=index[1])
        fsync(aside)
        aside.replace(entry)
        fsync(entry.parent)
    finally:
        aside.unlink(missing_ok=True)


def _labels(source: Source, split: str) -> Index:
    """Read the labels of all shards."""
    from tqdm import tqdm

    label, parts, rows = source.columns.label, [], []
    shards = Shards(source.tables[split].column(label), label)
    try:
        for shard in tqdm(range(len(shards)), f"reading labels of {split} once", leave=False, disable=None):
            found = [values.to_numpy() for values in shards.read(shard, 4096)]
            parts += found
            rows.append(sum(map(len, found)))
    except UsageError:
        raise
    except Exception as error:  # each library below has errors of its own for a damaged file
        raise UsageError(
            f"--dataset {source.name}: {split} cannot be read to its end ({first_line(error)}); copy the files again."
        ) from None
    source.check_count(split, sum(rows))
    labels = np.concatenate(parts)
    no_class = np.flatnonzero(~((labels >= 0) & (labels < len(source.class_names))))  # also NaN, for a missing one
    if len(no_class):
        raise source.no_class(split, int(no_class[0]), labels[no_class[0]])
    return labels.astype(np.int64), np.array(rows)
