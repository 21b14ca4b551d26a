"""Rows of `benchmarks.gpu` in processes of their own: several get ready at once, one at a time is measured."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any

from benchmarks.gpu_rows import Row

Filled = tuple[Row, dict[str, Any]]
Measure = Callable[[Row, Callable[[], None]], Filled]


def work(measure: Measure, row: Row, parent: Connection) -> None:
    """What the process of a row does: say that it is ready, wait for the word, and send what was measured."""
    os.setsid()  # its workers and compilers are stopped with it

    def turn() -> None:
        parent.send("ready")
        parent.recv()

    parent.send(measure(row, turn))


@dataclass
class Turns:
    """Who is measured when.

    Attributes:
        measure: fills in a row, in a process of its own, calling what it is given when it is ready.
        end: by time.monotonic(), when all must be done.
    """

    measure: Measure
    end: float
    _turn: Lock = field(default_factory=Lock)
    _processes: set[BaseProcess] = field(default_factory=set)

    def take(self, rows: Sequence[Row], together: int) -> Iterator[tuple[int, Filled]]:
        """Measure all rows, of which so many are there at a time; each with its number, as they are done."""
        with ThreadPoolExecutor(together) as pool:
            numbers = {pool.submit(self._one, row): number for number, row in enumerate(rows)}
            try:
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            finally:  # also when the user interrupts it
                self.end = 0.0
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._processes):
                    send_signal(process, signal.SIGKILL)

    def _one(self, row: Row) -> Filled:
        """A row filled in, or with the reason why not."""
        with self._turn:  # nothing starts beside what is measured
            if time.monotonic() > self.end:
                row.error = "no time left"
                return row, {}
            spawn = multiprocessing.get_context("spawn")
            here, there = spawn.Pipe()
            process = spawn.Process(target=work, args=(self.measure, row, there))
            process.start()
            there.close()
            self._processes.add(process)
        try:
            said = self._receive(here)
            if said == "ready":
                with self._turn:
                    said = self.alone(process, here)
            return said
        except TimeoutError:
            row.error = "not done in time"
        except (EOFError, OSError):
            row.error = "its process died"
        finally:
            self._processes.discard(process)
            send_signal(process, signal.SIGKILL)
            process.join()
        return row, {}

    def alone(self, process: BaseProcess, here: Connection) -> Any:
        """What a process says that is told to go on, while all others are stopped."""
        others = self._processes - {process}
        for other in others:
            send_signal(other, signal.SIGSTOP)
        try:
            here.send("go")
            return self._receive(here)
        finally:
            for other in others:
                send_signal(other, signal.SIGCONT)

    def _receive(self, here: Connection) -> Any:
        if not here.poll(max(0.0, self.end - time.monotonic())):
            raise TimeoutError
        return here.recv()


def send_signal(process: BaseProcess, number: int) -> None:
    """To a process and what it started."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(process.pid or 0, number)
        except ProcessLookupError:  # it has no session yet
            os.kill(process.pid or 0, number)
