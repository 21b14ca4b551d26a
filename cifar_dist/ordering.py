"""Which samples form global batch k of epoch e: a pure function of (seed, epoch, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of one optimizer step, over all processes.

    Attributes:
        rows: int64 (batch_size,) positions in the training set.
        real: bool (batch_size,), False where an epoch's last batch is filled up. A filled row has
            weight 0 in the loss and in every count, so each row counts exactly once an epoch and
            all batches have one shape.
    """

    rows: np.ndarray
    real: np.ndarray


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: an int64 permutation of ``range(num_samples)``."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_samples)
    order.setflags(write=False)
    return order


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Batches that cover every row once, the last one perhaps filled up."""
    return -(-num_samples // batch_size)


def global_batch(num_samples: int, batch_size: int, seed: int, step: int) -> GlobalBatch:
    """The batch of optimizer step `step` (counted from 0 over the whole run)."""
    epoch, index = divmod(step, steps_per_epoch(num_samples, batch_size))
    order = epoch_order(num_samples, seed, epoch)
    positions = np.arange(index * batch_size, (index + 1) * batch_size)
    return GlobalBatch(rows=order[positions % num_samples], real=positions < num_samples)


def fill_up(order: np.ndarray, batch_size: int, index: int) -> GlobalBatch:
    """Batch number `index` of an epoch's `order`; the last one is filled up with rows of its own."""
    first = index * batch_size
    rows = order[first : first + batch_size]
    return GlobalBatch(rows=np.resize(rows, batch_size), real=np.arange(batch_size) < len(rows))


def micro_batch_slice(process: int, num_processes: int, micro: int, micro_batch_size: int) -> slice:
    """The part of a global batch that `process` holds as its micro-batch number `micro`."""
    start = (micro * num_processes + process) * micro_batch_size
    return slice(start, start + micro_batch_size)
