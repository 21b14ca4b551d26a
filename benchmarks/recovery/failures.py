"""R9: whatever one process does, the job ends in time, leaves none behind and says once who failed, where and why.

    python -m benchmarks.recovery.failures --trials 12 [--seed 0] [--json FILE]

Two processes under a real torchrun with ``--ddp-timeout 10``. In turn one of them raises, exits with status 0, is
killed, is stopped (SIGSTOP), blocks in its data, or never joins. From then on the job has 15 s plus the time-out; no
process of it may be left in /proc; one line of a rank (not torchrun's pages) must name the rank and, where it has
begun, the step, and the reason must be said. TORCH_ELASTIC_SHUTDOWN_TIMEOUT is what it is in the environment: torchrun
waits that long (30 s unless set) before it kills a process that does not react to SIGTERM.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import FLAGS, Failures, begin, campaign
from benchmarks.recovery.jobs import Job, replace_everywhere, run_training

TIMEOUT, ALLOWED = 10, 15.0
REASONS = {  # what a rank does, and the words that tell it
    "raises": "the fault of this trial",
    "exits 0": "exit|left|gone|ended|closed",
    "is killed": "SIGKILL|Signal 9|signal 9|killed|died|gone",
    "is stopped": "time|waited|answer",
    "blocks in data": "time|waited|answer",
    "never joins": "time|waited|join",
}


def misbehave(fault: str) -> None:
    """Do it, in this process."""
    if fault == "raises":
        raise ArithmeticError("the fault of this trial")
    if fault == "exits 0":
        os._exit(0)
    if fault in ("is killed", "is stopped"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "is killed" else signal.SIGSTOP)
    while True:
        time.sleep(3600)


def as_rank(fault: str, victim: int, call: int, notes: Path, flags: list[str]) -> None:
    """One process of the job: train, or what the fault says when its time comes."""
    rank, calls = int(os.environ["RANK"]), [0]

    def note() -> None:
        (notes / f"{'fault' if rank == victim else 'start'}-{rank}").write_text(repr(time.time()))

    def hitting(original: Callable[..., Any]) -> Callable[..., Any]:
        def hit(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                note()
                misbehave(fault)
            return original(*arguments, **named)

        return hit

    if rank == victim:
        if fault == "never joins":
            note()
            misbehave(fault)
        place = "ordering.global_batch" if fault == "blocks in data" else "training.engine.train_step"
        replace_everywhere(f"cifar_dist.{place}", hitting)
    else:
        note()
    run_training(flags)


def judge(said: str, fault: str, victim: int) -> str:
    """What the output lacks, or an empty string."""
    lines = [line for line in said.splitlines() if line.startswith(("train.py: ", "[rank"))]
    naming = [line for line in lines if re.search(rf"\b(rank|process) ?{victim}\b", line)]
    if fault == "never joins":
        naming = [line for line in naming if line.startswith("train.py: ")]
    else:
        naming = [line for line in naming if re.search(r"\bstep \d+", line)]
    if not naming:
        said_by_ranks = [line for line in lines if line.startswith("train.py")] or lines[-1:]
        return f"no line names rank {victim}{' and step' * (fault != 'never joins')}: {said_by_ranks}"
    return "" if re.search(REASONS[fault], said) else f"the reason is not said: {naming}"


def trial(fault: str, victim: int, call: int, run_dir: Path) -> tuple[dict[str, Any], str]:
    """One job; what was measured, and what is wrong with it."""
    said, notes = run_dir.with_suffix(".txt"), run_dir.with_suffix(".notes")
    notes.mkdir()
    flags = [*FLAGS, "--ddp-timeout", str(TIMEOUT), "--run-dir", str(run_dir)]
    module = ("-m", "benchmarks.recovery.failures", "as-rank", fault, str(victim), str(call), str(notes))
    job = Job(flags, 2, said, real=True, command=module)
    limit = time.monotonic() + 150
    while job.launcher_lives() and time.monotonic() < limit:
        time.sleep(0.05)
    ended, hung = time.time(), job.launcher_lives()
    time.sleep(0.5)
    orphans = len(job.ranks())
    job.end()
    faults = [float(note.read_text()) for note in notes.iterdir() if fault == "never joins" or "fault" in note.name]
    seconds = round(ended - max(faults), 1) if faults else None
    row = {"a rank that": fault, "rank": victim, "seconds": seconds, "orphans": orphans}
    status = job.wait(0)
    if seconds is None:
        return row, "the fault never came"
    if hung or seconds > ALLOWED + TIMEOUT:
        return row, f"the job ended {seconds} s after the fault{', and only because it was killed' * hung}"
    if orphans:
        return row, f"{orphans} processes were left"
    if status == [0]:
        return row, "torchrun ended with status 0"
    return row, judge(said.read_text(), fault, victim)


def run(trials: int, seed: int, folder: Path) -> dict[str, Any]:
    """Every fault in turn, on either rank; a row for each trial, and failures."""
    begin(folder)
    dice, rows, failures = random.Random(seed), [], Failures()
    for number in range(trials):
        fault = [*REASONS][number % len(REASONS)]
        victim = (number // len(REASONS) + number) % 2
        run_dir = folder / f"trial-{number}"
        row, failure = trial(fault, victim, dice.randint(2, 9), run_dir)
        rows.append(row | {"ok": not failure})
        if failure:
            failures.add(f"trial {number}, seed {seed}: rank {victim} {fault}: {failure}: {run_dir}, {run_dir}.txt")
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
    return {"rows": rows, "failures": failures}


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-rank"]:
        as_rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), sys.argv[6:])
    else:
        campaign(__doc__, run, trials=12)
