"""Batches of a set that is streamed: read and decoded ahead of the training, in a thread."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cifar_dist.config import Config, InputConfig
from cifar_dist.data.resident import ResidentSet
from cifar_dist.data.stream import StreamSet
from cifar_dist.distributed.node import own_cores
from cifar_dist.errors import UsageError
from cifar_dist.ordering import GlobalBatch, fill_up
from cifar_dist.parallel import Replicated
from cifar_dist.plan import Plan
from cifar_dist.training.batches import Batches, Part, ResidentBatches

_STEPS_AHEAD = 3
_CLOSE_SECONDS = 5.0
_ASK_EVERY_SECONDS = 1.0  # whether to stop, while waiting for rows
_PATIENCE_SECONDS = 5.0  # with rows that do not come, once asked to stop


@dataclass(frozen=True)
class _Step:
    """This process's decoded rows of a step, micro-batch after micro-batch."""

    step: int
    rows: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    weights: np.ndarray


class StreamBatches(Batches):
    """Batches of a stream, from any step on.

    Args:
        data: the training set.
        stop: whether this process was asked to stop; rows that do not come are then given up, and `lost` is "".
        others: see `Batches`.
    """

    def __init__(
        self,
        data: StreamSet,
        config: Config,
        plan: Plan,
        input: InputConfig,
        parallel: Replicated,
        stop: Callable[[], bool] = lambda: False,
    ):
        super().__init__(config, plan, input, parallel)
        self._asked_to_stop = stop
        self._data, self._allowed = data, config.data.skip_corrupt
        self._queue: queue.Queue[_Step | Exception] = queue.Queue(_STEPS_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next, self._waited = -1, 0.0
        self._damaged, self._told, self._lock = set[int](), 0, threading.Lock()

    def _batch(self, step: int) -> GlobalBatch:
        epoch, index = divmod(step, self._plan.steps_per_epoch)
        return fill_up(self._data.order(self._seed, epoch), self._plan.batch_size, index)

    def sample_ids(self, step: int) -> list[int]:
        """Ids of the rows of step `step`'s global batch, over all processes."""
        batch = self._batch(step)
        return batch.rows[batch.real].tolist()

    def _own(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of this process in `step`, and their weights."""
        batch = self._batch(step)
        place = np.concatenate([np.r_[self._slice(micro)] for micro in range(self._plan.grad_accum_steps)])
        return batch.rows[place], (batch.real[place] / batch.real.sum()).astype(np.float32)

    def _is_there(self, step: int) -> bool:
        return step == self._next and not self._queue.empty()

    def _parts(self, step: int) -> Iterator[Part]:
        found, size = self._fetch(step), self._plan.micro_batch_size
        tensors = (torch.from_numpy(array) for array in (found.images, found.labels, found.rows, found.weights))
        for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            images, labels, weights = (parts[k].to(self._device, non_blocking=True) for k in (0, 1, 3))
            yield Part(images, labels, parts[2], weights)

    def _fetch(self, step: int) -> _Step:
        """The decoded step, as soon as it is there."""
        if step != self._next:
            self._start(step)
        self._next = step + 1
        began = time.perf_counter()
        found = None if self.lost is not None else self._wait()
        self._waited += time.perf_counter() - began
        if isinstance(found, UsageError):
            self.lost = str(found)
        elif isinstance(found, Exception):
            raise found
        if self.lost is not None:
            rows, weights = self._own(step)
            images = np.stack([self._blank] * len(rows))
            return _Step(step, rows, self._data.all_labels[rows], images, np.zeros_like(weights))
        assert isinstance(found, _Step)
        assert found.step == step
        return found

    def _wait(self) -> _Step | Exception | None:
        """What is read next, or None, with `lost` set, if that takes long after this process was asked to stop."""
        patience = _PATIENCE_SECONDS
        while patience > 0:
            with suppress(queue.Empty):
                return self._queue.get(timeout=_ASK_EVERY_SECONDS)
            patience -= _ASK_EVERY_SECONDS * self._asked_to_stop()
        self.lost = ""
        return None

    def _start(self, step: int) -> None:
        """Read ahead from `step` on."""
        self.close()
        self._queue, self._stop = queue.Queue(_STEPS_AHEAD), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(step, self._queue, self._stop), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading ahead; a file that hangs is not waited for."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(_CLOSE_SECONDS)
            self._thread = None

    def take_waits(self) -> list[float]:
        """Seconds that steps waited for data, and images found damaged and skipped for the first time, since asked."""
        damaged = len(self._damaged)
        found, self._waited, self._told = [self._waited, float(damaged - self._told)], 0.0, damaged
        return found

    def _run(self, step: int, ready: queue.Queue[_Step | Exception], stop: threading.Event) -> None:
        try:
            with ThreadPoolExecutor(own_cores()) as pool:
                for decoded in self._decoded(step, pool, stop):
                    if not _put(ready, decoded, stop):
                        return
        except Exception as error:
            _put(ready, error, stop)

    def _decoded(self, step: int, pool: ThreadPoolExecutor, stop: threading.Event) -> Iterator[_Step]:
        """This process's decoded rows from `step` to the last one, or until told to stop."""
        plan = self._plan
        while step < plan.total_steps:
            epoch = step // plan.steps_per_epoch
            steps = range(step, min((epoch + 1) * plan.steps_per_epoch, plan.total_steps))
            wanted = np.zeros(len(self._data.all_labels), dtype=bool)
            for own in steps:
                wanted[self._own(own)[0]] = True
            stream = self._data.read(wanted, self._seed, epoch, stop)
            waiting: dict[int, Any] = {}
            for step in steps:
                rows, weights = self._own(step)
                missing = set(rows.tolist()) - waiting.keys()
                while missing:
                    found = None if stop.is_set() else next(stream, None)
                    if found is None:
                        assert stop.is_set(), f"rows {missing} were not read"
                        return
                    waiting[found[0]] = found[1]
                    missing.discard(found[0])
                yield self._decoded_step(step, rows, weights, waiting, pool)
            step += 1

    def _decoded_step(
        self, step: int, rows: np.ndarray, weights: np.ndarray, waiting: dict[int, Any], pool: ThreadPoolExecutor
    ) -> _Step:
        """Decode a step's rows, which are taken out of those `waiting`; damaged ones that are skipped get weight 0."""
        each, places = np.unique(rows, return_inverse=True)  # an epoch's last batch holds some rows twice
        real = np.isin(each, rows[weights > 0])
        encoded = [waiting.pop(row) for row in each.tolist()]
        images = list(pool.map(self._decode, each.tolist(), encoded, real.tolist()))
        sound = np.array([image is not None for image in images])[places]
        shown = np.arange(len(rows))
        if self._mixing is not None:  # its neighbour, which counts, would be mixed with an empty image
            shown = np.where(sound, shown, shown ^ 1)
        pixels = np.stack([self._blank if image is None else image for image in images])[places[shown]]
        return _Step(step, rows, self._data.all_labels[rows[shown]], pixels, weights * sound)

    @property
    def _blank(self) -> np.ndarray:
        return np.zeros((self._data.size, self._data.size, 3), dtype=np.uint8)

    def _decode(self, number: int, image: Any, counts: bool) -> np.ndarray | None:
        """The decoded image, or None if it is damaged and may be skipped, or `counts` for nothing."""
        try:
            return self._data.decode(number, image)
        except UsageError as error:
            if counts:
                self._note_damage(number, error)
            return None

    def _note_damage(self, number: int, error: UsageError) -> None:
        """Remember a damaged row; a row that comes again, in another epoch, is none more."""
        with self._lock:
            known = number in self._damaged
            self._damaged.add(number)
            too_many = len(self._damaged) > self._allowed
        if too_many:
            raise UsageError(
                f"{error} --skip-corrupt {self._allowed} allows no more: with a larger one --resume auto goes on; with"
                " images replaced or removed it is another data set, for a new run."
            ) from None
        if not known:
            with suppress(OSError):  # a terminal may have been closed
                print(f"skipped: {error}", file=sys.stderr, flush=True)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Hand over an item as soon as there is room; whether it was taken before the order to stop."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def make_batches(
    data: ResidentSet | StreamSet,
    config: Config,
    plan: Plan,
    input: InputConfig,
    parallel: Replicated,
    stop: Callable[[], bool] = lambda: False,
) -> Batches:
    """Batches of `data`, however it is held; see `Batches` and `StreamBatches`."""
    if isinstance(data, StreamSet):
        return StreamBatches(data, config, plan, input, parallel, stop)
    return ResidentBatches(data, config, plan, input, parallel)
