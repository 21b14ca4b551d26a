"""One column of a stream, in parts that are read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset


class Shards:
    """The parts (files, row groups, runs of images) of one column of a stream.

    All files are looked at once, when a part or their number is first asked for; then a part needs its own only.
    """

    def __init__(self, stream: IterableDataset, column: str) -> None:
        self._plain, self._column = stream, column
        self._groups: dict[int, IterableDataset] = {}

    @cached_property
    def _stream(self) -> IterableDataset:
        return self._plain.reshard().select_columns([self._column]).with_format("arrow")

    def __len__(self) -> int:
        return self._stream.num_shards

    def read(self, shard: int, rows: int) -> Iterator[pa.ChunkedArray]:
        """The values of part `shard`, `rows` at a time."""
        # To pick one part, `datasets` goes through all of them: by way of a group it goes through few.
        groups = math.isqrt(len(self))
        number = shard % groups
        if number not in self._groups:
            self._groups[number] = self._stream.shard(groups, number, contiguous=False)
        group = self._groups[number]
        for table in group.shard(group.num_shards, shard // groups).iter(rows):
            yield table.column(self._column)
