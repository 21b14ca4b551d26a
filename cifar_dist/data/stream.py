"""A training split that is never whole in memory: rows flow from `datasets` through a seeded window.

Row numbers and labels are read once and kept in the cache; images stay where they are. An epoch reads the shards in a
seeded order and shuffles their rows within a window, so a row's place is a pure function of (seed, epoch, window) that
is known without reading anything: any process can start at any step with the rows that come there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cifar_dist.config import DataConfig
from cifar_dist.data.label_index import label_index
from cifar_dist.data.resident import ResidentSet, to_pixels
from cifar_dist.data.shards import Shards
from cifar_dist.data.sources import Source, decode_image, image_bytes
from cifar_dist.errors import UsageError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

_ROWS_AT_A_TIME = 256
_FILES_AT_ONCE = 8
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between attempts to read on
_OUR_MISTAKES = (TypeError, AttributeError, NameError, AssertionError)  # no second attempt mends them


class DataLost(UsageError):
    """Rows that could be read before can no longer be."""


@dataclass(frozen=True, eq=False)
class StreamSet:
    """Part of a split whose images stay on disk or on the Hub.

    Attributes:
        source: where rows come from.
        split: its split.
        shards: its images.
        all_labels: int64 (R,), labels of all rows of the split.
        shard_rows: int64 (shards,), rows of each shard; row numbers count through the shards.
        chosen: bool (R,), the rows that belong to this part.
        size: pixels a side at which images are kept.
        window: rows that are shuffled among each other.
    """

    source: Source
    split: str
    shards: Shards
    all_labels: np.ndarray
    shard_rows: np.ndarray
    chosen: np.ndarray
    size: int
    window: int

    def __len__(self) -> int:
        return int(self.chosen.sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (shards,), the number of each shard's first row."""
        return np.cumsum(self.shard_rows) - self.shard_rows

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
        read = np.concatenate([np.arange(self.starts[k], self.starts[k] + self.shard_rows[k]) for k in shards])
        read = read[self.chosen[read]]
        # A row is given out at most a window later, or earlier, than it is read.
        places = np.arange(len(read)) + generator.random(len(read)) * self.window
        return shards, read[np.argsort(places, kind="stable")], read

    def read(
        self, wanted: np.ndarray, seed: int, epoch: int, stop: threading.Event | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Stream the `wanted` rows (bool (R,)) in the order of reading: row number and encoded image.

        Rows that are not wanted are passed over without being decoded, shards without such rows are not opened. The
        stream ends early if `stop` is set while it waits to try again.

        Raises:
            DataLost: a shard can't be read to its end, or has other rows, also after some attempts.
        """
        wanted, stop = wanted.copy(), stop or threading.Event()
        for shard in self._orders(seed, epoch)[0]:
            here = slice(self.starts[shard], self.starts[shard] + self.shard_rows[shard])
            if wanted[here].any():
                yield from self._read_on(int(shard), here, wanted, stop)
            if stop.is_set():
                return

    def _read_on(self, shard: int, here: slice, wanted: np.ndarray, stop: threading.Event) -> Iterator[tuple[int, Any]]:
        """The wanted rows of a shard, its rows `here`, with as many attempts as it takes while rows come."""
        pauses = iter(_PAUSES_SECONDS)
        while not stop.is_set():
            try:
                for number, image in self._read_shard(shard, here.start, wanted):
                    wanted[number] = False
                    pauses = iter(_PAUSES_SECONDS)
                    yield number, image
                if wanted[here].any():
                    raise OSError(f"it has fewer than its {self.shard_rows[shard]} rows")
                return
            except _OUR_MISTAKES:
                raise
            except Exception as error:  # files, archives and networks fail in many ways
                pause = next(pauses, None)
                if pause is None:
                    raise DataLost(
                        f"--dataset {self.source.name}: shard {shard} of {self.split} can no longer be read"
                        f" ({first_line(error)}); restore the data and go on with --resume auto."
                    ) from None
            stop.wait(pause)

    def _read_shard(self, shard: int, first: int, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        end = first + int(self.shard_rows[shard])
        for values in self.shards.read(shard, _ROWS_AT_A_TIME):
            if first + len(values) > end:
                raise OSError(f"it has more than its {self.shard_rows[shard]} rows")
            here = np.flatnonzero(wanted[first : first + len(values)])
            if len(here):
                for row, image in zip(here, _in_memory(values.take(here)), strict=True):
                    yield first + int(row), image
            first += len(values)

    def decode(self, number: int, image: Any) -> np.ndarray:
        """An encoded image as uint8 (S,S,3).

        Raises:
            UsageError: it is damaged; the message names row and file.
        """
        return to_pixels(decode_image(image, partial(self.source.place, self.split, number)), self.size)

    def first_picture(self) -> Image.Image | np.ndarray | None:
        """A sound image as large as it is; None if the first 16 are damaged, which is for those who read all."""
        for number, image in self.read(np.arange(len(self.all_labels)) < 16, seed=0, epoch=0):
            with suppress(UsageError):
                return decode_image(image, partial(self.source.place, self.split, number))
        return None

    def take_resident(self, numbers: np.ndarray) -> ResidentSet:
        """Rows of the split (int64, sorted), decoded into memory, in the order of their numbers: val.

        Raises:
            UsageError: one can't be read, or is damaged; val is the same in every run, so none is left out.
        """
        wanted = np.zeros(len(self.all_labels), dtype=bool)
        wanted[numbers] = True
        images = np.empty((len(numbers), self.size, self.size, 3), dtype=np.uint8)
        for number, image in self.read(wanted, seed=0, epoch=0):
            try:
                images[np.searchsorted(numbers, number)] = self.decode(number, image)
            except UsageError as error:
                raise UsageError(f"{error} It is in val, which skips none.") from None
        return ResidentSet(
            torch.from_numpy(images), torch.from_numpy(self.all_labels[numbers]), torch.from_numpy(numbers)
        )


def open_stream(source: Source, split: str, config: DataConfig) -> StreamSet:
    """All rows of a split as a stream; its labels come from the cache, or are read once.

    Raises:
        UsageError: the data are damaged or empty, a label is no class, or the cache cannot be written.
    """
    image = source.columns.image
    shards = Shards(source.tables[split].stream, image)
    try:
        num_shards = len(shards)
    except Exception as error:  # files fail in many ways
        raise UsageError(
            f"--dataset {source.name}: {split} cannot be read ({first_line(error)}); copy the files again."
        ) from None
    labels, shard_rows = label_index(source, split, config, num_shards)
    everything = np.ones(len(labels), dtype=bool)
    return StreamSet(source, split, shards, labels, shard_rows, everything, config.pixels, config.shuffle_window)


def _in_memory(values: pa.ChunkedArray) -> list[Any]:
    """Images as they wait to be decoded: encoded files with their bytes, arrays as uint8 (H,W,3).

    Raises:
        OSError: a file cannot be read.
    """
    import pyarrow as pa

    if isinstance(values.type, pa.ExtensionType):
        # As nested lists, which Arrow would make of them, they take thirty times as much memory.
        if not values.null_count:
            return [np.array(image, dtype=np.uint8) for image in values.combine_chunks().to_numpy(zero_copy_only=False)]
        return [None if image is None else np.array(image, dtype=np.uint8) for image in values.to_pylist()]
    rows = values.to_pylist()
    if not any(_is_elsewhere(row) for row in rows):
        return rows
    with ThreadPool(_FILES_AT_ONCE) as pool:  # whose threads, unlike an executor's, a program's end does not wait for
        return list(pool.map(lambda row: _with_bytes(row) if _is_elsewhere(row) else row, rows))


def _is_elsewhere(row: Any) -> bool:
    return isinstance(row, dict) and row["bytes"] is None and bool(row["path"])


def _with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "bytes": image_bytes(Path(row["path"]))}
