"""R5: one SLURM job, interrupted again and again, ends in the very state of a job that nobody touched.

    python -m benchmarks.recovery.slurm_cycles --trials 20 [--seed 0] [--json FILE]

A private cluster (munge, slurmctld, three slurmd on this machine) runs slurm/train.sbatch on two nodes. A trial is one
cycle: some steps into the job it meets its time limit, is preempted by a job of a higher partition, requeued by hand,
loses a node with all that ran there, or has one rank killed by SIGKILL. In the end the sha256 of all the run has come
to must be that of an uninterrupted job, its log must hold every step once, and W&B one run. Needs root, slurm-wlm and
munge.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import FLAGS, Failures, begin, campaign, final_digest, steps_of
from benchmarks.recovery.jobs import ROOT
from benchmarks.recovery.slurm_cluster import Cluster

CAUSES = ("time limit", "preempted", "requeued", "node lost", "rank killed")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def train_job(cluster: Cluster, folder: Path, name: str, *flags: str, options: tuple[str, ...] = ()) -> int:
    """Queue a training of `FLAGS` and more on two nodes from `folder`, as run ``folder/name``; its id."""
    for part in ("train.py", "slurm", "accelerate_configs", "ds_configs"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    options = ("--nodes=2", f"--job-name={name}", *options)
    settings = {"VENV": sys.prefix, "NETWORK": "no", "OMP_NUM_THREADS": "1", "WANDB_MODE": ""}
    flags = (*FLAGS, "--run-dir", name, *flags)
    return cluster.submit(*options, "slurm/train.sbatch", *flags, folder=folder, **settings)


def progress(run_dir: Path) -> int:
    """The step that a run says it has reached."""
    try:
        return int(json.loads((run_dir / "progress.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0


def interrupt(cluster: Cluster, job: int, cause: str, node: str) -> None:
    """Let `cause` happen to a running job, whose time limit is half an hour and its signal 110 s before.

    SLURM looks at time limits every 30 s; "told" is the signal that it then sends, sent at once. A lost node comes
    back once SLURM has noticed.
    """
    if cause == "time limit":
        cluster.query("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    elif cause == "preempted":
        cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1", folder=cluster.folder)
    elif cause == "told":
        cluster.query("scancel", "--signal=USR1", str(job))
    elif cause == "requeued":
        cluster.query("scontrol", "requeue", str(job))
    elif cause == "node lost":
        cluster.crash(node)
        cluster.wait_for(
            f"{node} to be down", lambda: "down" in cluster.query("sinfo", "-h", "-n", node, "-o", "%t"), 90
        )
        cluster.start_node(node)
    elif cause == "rank killed":
        next(process for process in cluster.processes(node, job) if "train.py" in process.cmdline()[1:2]).kill()


def cycle(cluster: Cluster, job: int, run_dir: Path, cause: str, dice: random.Random) -> str:
    """Wait until the job has come some steps further, interrupt it, and wait until it is queued again; what failed."""
    before, aim = int(cluster.job(job)["Restarts"]), progress(run_dir) + dice.randint(1, 9)
    state = cluster.wait(job, "RUNNING", *ENDED)
    cluster.wait_for(f"step {aim}", lambda: progress(run_dir) >= aim or cluster.state(job) in ENDED, 150)
    time.sleep(dice.random())
    nodes = cluster.query("scontrol", "show", "hostnames", state["NodeList"]).split()
    interrupt(cluster, job, cause, dice.choice(nodes))

    def over() -> bool:
        now = cluster.job(job)
        return int(now["Restarts"]) > before or now["JobState"] in ENDED

    cluster.wait_for(f"the end of start {before + 1} ({cause})", over, 180)
    if cause == "time limit":
        cluster.query("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    return f"{cause}: the job was not requeued" if cluster.state(job) in ENDED else ""


def run(trials: int, seed: int, folder: Path, epochs: int = 60) -> dict[str, Any]:
    """Make all cycles; rows of a table, and failures."""
    begin(folder)
    dice, failures, met = random.Random(seed), Failures(), Counter[str]()
    causes = [CAUSES[number % len(CAUSES)] for number in range(trials)]
    dice.shuffle(causes)
    flags = (f"--epochs={epochs}", "--wandb", "offline")
    with Cluster(folder / "cluster") as cluster:
        whole = train_job(cluster, folder, "whole", *flags)
        cluster.wait(whole, *ENDED, seconds=600)
        job = train_job(cluster, folder, "cut", *flags, options=("--time=30", "--signal=USR1@110"))
        for cause in causes:
            if failure := cycle(cluster, job, folder / "cut", cause, dice):
                failures.add(failure)
                break
            met[cause] += 1
            print(f"{cause}: start {cluster.job(job)['Restarts']} ended at step {steps_of(folder / 'cut')[-1:]}")
        last = cluster.wait(job, *ENDED, seconds=600)
    failures += [f"the job ended as {last['JobState']}"] * (last["JobState"] != "COMPLETED")
    said = (folder / f"slurm-{job}.out").read_text().splitlines()
    told = [line for line in said if re.match("slurm|srun|stopped|run folder", line)]
    return {"rows": [_row(folder, job, met, failures)], "failures": failures, "log": told}


def _row(folder: Path, job: int, met: Counter[str], failures: Failures) -> dict[str, Any]:
    """What the interrupted run came to, next to the whole one; adds failures."""
    equal = final_digest(folder / "cut") == final_digest(folder / "whole")
    steps = [json.loads(line).get("step") for line in (folder / "cut/log.jsonl").read_text().splitlines()]
    trained = [json.loads(line)["step"] for line in (folder / "cut/log.jsonl").read_text().splitlines() if "lr" in line]
    runs = {path.name.rpartition("-")[2] for path in (folder / "cut/wandb").glob("offline-run-*")}
    said = re.findall(r"start (\d+), on", (folder / f"slurm-{job}.out").read_text())
    for ok, failure in (
        (equal, "the interrupted run ended in another state"),
        (len(trained) == len(set(trained)) > 0, "a step is in the log twice"),
        (len(runs) == 1, f"W&B has {len(runs)} runs"),
        (said == [str(n + 1) for n in range(len(said))], f"the job's log has starts {said}"),
    ):
        if not ok:
            failures.add(failure)
    return {
        "cycles": sum(met.values()), **met, "starts in the log": len(said), "steps": max(filter(None, steps)),
        "W&B runs": len(runs), "same final state": equal,
    }  # fmt: skip


if __name__ == "__main__":
    campaign(__doc__, run, trials=20)
