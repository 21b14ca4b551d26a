"""When to save between epochs and when to leave, by this process's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cifar_dist.argument_types import seconds_of
from cifar_dist.config import RunConfig
from cifar_dist.recovery.stop_request import STARTED

_FIRST_RESERVE = 0.05, 60.0  # until a checkpoint was timed: this share of the limit, this many seconds at most


class CheckpointTimer:
    """Follows ``--checkpoint-every`` and ``--time-limit``.

    Args:
        config: the run's settings.
    """

    def __init__(self, config: RunConfig):
        every = config.checkpoint_every
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._limit = None if config.time_limit is None else seconds_of(config.time_limit)
        self._shown = config.time_limit
        self._saved = time.monotonic()
        self._longest_step = self._longest_save = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: the longest so far tells how early to leave."""
        began = time.monotonic()
        yield
        self._longest_step = max(self._longest_step, time.monotonic() - began)

    def save_begins(self) -> None:
        """The training is being copied: the next checkpoint is due a full interval from now."""
        self._saved = time.monotonic()

    def save_took(self, seconds: float) -> None:
        """A checkpoint took so long to copy, write and commit: the longest so far tells how early to leave."""
        self._longest_save = max(self._longest_save, seconds)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by the number of steps."""
        return self._steps is not None and step % self._steps == 0

    @property
    def wants_save(self) -> bool:
        """Whether a checkpoint is due by the clock; processes must agree on it."""
        return self._seconds is not None and time.monotonic() - self._saved >= self._seconds

    def time_is_up(self) -> str:
        """Why the run must leave now, if it is to save before its time limit; or an empty string."""
        if self._limit is None:
            return ""
        share, most = _FIRST_RESERVE
        reserve = 3 * self._longest_save or min(share * self._limit, most)
        left = STARTED + self._limit - time.monotonic()
        return f"--time-limit {self._shown}" if left < reserve + 2 * self._longest_step else ""
