"""What slurm/train.sbatch starts in tests of its own logic: says what it was given, and ends as FAKE says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

SAID = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "MASTER_ADDR"),
    *("MASTER_PORT", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE", "INSIDE", "HF_HOME", "XDG_CACHE_HOME"),
)

run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank = int(os.environ["SLURM_PROCID"])


def stop(number: int, _: object) -> None:
    """As train.py does, but at once."""
    (run / "REQUEUE").write_text(signal.Signals(number).name + "\n")
    sys.exit(0)


what, number, status = (os.environ.get("FAKE", "").split() + ["0"] * 3)[:3]
if what == "die":  # before there is a run
    os.kill(os.getpid(), signal.SIGKILL)
run.mkdir(parents=True, exist_ok=True)
said = {name: os.environ[name] for name in SAID if name in os.environ}
with (run / f"said-{rank}.jsonl").open("a") as file:
    file.write(json.dumps({"arguments": sys.argv[1:], **said}) + "\n")
if what == "wait":
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, stop)
    time.sleep(300)
elif what == "checkpoint":  # and die, but for the last time
    starts = len((run / f"said-{rank}.jsonl").read_text().splitlines())
    (run / "checkpoints" / f"step-{starts:08d}").mkdir(parents=True)
    if starts < int(number):
        sys.exit(int(status)) if int(status) else os.kill(os.getpid(), signal.SIGKILL)
elif what == "raise":  # on one rank; the other is ended with it
    if rank == 1:
        Path(os.environ["CIFAR_DIST_FAILURE_FILE"]).write_text("rank 1: failed: of a reason of its own\n")
        sys.exit(1)
    time.sleep(300)
elif what == "exit":
    sys.exit(int(number))
