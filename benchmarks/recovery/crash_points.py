"""R2: a process that dies at any system call of a save, or at any time, leaves only what can be resumed from.

    python -m benchmarks.recovery.crash_points --trials 1000 [--every 1] [--seed 0] [--json FILE]

Four parts (strace must be there), all but the second on a tiny model:

* every system call of a save that makes, writes, renames or removes something is a crash point: strace kills the
  process (of two, either one) as it enters its K-th call, for K = 1, 1 + `--every`, … until it survives; for the first
  save, a later one, and one that removes older checkpoints;
* the first start of a train.py is killed likewise at every call on its new run folder; the same command must then run;
* `--trials` times a process that saves in a loop is killed at a random time;
* power loss: in the trace of four saves every file must be fsynced between its last write and its rename, the folder
  too, and its parent before anything older goes and before the save returns. The check itself is checked: without any
  one of those fsyncs it must complain.

After each kill every checkpoint with a name must be sound by its manifest, the newest must be at least the last whose
save had returned, the program must load exactly that one, and go on to save the next.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import (
    FLAGS,
    Failures,
    Small,
    begin,
    campaign,
    checkpoints_of,
    fault_of,
    newest_sound,
    steps_of,
)
from benchmarks.recovery.jobs import Job
from benchmarks.recovery.power_loss import faults_in, whole_lines

CALLS = [
    *("openat", "write", "pwrite64", "writev", "ftruncate", "chmod", "fchmod", "fchmodat", "fsync", "fdatasync"),
    *("rename", "renameat", "renameat2", "mkdir", "mkdirat", "symlink", "symlinkat", "unlink", "unlinkat", "rmdir"),
]
START_CALLS = ("mkdir", "openat", "flock", "write", "fsync", "rename")
START_NAMES = ["", ".lock", "config.yaml", "plan.json", "environment.json"]
START_NAMES += ["checkpoints", *(f".tmp-{name}" for name in START_NAMES[2:])]
SCENARIOS = {"first save": 0, "later save": 1, "save that removes": 3}  # checkpoints made before
TRACED = ",".join([*CALLS, "mmap"])


def _wait_for(path: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > limit:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.005)


def wait_to_be_told(folder: Path) -> None:
    """Say that this process is ready, and wait until it is traced."""
    (folder / f"ready-{os.environ.get('RANK', '0')}").touch()
    _wait_for(folder / "go")


def save_when_told(folder: Path, steps: list[int]) -> None:
    """Get ready (imports that come late included), save when told, and note each save that has returned."""
    Small(folder / "warm").save(1, best=True)
    small = Small(folder, one_thread=True)  # strace counts the calls of each thread by itself
    wait_to_be_told(folder)
    for step in steps:
        small.save(step, best=step % 2 == 0)
        if os.environ.get("RANK", "0") == "0":
            (folder / f"returned-{step}").touch()


def load_and_go_on(folder: Path, last: int) -> None:
    """Load what is chosen, note its step, and save one more than was ever tried."""
    small = Small(folder)
    (folder / "loaded").write_text(str(small.load()))
    small.save(last + 1)


def inspect_crash(folder: Path, count: int, last: int) -> str:
    """What is wrong after a kill, `last` being the last step that was to be saved; an empty string if nothing."""
    visible = steps_of(folder)
    faults = [fault for saved in checkpoints_of(folder) if (fault := fault_of(saved))]
    if faults:
        return f"visible, but not sound: {'; '.join(faults)}"
    returned = max([int(path.name.removeprefix("returned-")) for path in folder.glob("returned-*")], default=0)
    newest = newest_sound(folder)
    if (newest or 0) < returned:
        return f"step {returned} was saved, but the newest is {newest}"
    if newest is None:
        return ""
    job = Job([], count, folder / "said.txt", work=lambda: load_and_go_on(folder, last))
    statuses = job.wait(60)
    job.end()
    if statuses is None or any(statuses):
        return f"loading and saving on ended with {statuses} ({folder}/said.txt)"
    loaded = int((folder / "loaded").read_text())
    if loaded != newest or newest_sound(folder) != last + 1:
        return f"step {loaded} was loaded of {visible}; afterwards the newest is {newest_sound(folder)}"
    return ""


def with_saves(folder: Path, count: int, before: int) -> None:
    """Make a folder with `before` checkpoints, as if they had been saved long ago."""
    (folder / "go").parent.mkdir(parents=True)
    (folder / "go").touch()
    job = Job([], count, folder / "said.txt", work=lambda: save_when_told(folder, [*range(1, before + 1)]))
    if job.wait(60) != [0] * count:
        raise RuntimeError(f"the saves before could not be made: {folder}/said.txt")
    (folder / "go").unlink()


def strace(job: Job, folder: Path, rank: int, flags: list[str]) -> list[int] | None:
    """Exit statuses of a job whose processes wait to be told in `folder`; `rank` is under strace with `flags`."""
    for other in range(job.count):
        _wait_for(folder / f"ready-{other}")
    tracer = subprocess.Popen(["strace", "-f", "-p", str(job.pids()[rank]), *flags], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    while "attached" not in tracer.stderr.readline():
        if tracer.poll() is not None:
            raise RuntimeError("strace could not attach; it needs ptrace")
    (folder / "go").touch()
    statuses = job.wait(60)
    job.end()
    tracer.communicate(timeout=20)
    return statuses


def killed_at(call: str, number: int) -> list[str]:
    """Flags of strace that kill a process as it enters the `number`-th such call."""
    return ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", "-o", os.devnull]


def crash(folder: Path, template: Path, case: tuple[int, int, int, str], number: int) -> tuple[bool, str]:
    """Kill at the `number`-th call; whether the process had survived, and what is wrong."""
    before, count, rank, call = case
    shutil.copytree(template, folder, symlinks=True)
    for ready in folder.glob("ready-*"):
        ready.unlink()
    job = Job([], count, folder / "said.txt", work=lambda: save_when_told(folder, [before + 1]))
    statuses = strace(job, folder, rank, killed_at(call, number))
    fault = inspect_crash(folder, count, before + 1)
    if not fault and before and newest_sound(folder) is None:
        fault = "nothing sound is left"
    return statuses == [0] * count, fault


def crash_points(folder: Path, every: int, calls: list[str]) -> tuple[list[dict[str, Any]], Failures]:
    """Kill at every system call; a row for each scenario and process."""
    rows, failures = [], Failures()
    cases = [(name, 1, 0, every) for name in SCENARIOS]
    cases += [("save that removes", 2, rank, 3 * every) for rank in (0, 1)]
    for name, count, rank, stride in cases:
        before, points, bad = SCENARIOS[name], 0, len(failures)
        template = folder / f"template-{before}-{count}"
        if not template.exists():
            with_saves(template, count, before)
        for call in calls:
            number, survived = 1, False
            while not survived:
                place = folder / f"{before}-{count}-{rank}-{call}-{number}"
                survived, fault = crash(place, template, (before, count, rank, call), number)
                points += not survived
                if fault:
                    failures.add(f"{name}, rank {rank} of {count} killed at {call} number {number}: {fault}: {place}")
                else:
                    shutil.rmtree(place)
                number += stride
        bad = len(failures) - bad
        rows.append({"part": name, "processes": count, "killed": f"rank {rank}", "kills": points, "bad": bad})
    return rows, failures


def first_start(folder: Path, every: int, calls: list[str]) -> tuple[dict[str, Any], Failures]:
    """Kill a whole train.py at every system call on what it writes into a new run folder, and start it again."""
    failures, kills = Failures(), 0
    for call in calls:
        number, survived = 1, False
        while not survived:
            place = folder / f"start-{call}-{number}"
            place.mkdir()
            flags = [*FLAGS, "--max-steps", "1", "--run-dir", str(place / "run")]
            paths = [word for name in START_NAMES for word in ("-P", str(place / "run" / name))]
            job = Job(flags, 1, place / "said.txt", hook=lambda rank, place=place: wait_to_be_told(place))  # type: ignore[misc]
            survived = strace(job, place, 0, [*paths, *killed_at(call, number)]) == [0]
            kills += not survived
            job = Job(flags, 1, place / "said.txt")
            statuses = job.wait(60)
            job.end()
            if statuses != [0] or newest_sound(place / "run") != 1:
                failures.add(f"first start killed at {call} number {number}: then {statuses}: {place}")
            else:
                shutil.rmtree(place)
            number += every
    return {"part": "first start", "processes": 1, "killed": "rank 0", "kills": kills, "bad": len(failures)}, failures


def save_for_ever(folder: Path) -> None:
    """Save one step after the other."""
    small, step = Small(folder), 0
    while True:
        step += 1
        small.save(step, best=step % 5 == 1)
        (folder / f"returned-{step}").touch()


def random_kills(folder: Path, trials: int, dice: random.Random) -> tuple[dict[str, Any], Failures]:
    """Kill a process that saves in a loop."""
    failures, within = Failures(), 0
    for number in range(trials):
        place, delay = folder / f"random-{number}", dice.uniform(0, 0.5)
        place.mkdir()
        job = Job([], 1, place / "said.txt", work=lambda place=place: save_for_ever(place))  # type: ignore[misc]
        _wait_for(place / "checkpoints")
        time.sleep(delay)
        job.send(signal.SIGKILL, "all")
        job.end()
        within += any(place.glob("checkpoints/.tmp-*"))
        last = max([0, *map(int, re.findall(r"step-(\d{8})", " ".join(os.listdir(place / "checkpoints"))))])
        if fault := inspect_crash(place, 1, last):
            failures.add(f"random kill {number} after {delay:.3f} s: {fault}: {place}")
        else:
            shutil.rmtree(place)
    part = f"random kills ({within} while writing)"
    return {"part": part, "processes": 1, "killed": "rank 0", "kills": trials, "bad": len(failures)}, failures


def power_loss(folder: Path) -> tuple[dict[str, Any], Failures]:
    """Trace four saves and check the order of writes, fsyncs and renames."""
    place, file = folder / "traced", folder / "trace.txt"
    place.mkdir()
    job = Job([], 1, place / "said.txt", work=lambda: save_when_told(place, [1, 2, 3, 4]))
    statuses = strace(job, place, 0, ["-y", "-s", "0", "-e", f"trace={TRACED}", "-o", str(file)])
    trace = whole_lines(file.read_text().splitlines())
    failures = Failures()
    for fault in faults_in(trace, str(place)):
        failures.add(f"power loss: {fault}: {file}")
    if statuses != [0]:
        failures.add(f"power loss: the traced saves ended with {statuses}: {place}/said.txt")
    root = re.escape(f"{place}/checkpoints")
    commits = [n for n, line in enumerate(trace) if re.search(rf'\brename.*"{root}/step-[^/"]*"[^"]* = 0', line)]
    left_out = [{n} for n, line in enumerate(trace) if re.search(rf"\bfsync\(\d+<{root}/\.tmp-step", line)]
    for commit, following in itertools.pairwise([*commits, len(trace)]):  # the links' fsync does for the commit's too
        left_out.append({n for n in range(commit, following) if re.search(rf"\bfsync\(\d+<{root}>", trace[n])})
    before, seen = faults_in(trace, str(place)), 0
    for fsyncs in left_out:
        seen += faults_in([line for n, line in enumerate(trace) if n not in fsyncs], str(place)) != before
    if len(commits) != 4 or seen < len(left_out):
        failures.add(f"power loss: of {len(left_out)} fsyncs left out, only {seen} were noticed: {file}")
    return {"part": f"power loss ({seen} of {len(left_out)} left-out fsyncs seen)", "bad": len(failures)}, failures


def run(trials: int, seed: int, folder: Path, every: int = 1, calls: list[str] | None = None) -> dict[str, Any]:
    """All four parts; rows of a table, and failures."""
    begin(folder)
    lint, failures = power_loss(folder)
    rows, more = crash_points(folder, every, calls or CALLS)
    start, start_failures = first_start(folder, every, calls or [*START_CALLS])
    killed, random_failures = random_kills(folder, trials, random.Random(seed))
    failures += [*more, *start_failures, *random_failures]
    return {"rows": [*rows, start, killed, lint], "failures": failures}


def more_flags(parser: argparse.ArgumentParser) -> None:
    """Declare --every and --calls."""
    parser.add_argument("--every", type=int, default=1, help="take only every so manieth call")
    parser.add_argument("--calls", nargs="+", help=f"system calls (default: {' '.join(CALLS)})")


if __name__ == "__main__":
    campaign(__doc__, run, trials=1000, more=more_flags)
