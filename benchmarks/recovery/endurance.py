"""R13: a thousand saves leave nothing behind in the process, and resuming costs little more than starting.

    python -m benchmarks.recovery.endurance --trials 1000 [--pairs 5] [--json FILE]

* `--trials` saves of a tiny training in one process: open descriptors, resident memory, threads and children after a
  twentieth of them and at the end.
* a real `python train.py` (resnet18_cifar on digits) from its start to its first logged step: cold, and resumed,
  `--pairs` of each in turn: the ratio of the medians.
* a stream of 1.2 million rows without files behind it: from nothing to the batch after 10^6 samples.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.recovery.common import Failures, Small, begin, campaign
from benchmarks.recovery.jobs import Job
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.data.stream import StreamSet
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.training.stream_batches import StreamBatches

MIB = 2**20
REAL = shlex.split(
    "--dataset digits --model resnet18_cifar --batch-size 16 --epochs 1 --wandb disabled --log-every 1 --val-fraction 0"
    " --resume auto"
)


def held() -> dict[str, int]:
    """What this process has open and running."""
    me = psutil.Process()
    return {
        "descriptors": me.num_fds(),
        "threads": me.num_threads(),
        "children": len(me.children(recursive=True)),
        "resident": me.memory_info().rss,
    }


def many_saves(trials: int, folder: Path, failures: Failures) -> dict[str, Any]:
    """Save again and again; a row of what that leaves in the process."""
    small, before, early = Small(folder), held(), max(trials // 20, 1)
    for step in range(1, trials + 1):
        small.save(step, best=step % 7 == 1)
        if step == early:
            before = held()
    after = held()
    grown = {name: after[name] - before[name] for name in after}
    for name, allowed in {"descriptors": 0, "threads": 0, "children": 0, "resident": 8 * MIB}.items():
        if grown[name] > allowed:
            failures.add(f"{name} grew from {before[name]} to {after[name]} over {trials - early} saves")
    left = sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink())
    if len(left) > 3 + (".lock" in left):
        failures.add(f"{trials} saves left {left}")
    shown = ", ".join(f"{name} {number:+d}" for name, number in grown.items() if name != "resident")
    return {
        "figure": f"{trials} saves in one process",
        "found": f"{shown}, resident {grown['resident'] / MIB:+.1f} MiB",
        "allowed": "+0, +8 MiB",
        "ok": not failures,
    }


def to_first_step(run_dir: Path, steps: int) -> float:
    """Seconds from the start of a training to its first new record, which is of the last step."""
    began = time.perf_counter()
    job = Job([*REAL, "--run-dir", str(run_dir), "--max-steps", str(steps)], 1, run_dir.with_suffix(".txt"), real=True)
    log = run_dir / "log.jsonl"
    while not (log.exists() and f'{{"step": {steps},' in log.read_text()):
        if job.wait(0.005) is not None:
            raise RuntimeError(f"the training ended without step {steps}: {run_dir.with_suffix('.txt')}")
    seconds = time.perf_counter() - began
    if job.wait(60) != [0]:
        raise RuntimeError(f"the training did not end well: {run_dir.with_suffix('.txt')}")
    return seconds


def resume_against_start(pairs: int, folder: Path, failures: Failures) -> dict[str, Any]:
    """Cold starts and resumed ones in turn; a row with the ratio of their medians."""
    to_first_step(folder / "warm", 1)
    colds, resumes = list[float](), list[float]()
    for pair in range(pairs):
        colds.append(to_first_step(folder / f"real-{pair}", 1))
        resumes.append(to_first_step(folder / f"real-{pair}", 2))
    cold, resumed = statistics.median(colds), statistics.median(resumes)
    if resumed > 1.2 * cold:
        failures.add(f"resuming takes {resumed / cold:.2f} times a cold start")
    return {
        "figure": f"resumed against cold, start to first step (medians of {pairs})",
        "found": f"{resumed:.1f} s / {cold:.1f} s = {resumed / cold:.2f}",
        "allowed": "1.20",
        "ok": resumed <= 1.2 * cold,
        "cold": colds,
        "resumed": resumes,
    }


class NoFiles(StreamSet):
    """A stream of black images that come from nowhere."""

    def _read_shard(self, shard: int, first: int, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        for row in np.flatnonzero(wanted[first : first + int(self.shard_rows[shard])]).tolist():
            yield first + row, None

    def decode(self, number: int, image: Any) -> np.ndarray:
        """Black."""
        return np.zeros((self.size, self.size, 3), dtype=np.uint8)


def skip_a_million(seed: int, failures: Failures) -> dict[str, Any]:
    """Begin a stream after 10^6 samples; a row with the seconds to its first batch."""
    rows, batch = 1_200_000, 128
    labels = np.zeros(rows, dtype=np.int64)
    data = NoFiles(None, "train", None, labels, np.full(120, rows // 120), np.ones(rows, dtype=bool), 32, 16384)  # type: ignore[arg-type]
    flags = f"--model cnn4 --data-mode stream --batch-size {batch} --epochs 2 --seed {seed}"
    config = parse_command_line(shlex.split(flags)).config
    plan = make_plan(config, Sizes(rows, 0, None, 10, 0, 0, 0, 0), 1)
    parallel: Any = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=0, device=torch.device("cpu")), input_dtype=torch.float32
    )
    input = InputConfig(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
    began, step = time.perf_counter(), -(-1_000_000 // batch)
    batches = StreamBatches(data, config, plan, input, parallel)
    first = next(iter(batches(step)))
    seconds = time.perf_counter() - began
    batches.close()
    if len(first.images) != batch or seconds > 1:
        failures.add(f"skipping 10^6 samples took {seconds:.2f} s")
    found = f"{seconds:.2f} s"
    return {"figure": "skipping 10^6 samples of a stream", "found": found, "allowed": "1 s", "ok": seconds <= 1}


def run(trials: int, seed: int, folder: Path, pairs: int = 5) -> dict[str, Any]:
    """All three; rows of a table, and failures. The seed is of the order of the stream's rows alone."""
    begin(folder)
    failures = Failures()
    rows = [many_saves(trials, folder / "many", failures), skip_a_million(seed, failures)]
    rows += [resume_against_start(pairs, folder, failures)] if pairs else []
    numbers = {name: row.pop(name) for row in rows for name in ("cold", "resumed") if name in row}
    return {"rows": rows, "failures": failures, "all_seconds": numbers}


def pairs_flag(parser: argparse.ArgumentParser) -> None:
    """Declare --pairs."""
    parser.add_argument("--pairs", type=int, default=5, help="of what is timed against each other; 0 times nothing")


if __name__ == "__main__":
    campaign(__doc__, run, trials=1000, more=pairs_flag)
