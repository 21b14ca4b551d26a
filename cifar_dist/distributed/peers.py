"""The other processes of the job, when one has failed: which of them have gone, and ending those that hang."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

Peer = tuple[str, int]  # where process ids are its own, process id

_peers: dict[int, Peer] = {}
place = ""  # what this process does, such as "step 7"


def me() -> Peer:
    """This process, for the others: containers may have one name, and each processes of its own."""
    machine = platform.node()
    with suppress(OSError):
        machine += Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return machine, os.getpid()


def remember(found: list[Peer]) -> None:
    """Note what every process, by rank, said of itself."""
    _peers.clear()
    _peers.update(enumerate(found))


def now_at(what: str) -> None:
    """Note what this process does now, for a message about its failure."""
    global place
    place = what


def _here() -> dict[int, int]:
    """Process ids of the other ranks on this machine."""
    machine, mine = me()
    return {rank: pid for rank, (where, pid) in _peers.items() if where == machine and pid != mine}


def _state(pid: int) -> str:
    """The kernel's letter for a process: R or S if it lives, T if it is stopped; empty if it has gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return "" if state in "ZX" else state


def absent() -> str:
    """Which ranks on this machine have gone or are stopped: ``rank 1 (process 4711) has gone``."""
    states = {rank: (pid, _state(pid)) for rank, pid in _here().items()}
    said = [
        f"rank {rank} (process {pid}) {'is stopped' if state == 'T' else 'has gone'}"
        for rank, (pid, state) in states.items()
        if state in ("", "T")
    ]
    return ", ".join(said)


def end_those_left(grace_seconds: float) -> None:
    """See to it that no rank on this machine outlives this failure by more than `grace_seconds`.

    A launcher would wait half a minute for a process that hangs. A program of its own waits for them, since the others
    learn of the failure by this process's end.
    """
    if others := _here():
        ranks = [f"{rank}:{pid}" for rank, pid in others.items()]
        started = f"{Path(sys.argv[0]).name}: "
        where = f" in {place}" if place else ""
        command = [sys.executable, "-I", "-S", __file__, str(grace_seconds), started, where, *ranks]
        with suppress(OSError):
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait_and_kill(grace_seconds: float, started: str, where: str, others: dict[int, int]) -> None:
    limit = time.monotonic() + grace_seconds
    while (left := {rank: pid for rank, pid in others.items() if _state(pid)}) and time.monotonic() < limit:
        time.sleep(0.1)
    for rank, pid in left.items():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            print(f"{started}rank {rank} (process {pid}) did not answer{where} and was killed", file=sys.stderr)


if __name__ == "__main__":
    pairs = (pair.split(":") for pair in sys.argv[4:])
    _wait_and_kill(float(sys.argv[1]), sys.argv[2], sys.argv[3], {int(rank): int(pid) for rank, pid in pairs})
