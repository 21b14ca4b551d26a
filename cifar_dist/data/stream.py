"""A training split that is never whole in memory: rows flow from `datasets` through a seeded window.

Row numbers and labels are read once and kept in the cache; images stay where they are. An epoch reads the shards in a
seeded order and shuffles their rows within a window, so a row's place is a pure function of (seed, epoch, window) that
is known without reading anything: any process can start at any step with the rows that come there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cifar_dist.config import DataConfig
from cifar_dist.data.resident import ResidentSet, cache_entry, to_pixels
from cifar_dist.data.sources import Source, decode_image
from cifar_dist.errors import UsageError

if TYPE_CHECKING:
    from datasets import IterableDataset

_ROWS_AT_A_TIME = 256
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between attempts to read on


class DataLost(UsageError):
    """Rows that could be read before can no longer be."""


@dataclass(frozen=True, eq=False)
class StreamSet:
    """Part of a split whose images stay on disk or on the Hub.

    Attributes:
        source: where rows come from.
        split: its split.
        all_labels: int64 (R,), labels of all rows of the split.
        shard_rows: int64 (shards,), rows of each shard; row numbers count through the shards.
        chosen: bool (R,), the rows that belong to this part.
        size: pixels a side at which images are kept.
        window: rows that are shuffled among each other.
    """

    source: Source
    split: str
    all_labels: np.ndarray
    shard_rows: np.ndarray
    chosen: np.ndarray
    size: int
    window: int

    def __len__(self) -> int:
        return int(self.chosen.sum())

    @cached_property
    def ids(self) -> torch.Tensor:
        """int64 (N,), row numbers of this part's rows: the sample ids."""
        return torch.from_numpy(np.flatnonzero(self.chosen))

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64 (N,), labels of this part's rows."""
        return torch.from_numpy(self.all_labels[self.chosen])

    @property
    def nbytes(self) -> int:
        """The most that waits in memory, as if decoded."""
        return min(2 * self.window, len(self)) * self.size**2 * 3

    def to(self, device: torch.device | str) -> StreamSet:
        """The same set; its rows go to a device batch by batch."""
        return self

    def take(self, rows: np.ndarray) -> StreamSet:
        """The part that holds the `rows` (int64 row numbers) of this whole split."""
        chosen = np.zeros(len(self.all_labels), dtype=bool)
        chosen[rows] = True
        return replace(self, chosen=chosen)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers int64 (N,) in the order of epoch `epoch`."""
        return self._orders(seed, epoch)[1]

    @lru_cache(maxsize=2)  # noqa: B019  one set lives as long as the program
    def _orders(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of shards, of this part's rows as they are given out, and as they are read."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        shards = generator.permutation(len(self.shard_rows))
        starts = np.cumsum(self.shard_rows) - self.shard_rows
        read = np.concatenate([np.arange(starts[k], starts[k] + self.shard_rows[k]) for k in shards])
        read = read[self.chosen[read]]
        # A row is given out at most a window later, or earlier, than it is read.
        places = np.arange(len(read)) + generator.random(len(read)) * self.window
        return shards, read[np.argsort(places, kind="stable")], read

    def read(self, wanted: np.ndarray, seed: int, epoch: int) -> Iterator[tuple[int, Any]]:
        """Stream the `wanted` rows (bool (R,)) in the order of reading: row number and encoded image.

        Rows that are not wanted are passed over without being decoded, shards without such rows are not opened.

        Raises:
            DataLost: a shard can't be read to its end, also after some attempts.
        """
        wanted, starts = wanted.copy(), np.cumsum(self.shard_rows) - self.shard_rows
        for shard in self._orders(seed, epoch)[0]:
            first, count = int(starts[shard]), int(self.shard_rows[shard])
            for attempt in range(len(_PAUSES_SECONDS) + 1):
                if not wanted[first : first + count].any():
                    break
                try:
                    for number, image in self._read_shard(int(shard), first, wanted):
                        wanted[number] = False
                        yield number, image
                    if wanted[first : first + count].any():
                        raise OSError(f"shard {shard} has fewer than its {count} rows")
                except Exception as error:  # files, archives and networks fail in many ways
                    if attempt == len(_PAUSES_SECONDS):
                        reason = (str(error).splitlines() or [repr(error)])[0]
                        raise DataLost(
                            f"--dataset {self.source.name}: shard {shard} of {self.split} can no longer be read"
                            f" ({reason}); restore the data and go on with --resume auto."
                        ) from None
                    time.sleep(_PAUSES_SECONDS[attempt])

    def _read_shard(self, shard: int, first: int, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        image = self.source.columns.image
        for table in _shards(self.source, self.split, [image]).shard(len(self.shard_rows), shard).iter(_ROWS_AT_A_TIME):
            here = np.flatnonzero(wanted[first : first + len(table)])
            if len(here):
                for row, value in zip(here, table.column(image).take(here).to_pylist(), strict=True):
                    yield first + int(row), value
            first += len(table)

    def decode(self, number: int, image: Any) -> np.ndarray:
        """An encoded image as uint8 (S,S,3).

        Raises:
            UsageError: it is damaged; the message names row and file.
        """
        return to_pixels(decode_image(image, self.source.place(self.split, number)), self.size)

    def take_resident(self, numbers: np.ndarray) -> ResidentSet:
        """Rows of the split (int64, sorted), decoded into memory, in the order of their numbers."""
        wanted = np.zeros(len(self.all_labels), dtype=bool)
        wanted[numbers] = True
        images = np.empty((len(numbers), self.size, self.size, 3), dtype=np.uint8)
        for number, image in self.read(wanted, seed=0, epoch=0):
            images[np.searchsorted(numbers, number)] = self.decode(number, image)
        return ResidentSet(
            torch.from_numpy(images), torch.from_numpy(self.all_labels[numbers]), torch.from_numpy(numbers)
        )


def open_stream(source: Source, split: str, config: DataConfig) -> StreamSet:
    """All rows of a split as a stream; its labels come from the cache, or are read once.

    Raises:
        UsageError: the data are damaged or empty, a label is no class, or the cache cannot be written.
    """
    labels, shard_rows = _index(source, split, config)
    everything = np.ones(len(labels), dtype=bool)
    return StreamSet(source, split, labels, shard_rows, everything, config.data_size, config.shuffle_window)


def _shards(source: Source, split: str, columns: list[str]) -> IterableDataset:
    """The split's stream as Arrow tables, in as many shards as its files have parts."""
    return source.tables[split].stream.reshard().select_columns(columns).with_format("arrow")


def _index(source: Source, split: str, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all rows, and the number of rows of each shard."""
    from filelock import FileLock

    folder = cache_entry(source, split, config)
    entry = folder.with_name(f"{folder.name}.labels.npz")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(f"{entry.name}.lock")):
            if not entry.exists():
                _write_index(entry, source, split)
            found = np.load(entry)
            return found["labels"], found["shard_rows"]
    except OSError as error:
        raise UsageError(
            f"--cache-dir {entry.parent}: the labels cannot be kept there ({error.strerror or error}); name a folder"
            " with room that can be written."
        ) from None


def _write_index(entry: Path, source: Source, split: str) -> None:
    from tqdm import tqdm

    label, parts, shard_rows = source.columns.label, [], []
    stream = _shards(source, split, [label])
    try:
        for shard in tqdm(range(stream.num_shards), f"reading labels of {split} once", leave=False, disable=None):
            found = [table.column(label).to_numpy() for table in stream.shard(stream.num_shards, shard).iter(4096)]
            parts += found
            shard_rows.append(sum(map(len, found)))
    except Exception as error:  # each library below has errors of its own for a damaged file
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UsageError(
            f"--dataset {source.name}: {split} cannot be read to its end ({reason}); copy the files again."
        ) from None
    if not sum(shard_rows):
        raise UsageError(f"--dataset {source.name}: the {split} split is empty; it needs images.")
    labels = np.concatenate(parts)
    expected = source.num_rows(split)
    if expected is not None and len(labels) != expected:
        raise UsageError(
            f"--dataset {source.name}: {split} gave {len(labels)} rows, its files announce {expected}; copy them again."
        )
    no_class = np.flatnonzero(~((labels >= 0) & (labels < len(source.class_names))))  # also NaN, for a missing one
    if len(no_class):
        raise UsageError(
            f"{source.place(split, int(no_class[0]))} has the label {labels[no_class[0]]}, which is outside"
            f" 0..{len(source.class_names) - 1}; every row needs a class (-1 marks rows without label)."
        )
    aside = entry.with_name(f".tmp-{os.getpid()}-{entry.name}")
    np.savez(aside, labels=labels.astype(np.int64), shard_rows=np.array(shard_rows))
    os.replace(aside, entry)
