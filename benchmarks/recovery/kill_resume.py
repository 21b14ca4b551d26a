"""R1: kill -9 at any time, give the same command again, and end in the very state of a run that nobody touched.

    python -m benchmarks.recovery.kill_resume --trials 200 [--seed 0] [--json FILE]
    python -m benchmarks.recovery.kill_resume --trials 20 --control

A trial is a run of 14 steps on one or two processes (dropout, stochastic depth, batch norm, mixup, cutout, average,
accumulation), killed one to three times at times drawn uniformly over an uninterrupted run, its start included: one
rank, all processes, or torchrun. What survives is given up to 3 s and then killed too. The sha256 of everything the
run comes to must be the uninterrupted run's. `--control` does not put random streams back: then every run that has
resumed must differ, or the digest sees nothing.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import FLAGS, STEPS, Failures, begin, campaign, final_digest, reference
from benchmarks.recovery.jobs import Job, replace_everywhere

REAL_SHARE = 1 / 6  # of trials under real launchers, at 12 to 20 s a start


def without_random_streams(rank: int) -> None:
    """The control: a process that resumes goes on with other random numbers."""
    replace_everywhere("cifar_dist.recovery.checkpoint._put_back_own_state", lambda original: lambda *_: None)


def plan_trial(dice: random.Random, control: bool) -> dict[str, Any]:
    """How a trial is run, and the part of an uninterrupted run's time, the target and the grace of each kill."""
    count, real = dice.choice([1, 2]), dice.random() < REAL_SHARE and not control
    targets = ["one", "all", *["launcher"] * real] if count > 1 else ["all"]
    kills = [
        (dice.uniform(0.4 if control else 0, 0.7 if control else 1), dice.choice(targets), dice.randrange(2))
        for _ in range(1 if control else dice.randint(1, 3))
    ]
    return {"count": count, "real": real, "kills": kills, "grace": dice.uniform(0, 3)}


def trial(how: dict[str, Any], seconds: float, run_dir: Path, hook: Any) -> tuple[str, Counter[str], bool]:
    """Kill and resume; what failed, the kills that met a live run by target, and whether it ever went on mid-way."""
    flags, met = [*FLAGS, "--run-dir", str(run_dir)], Counter[str]()
    said = run_dir.with_suffix(".txt")
    for at, target, victim in how["kills"]:
        job = Job(flags, how["count"], said, real=how["real"], hook=hook)
        if (statuses := job.wait(at * seconds)) is None:
            job.send(signal.SIGKILL, target, victim)
            job.wait(how["grace"])
            met[target] += 1
        elif any(statuses):
            return f"ended by itself with {statuses}", met, False
        job.end()
    job = Job(flags, how["count"], said, real=how["real"], hook=hook)
    statuses = job.wait(180)
    job.end()
    resumed = any(0 < int(step) < STEPS for step in re.findall(r"continued at step (\d+)", said.read_text()))
    if statuses is None or any(statuses):
        return f"the last start ended with {statuses}", met, resumed
    return "", met, resumed


def run(trials: int, seed: int, folder: Path, control: bool = False) -> dict[str, Any]:
    """Make all trials; rows of a table, and failures."""
    begin(folder)
    dice, failures, kills, resumed_trials, differ = random.Random(seed), Failures(), Counter[str](), 0, 0
    plans = [plan_trial(dice, control) for _ in range(trials)]
    cases = sorted({(how["count"], how["real"]) for how in plans})
    wholes = {case: reference(folder, case[0], real=case[1]) for case in cases}
    for count, real in cases:
        if real and (count, False) in wholes and wholes[count, True][0] != wholes[count, False][0]:
            failures.add(f"real and forked processes ({count}) differ: {folder}/whole-{count}*")
    for number, how in enumerate(plans):
        run_dir, (expected, seconds) = folder / f"trial-{number}", wholes[how["count"], how["real"]]
        failure, met, resumed = trial(how, seconds, run_dir, without_random_streams if control else None)
        kills += met
        resumed_trials += resumed
        if not failure:
            same = final_digest(run_dir) == expected
            differ += not same
            if control and resumed and same:
                failure = "the digest did not see that random streams were lost"
            elif not control and not same:
                failure = "another final state than the uninterrupted run's"
        if failure:
            failures.add(f"trial {number}, seed {seed}: {failure}; {how}: {run_dir}, {run_dir}.txt")
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
    if control and not resumed_trials:
        failures.add("no run of the control was killed mid-way: nothing was shown")
    row = {
        "campaign": "control: random streams not restored" if control else "kill -9 and resume",
        "trials": trials,
        "real launchers": sum(how["real"] for how in plans),
        **{f"kills of {target}": kills[target] for target in ("one", "all", "launcher")},
        "went on mid-way": resumed_trials,
        "other final states": differ,
        "failures": len(failures),
    }
    return {"rows": [row], "failures": failures, "uninterrupted_seconds": {str(k): v[1] for k, v in wholes.items()}}


def control_flag(parser: argparse.ArgumentParser) -> None:
    """Declare --control."""
    parser.add_argument("--control", action="store_true")


if __name__ == "__main__":
    campaign(__doc__, run, trials=200, more=control_flag)
