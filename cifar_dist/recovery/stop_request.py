"""Signals that ask a training to stop, noted from the first line of the program on.

Nothing but the standard library is imported here: `listen` comes before the seconds in which torch is imported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: of a terminal that is closed
STARTED = time.monotonic()  # nearly the start of the process: what a time limit counts from

_noted: str | None = None


def listen(note: Callable[[int, FrameType | None], None] | None = None) -> None:
    """Note these signals from now on instead of dying of them, here or by `note`; here a SIGINT after any means now.

    A SIGHUP that is ignored, as nohup has it, stays ignored.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note or _note)


def ignore() -> None:
    """Ignore these signals from now on: all is saved, and while Python winds up they would kill it with a status that
    says failure."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Processes that are started meanwhile do not hear these signals, which SLURM and a terminal send to them, too.

    A helper that ends before its work is done would end the training with an error, and without a checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, _: FrameType | None) -> None:
    global _noted
    if _noted is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    if _noted is None:
        _noted = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            again = "; once more stops at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # what read the output may have died of the same Ctrl-C
                os.write(2, f"\n{_noted}: stops after this step, with a checkpoint{again}\n".encode())


class StopRequest:
    """Why a run is to stop: a signal to this process, or its time is up.

    Args:
        time_is_up: says why there is no more time, or an empty string.
    """

    def __init__(self, time_is_up: Callable[[], str] = lambda: ""):
        self._time_is_up = time_is_up
        self._before: dict[signal.Signals, object] = {}
        self._reason = ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        listen()
        return self

    def __exit__(self, *_: object) -> None:
        global _noted
        _noted = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def reason(self) -> str:
        """The first signal's name, or what `time_is_up` said first; empty while the run may go on."""
        self._reason = self._reason or _noted or self._time_is_up()
        return self._reason
