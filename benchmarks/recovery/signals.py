"""R4: a signal at any moment ends a run with a checkpoint, exit status 0 and the marker REQUEUE, and nothing is lost.

    python -m benchmarks.recovery.signals --trials 100 [--seed 0] [--json FILE]

Each trial draws a phase (import, set-up, first batch, step, accumulation, save, evaluation), one of SIGUSR1, SIGTERM
and SIGINT, one or two processes, and whether one or all get it. In forked processes the signal is sent from within a
function that runs in that phase; in the phase `import` to real processes as soon as torch's libraries are mapped. All
must end within 60 s with status 0, with a sound checkpoint of no fewer steps than had been made (at most two more; of
the first step if the signal came before the training) and the marker written after it; the same command must then
remove the marker and end in the uninterrupted state.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import (
    FLAGS,
    STEPS,
    Failures,
    begin,
    campaign,
    checkpoints_of,
    final_digest,
    newest_sound,
    reference,
)
from benchmarks.recovery.jobs import Job, replace_everywhere

SECONDS = 60
PHASES: dict[str, tuple[tuple[str, ...], int, int]] = {  # functions that run in it, and the calls of which one is hit
    "import": ((), 1, 1),
    "set-up": (
        tuple(f"cifar_dist.{name}" for name in ("data.load_training_data", "models.build_model", "parallel.wrap")),
        1,
        1,
    ),
    "first batch": (("cifar_dist.ordering.global_batch",), 1, 1),
    "step": (("cifar_dist.training.engine.train_step", "cifar_dist.distributed.control.FlagReduction"), 2, STEPS - 2),
    "accumulation": (("cifar_dist.ordering.micro_batch_slice",), 2, 2 * STEPS - 2),
    "save": (("cifar_dist.durable.fsync",), 1, 4),  # as often as any process makes something durable
    "evaluation": (("cifar_dist.distributed.control.any_of",), 1, 2),
}


def plan_trial(dice: random.Random, phase: str) -> dict[str, Any]:
    """What is sent, to whom, when."""
    functions, first, last = PHASES[phase]
    count = dice.choice([1, 2])
    return {
        "phase": phase,
        "signal": dice.choice(["SIGUSR1", "SIGTERM", "SIGINT"]),
        "count": count,
        "to": list(range(count)) if dice.random() < 0.5 else [dice.randrange(count)],
        "function": dice.choice(functions) if functions else None,
        "call": dice.randint(first, last),
        "later": dice.uniform(0, 1),
    }


def sends_itself(how: dict[str, Any], folder: Path) -> Callable[[int], None]:
    """A hook: at its call the function sends the signal, and the steps made until then are noted."""

    def hook(rank: int) -> None:
        calls, made = [0], [0]

        def counting(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                found = step(*arguments, **named)
                made[0] += 1
                return found

            return counted

        def hitting(original: Callable[..., Any]) -> Callable[..., Any]:
            def hit(*arguments: Any, **named: Any) -> Any:
                calls[0] += 1
                if calls[0] == how["call"]:
                    (folder / f"hit-{rank}").write_text(str(made[0]))
                    os.kill(os.getpid(), getattr(signal, how["signal"]))
                return original(*arguments, **named)

            return hit

        replace_everywhere("cifar_dist.training.engine.train_step", counting)
        if rank in how["to"]:
            replace_everywhere(how["function"], hitting)

    return hook


def while_importing(job: Job, how: dict[str, Any]) -> None:
    """Send the signal to real processes that are importing."""
    limit, ready = time.monotonic() + SECONDS, list[int]()
    while len(ready) < how["count"] and time.monotonic() < limit:
        time.sleep(0.01)
        ready = [pid for pid in job.ranks() if "libtorch" in _maps(pid)]
    time.sleep(how["later"])
    for rank in how["to"]:
        job.send(getattr(signal, how["signal"]), "one", rank)


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def after_signal(run_dir: Path, made: int, most: int, statuses: list[int] | None) -> str:
    """What is wrong with what the signal left; an empty string if nothing is."""
    if statuses is None:
        return f"still running {SECONDS} s later"
    if any(statuses):
        return f"exit statuses {statuses}"
    newest, marker = newest_sound(run_dir), run_dir / "REQUEUE"
    if newest is None or not made <= newest <= most:
        return f"{made} steps had been made, the newest checkpoint is of {newest}, not {most} at most"
    if newest < STEPS and not marker.exists():
        return "no REQUEUE"
    saved = checkpoints_of(run_dir)[-1] / "manifest.json"
    if marker.exists() and marker.stat().st_mtime_ns < saved.stat().st_mtime_ns:
        return "REQUEUE is older than the checkpoint"
    return ""


def trial(how: dict[str, Any], run_dir: Path, expected: str) -> str:
    """Send the signal, then go on; what failed, or an empty string."""
    flags, said, notes = [*FLAGS, "--run-dir", str(run_dir)], run_dir.with_suffix(".txt"), run_dir.with_suffix(".hits")
    notes.mkdir()
    if how["phase"] == "import":
        job = Job(flags, how["count"], said, real=True)
        while_importing(job, how)
    else:
        job = Job(flags, how["count"], said, hook=sends_itself(how, notes))
    statuses = job.wait(SECONDS)
    job.end()
    made = [int(hit.read_text()) for hit in notes.iterdir()]
    if how["phase"] != "import" and not made:
        return f"the phase was never hit ({statuses})"
    most = 1 if how["phase"] in ("import", "set-up") else max(made) + 2
    if failure := after_signal(run_dir, max(made, default=0), most, statuses):
        return failure
    job = Job(flags, how["count"], said)
    statuses = job.wait(120)
    job.end()
    if statuses is None or any(statuses):
        return f"the same command ended with {statuses}"
    if (run_dir / "REQUEUE").exists():
        return "REQUEUE is still there after the end"
    return "" if final_digest(run_dir) == expected else "another final state than the uninterrupted run's"


def run(trials: int, seed: int, folder: Path, phases: list[str] | None = None) -> dict[str, Any]:
    """`trials` signals, evenly over the phases; a row for each phase, and failures."""
    begin(folder)
    dice, failures, phases = random.Random(seed), Failures(), phases or [*PHASES]
    plans = [plan_trial(dice, phases[number % len(phases)]) for number in range(trials)]
    expected = {count: reference(folder, count)[0] for count in sorted({how["count"] for how in plans})}
    rows: dict[str, dict[str, Any]] = {
        phase: {"phase": phase, "signals": 0, "to all": 0, "failures": 0, "slowest s": 0.0} for phase in phases
    }
    for number, how in enumerate(plans):
        run_dir, row, began = folder / f"trial-{number}", rows[how["phase"]], time.monotonic()
        failure = trial(how, run_dir, expected[how["count"]])
        row["signals"] += 1
        row["to all"] += len(how["to"]) == how["count"]
        row["slowest s"] = max(row["slowest s"], round(time.monotonic() - began, 1))
        if failure:
            row["failures"] += 1
            failures.add(f"trial {number}, seed {seed}: {failure}; {how}: {run_dir}, {run_dir}.txt")
        else:
            shutil.rmtree(run_dir)
    return {"rows": list(rows.values()), "failures": failures}


if __name__ == "__main__":
    campaign(__doc__, run, trials=100)
