"""Seconds from the start of the process to its first optimizer step, and where they go.

    python -m benchmarks.start [--model cnn4] [--data DIR_WITH_HUB_PARQUET] [--repeats 5] [--json FILE]

In turn: a Python that imports torch, timm and accelerate (`libraries`: below it no such program can start), one that
imports train.py and does nothing, and `train.py` with a warm data cache, watched from outside until its log holds the
first step. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from cifar_dist.distributed.hardware import processor

ROOT = Path(__file__).parent.parent
LIBRARIES = "import torch, timm, accelerate"
EVERYTHING = "import train"
POLL_SECONDS = 0.01


def seconds_of(code: str) -> float:
    """Seconds of a Python process that runs `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return time.perf_counter() - began


def first_step(flags: list[str], run_dir: Path) -> float:
    """Seconds until the log of a training holds its first step."""
    log, began = run_dir / "log.jsonl", time.perf_counter()
    command = [sys.executable, "train.py", *flags, "--run-dir", str(run_dir), "--max-steps", "1", "--log-every", "1"]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (log.is_file() and "train/loss" in log.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - began


def main() -> None:
    """Measure in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cnn4")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    flags = ["--dataset", args.data, "--model", args.model, "--batch-size", "64"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first_step(flags, Path(folder) / "warm")
        for repeat in range(args.repeats):
            row = {
                "libraries": seconds_of(LIBRARIES),
                "imports": seconds_of(EVERYTHING),
                "first step": first_step(flags, Path(folder) / str(repeat)),
            }
            rows.append(row)
            print("   ".join(f"{name} {seconds:.1f} s" for name, seconds in row.items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("medians:   " + "   ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items()))
    if args.json:
        facts = {
            "hardware": processor(),
            "versions": {name: version(name) for name in ("torch", "timm", "accelerate")},
            "model": args.model,
            "seconds": rows,
            "medians": medians,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
