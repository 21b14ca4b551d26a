"""Saving a run's checkpoints: training stands still for a copy, and goes on while that is written.

A thread of each process writes its files. Once all of them are durable, the processes commit together between two
steps, or before an evaluation; until then the checkpoint does not exist, and the ones before it stay.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from accelerate import Accelerator
from safetensors import SafetensorError

from cifar_dist.distributed.group import gather, on_main
from cifar_dist.errors import Diverged, UsageError, first_line
from cifar_dist.recovery import checkpoint, store
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.store import Files
from cifar_dist.recovery.train_state import TrainState

T = TypeVar("T")
Attempt = tuple[T | None, str]  # what some work returned, and why it failed at the file system or an empty string


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that has no name yet: its folder, what is being written into it, and the seconds to copy it."""

    step: int
    best: bool
    aside: Path
    files: Future[Attempt[tuple[Files, float]]]
    copy_seconds: float


class Saver:
    """Saves a training. Every process has one, and all call its methods together; `writing` each asks for itself.

    As a context it commits at its end what is being written. When that is an exception's, of several processes none
    can know whether the others come; then the checkpoint is lost, as it is when a process is killed.

    Args:
        run_dir: the run's folder.
        accelerator: of this process.
        timer: is told when a checkpoint begins and what it took.
        keep_last: how many of the newest are kept; the best one always is.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator, timer: CheckpointTimer, keep_last: int = 2):
        self._run_dir, self._root, self._keep_last = run_dir, run_dir / "checkpoints", keep_last
        self._accelerator, self._timer = accelerator, timer
        self._begun: _Begun | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._accelerator.num_processes == 1 and issubclass(kind, Exception):
            with suppress(UsageError):
                self.finish()

    @property
    def writing(self) -> bool:
        """Whether files of this process are not durable yet."""
        return self._begun is not None and not self._begun.files.done()

    def save(self, trained: Trained, state: TrainState, best: bool = False) -> None:
        """Copy the training and begin to write the copy, once the checkpoint before is committed.

        Raises:
            Diverged: a weight is not finite; nothing is written.
            UsageError: the file system refused.
        """
        self.finish()
        if not best and on_main(self._accelerator, lambda: self._holds(state)):
            return
        self._timer.save_begins()
        began = time.monotonic()
        contents = checkpoint.contents(trained, state)
        if not on_main(self._accelerator, lambda: contents.finite):
            cure = "start anew with a lower --lr or --clip-grad"
            raise Diverged(f"weights are not finite after step {state.step}; {cure}.")
        aside, failure = on_main(self._accelerator, lambda: _attempt(lambda: store.begin(self._root, state.step)))
        if aside is None:
            raise self._refused(state.step, failure)
        copied = time.monotonic() - began
        self._begun = _Begun(state.step, best, aside, beside(lambda: _attempt(lambda: _timed(contents, aside))), copied)

    def finish(self) -> None:
        """Wait for what is being written and commit it; then drop all but the newest ones and the best.

        Raises:
            UsageError: the file system refused on some process (full, read-only), on all of them alike; the
                checkpoints before it are intact.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        written = gather(self._accelerator, begun.files.result())
        began, failure = time.monotonic(), next((failure for _, failure in written if failure), "")
        found = [done for done, _ in written if done is not None]
        if not failure:
            files = {name: facts for of_process, _ in found for name, facts in of_process.items()}
            _, failure = on_main(self._accelerator, lambda: _attempt(lambda: self._commit(begun, files)))
        if failure:
            on_main(self._accelerator, lambda: shutil.rmtree(begun.aside, ignore_errors=True))
            raise self._refused(begun.step, failure)
        longest = max(seconds for _, seconds in found)
        self._timer.save_took(begun.copy_seconds + longest + time.monotonic() - began)

    def _holds(self, state: TrainState) -> bool:
        last = store.latest_manifest(self._root)
        return last is not None and last.step == state.step and checkpoint.state_of(last) == state

    def _commit(self, begun: _Begun, files: Files) -> None:
        facts: dict[str, Any] = {"step": begun.step, "num_processes": self._accelerator.num_processes, "files": files}
        stored = store.commit(self._root, begun.aside, begun.best, facts)
        store.point(self._root, stored)
        store.prune(self._root, self._keep_last, stored.best_step)

    def _refused(self, step: int, failure: str) -> UsageError:
        return UsageError(
            f"--run-dir {self._run_dir}: the checkpoint of step {step} could not be saved ({failure}); older ones are"
            " intact."
        )


def beside(work: Callable[[], T]) -> Future[T]:
    """What `work` will return, from a thread that does not keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _timed(contents: checkpoint.Contents, folder: Path) -> tuple[Files, float]:
    """Write the files; also the seconds that took."""
    began = time.monotonic()
    return contents.write(folder), time.monotonic() - began


def _attempt(work: Callable[[], T]) -> Attempt[T]:
    try:
        return work(), ""
    except (OSError, SafetensorError, MemoryError) as error:
        return None, first_line(error)
