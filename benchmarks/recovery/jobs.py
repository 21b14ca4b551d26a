"""Trainings that can be killed: forked from a process that has imported everything, or real ones under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from accelerate.state import AcceleratorState, GradientState

import train  # noqa: F401  what every forked training has imported already

ROOT = Path(__file__).resolve().parents[2]
_TOKEN = "CIFAR_DIST_TRIAL"
_FORK = multiprocessing.get_context("fork")


def replace_everywhere(name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the place of the function `name` wherever a module of the project holds it."""
    module, _, attribute = name.rpartition(".")
    original = getattr(import_module(module), attribute)
    for other in list(sys.modules.values()):
        if other.__name__.partition(".")[0] in ("cifar_dist", "train") and vars(other).get(attribute) is original:
            setattr(other, attribute, make(original))


def run_training(flags: list[str]) -> None:
    """All of train.py as a program, in this process."""
    sys.argv, sys.path[0] = ["train.py", *flags], str(ROOT)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def _rank(work: Callable[[], None], rank: int, count: int, port: int, said: Path) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr, status = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1), 0
    try:
        work()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Job:
    """A training that runs: forked from this process, or real processes under their launcher.

    Args:
        flags: of train.py.
        count: processes.
        said: the file that takes what they print.
        real: ``python train.py`` or ``torchrun``, instead of forks that have imported everything already.
        hook: called with the rank, in each forked process before it begins.
        work: what forked processes do instead of train.py.
        command: what real processes run instead of train.py.
    """

    def __init__(  # noqa: PLR0913
        self,
        flags: list[str],
        count: int,
        said: Path,
        *,
        real: bool = False,
        hook: Callable[[int], None] | None = None,
        work: Callable[[], None] | None = None,
        command: tuple[str, ...] = ("train.py",),
    ):
        self.count, self.said, self.real, self._token = count, said, real, uuid.uuid4().hex
        self._forked: list[Any] = []
        if real:
            module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            line = [sys.executable, *(module if count > 1 else []), *command, *flags]
            environment = {**os.environ, _TOKEN: self._token}
            with said.open("a") as file:
                self._launcher = subprocess.Popen(
                    line, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                )
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(count):

            def begin(rank: int = rank) -> None:
                if hook is not None:
                    hook(rank)
                (work or (lambda: run_training(flags)))()

            self._forked.append(_FORK.Process(target=_rank, args=(begin, rank, count, port, said)))
            self._forked[-1].start()

    def pids(self) -> list[int]:
        """All live processes of the job, the launcher's first."""
        if not self.real:
            return [process.pid for process in self._forked if process.is_alive()]
        self._launcher.poll()
        return [self._launcher.pid] * (self._launcher.returncode is None) + _marked(self._token, self._launcher.pid)

    def ranks(self) -> list[int]:
        """The live processes that train."""
        found = self.pids()
        return found[1:] if self.real and self.count > 1 and found[:1] == [self._launcher.pid] else found

    def send(self, number: int, target: str, victim: int = 0) -> None:
        """Send a signal to ``one`` rank (the `victim`-th that lives), ``all`` processes, or the ``launcher``."""
        found = {"one": self.ranks() or self.pids(), "launcher": self.pids()[:1]}.get(target, self.pids())
        for pid in [found[victim % len(found)]] if target == "one" and found else found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def launcher_lives(self) -> bool:
        """Whether the launcher of real processes has not ended yet."""
        return self._launcher.poll() is None

    def wait(self, seconds: float) -> list[int] | None:
        """Exit statuses (the launcher's alone if there is one), or None if processes are left after that time."""
        limit = time.monotonic() + seconds
        while True:
            if self.real and self._launcher.poll() is not None and not self.pids():
                return [self._launcher.returncode]
            if not self.real and not any(process.is_alive() for process in self._forked):
                return [process.exitcode for process in self._forked]
            if time.monotonic() > limit:
                return None
            time.sleep(0.02 if not self.real else 0.1)

    def end(self) -> None:
        """Kill what is left."""
        while self.wait(0) is None:
            self.send(signal.SIGKILL, "all")
            self.wait(0.5)


def _marked(token: str, launcher: int) -> list[int]:
    """Live processes that a job started, wherever they hang in the tree, but its launcher."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != launcher and process.environ().get(_TOKEN) == token
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)
