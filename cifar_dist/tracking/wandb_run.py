"""The run's page on Weights & Biases: one run per run folder, whatever the number of starts.

``log.jsonl`` is the truth; W&B is a copy for comparing runs, and nothing that happens to it changes or ends a training.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Lock, Thread
from typing import Any

from tqdm.auto import tqdm

from cifar_dist.config import Config
from cifar_dist.durable import replace_text
from cifar_dist.errors import UsageError, first_line
from cifar_dist.page import Table

INIT_SECONDS = 20.0  # for W&B's server to take the run, before it is kept offline
FINISH_SECONDS = 30.0  # that the end of a run waits for W&B; more than INIT_SECONDS
QUEUE_LENGTH = 10_000  # records that W&B may be behind


def _asked(config: Config) -> str | None:
    return config.run.wandb or os.environ.get("WANDB_MODE") or None


def wandb_mode(config: Config) -> str:
    """What ``--wandb`` asks for; by default online where a key is at hand, else offline. Nothing is sent.

    Raises:
        UsageError: ``--wandb online`` was asked for but there is no key, or no valid one; or WANDB_MODE is no mode.
    """
    return _mode(config)[0]


def _mode(config: Config) -> tuple[str, str]:
    """`wandb_mode`, and what went wrong where a login that should have worked did not."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # some, W&B would take for a value, and refuse
    asked = _asked(config)
    if asked in ("offline", "disabled"):
        return asked, ""
    if asked not in (None, "online"):  # --wandb knows its choices, the environment does not
        raise UsageError(f"WANDB_MODE {asked}: no such mode; take online, offline or disabled.")
    try:
        import wandb
    except Exception as error:
        return "offline", first_line(error)
    no_key, broken = "", ""
    try:
        no_key = "" if wandb.login(prompt=False, verify=False) else "no API key is configured"
    except wandb.Error as error:
        no_key = broken = first_line(error)
    except Exception as error:  # no fault of the key's
        broken = first_line(error)
    if no_key and asked:
        raise UsageError(f"--wandb {asked}: {no_key}; run wandb login, or take --wandb offline.")
    return "offline" if no_key or broken else "online", broken


class Mirror:
    """W&B's copy of a run, kept by a thread of its own, so that W&B can neither stop nor slow what it copies.

    A call of W&B that fails, a queue that overflows or an end that takes too long is one warning on stderr, and W&B is
    left out from there. Nothing here raises.

    Args:
        run_dir: the run's folder; W&B's files live in it.
        config: shown in W&B; its `wandb` says whether and how there is a copy.
    """

    def __init__(self, run_dir: Path, config: Config):
        self._run_dir, self._config = run_dir, config
        self._queue: Queue[Callable[[Any], None] | None] = Queue(QUEUE_LENGTH)
        self._left_out, self._offline = _asked(config) == "disabled", False
        self._warned, self._lock = False, Lock()
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        if not self._left_out:
            self._thread.start()

    def log(self, record: dict[str, Any], step: int) -> None:
        """Add a record of `step`; it must not change afterwards."""
        self.do(lambda run: run.log(record, step=step))

    def do(self, action: Callable[[Any], None] | None) -> None:
        """Call `action` with W&B's run, after everything before it; None finishes the run."""
        if self._left_out:
            return
        try:
            self._queue.put_nowait(action)
        except Full:
            self._leave_out(f"it is {QUEUE_LENGTH:,} records behind")

    def close(self) -> str:
        """Finish the run, for `FINISH_SECONDS` at most; what to do about one kept offline, a line, or nothing."""
        self.do(None)
        if not self._left_out:
            self._thread.join(FINISH_SECONDS)
            if self._thread.is_alive():
                self._leave_out(f"it does not finish within {FINISH_SECONDS:g} s")
        if not self._offline:
            return ""
        part = " in part" if self._left_out else ""
        return f"wandb       kept offline{part}; {_sync_command(self._run_dir)} sends it"

    def _work(self) -> None:
        try:
            run = self._start()
            while not self._left_out and (action := self._queue.get()) is not None:
                action(run)
            if not self._left_out:
                run.finish()
        except Exception as error:  # whatever it is, it is W&B's
            self._leave_out(first_line(error))

    def _start(self) -> Any:
        """Open the run's W&B run (the same one again after a resume); offline where online takes too long."""
        mode, problem = _mode(self._config)
        if mode == "online":
            try:
                return _init(self._run_dir, self._config, "online")
            except Exception as error:  # no network, a key that is refused, a server that is ill
                problem = first_line(error)
                _forget_attempt()
        run = _init(self._run_dir, self._config, "offline")
        self._offline = True
        if problem:
            command = _sync_command(self._run_dir)
            self._warn(f"W&B does not take the run ({problem}); it is kept offline, to be sent by {command}")
        return run

    def _leave_out(self, reason: str) -> None:
        self._warn(f"W&B is left out from here on ({reason}); log.jsonl has everything.")
        self._left_out = True  # from here on the end of the program does not wait for the thread that says so
        with suppress(Exception):
            _do_not_wait_at_exit()

    def _warn(self, text: str) -> None:
        """Print the first warning, above a progress bar if there is one; what follows from it is not said again."""
        with self._lock:
            if not self._warned:
                self._warned = True
                tqdm.write(f"warning: {text}", file=sys.stderr)
                sys.stderr.flush()


def _init(run_dir: Path, config: Config, mode: str) -> Any:
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        name=os.environ.get("WANDB_NAME") or run_dir.name,
        id=_identity(run_dir / "wandb_id"),
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        dir=run_dir,
        config=config.flat(),
        settings=wandb.Settings(
            silent=True,
            console="off",  # its capture would make every print of the training a call into W&B
            init_timeout=INIT_SECONDS,
            finish_timeout=0.8 * FINISH_SECONDS,  # so that W&B itself gives up first, in good order
            finish_timeout_raises=True,
            stop_fn=lambda: None,  # its default interrupts the training
        ),
    )


def _forget_attempt() -> None:
    """Make W&B's service give up a run it did not open; its id could not be used again otherwise."""
    import wandb

    wandb.teardown()


def _identity(file: Path) -> str:
    """The id of the folder's W&B run; one that is missing, or torn by a kill, is drawn (again).

    An agent of a sweep has drawn one already, and W&B sets aside all others.
    """
    found = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
    if re.fullmatch("[0-9a-z]{8}", found):
        return found
    given = os.environ.get("WANDB_RUN_ID", "") if "WANDB_SWEEP_ID" in os.environ else ""
    drawn = given if re.fullmatch("[0-9a-z]{8}", given) else secrets.token_hex(4)
    replace_text(file, drawn)
    return drawn


def _do_not_wait_at_exit() -> None:
    """Take off the hook with which W&B, at the end of the process, waits for its service without a limit.

    The service ends by itself when its parent has gone.
    """
    setup = sys.modules.get("wandb.sdk.wandb_setup")
    connection = getattr(getattr(setup, "_singleton", None), "_connection", None)
    if connection is not None and connection._cleanup is not None:
        connection._cleanup()


def _sync_command(run_dir: Path) -> str:
    return f"wandb sync {shlex.quote(str(run_dir))}/wandb/offline-run-*"


def log_report(
    run_dir: Path, config: Config, step: int, metrics: dict[str, Any], pictures: dict[str, Path],
    tables: dict[str, Table],
) -> None:  # fmt: skip
    """Add a report's final metrics, and at `step` its pictures and tables, to the run's own W&B run.

    A failure is a warning.
    """

    def add(run: Any) -> None:
        import wandb

        run.summary.update(metrics)
        shown: dict[str, Any] = {f"report/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
        for name, table in tables.items():
            rows = [list(row) for row in table.rows]
            shown[f"report/table_{name}"] = wandb.Table(columns=list(table.header), data=rows)
        run.log(shown, step=step)

    mirror = Mirror(run_dir, config)
    mirror.do(add)
    if line := mirror.close():
        print(line, flush=True)
