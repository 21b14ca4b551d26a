"""The formulas of `benchmarks.scaling` against train.py on 1, 2 and 3 gloo processes of this machine.

    python -m benchmarks.scaling --measure [--data DIR_WITH_HUB_PARQUET] [--json FILE]

About four minutes on two cores with nothing else to do. Measured, each process with one thread: steps of one process
with a whole, a half and a third of the batch; steps of two and three such processes side by side that know nothing of
each other; all-reduces of 1 KiB to 32 MiB, fitted by alpha and beta; and steps of two and three processes under DDP.

Two predictions are made. By cores: the step of one process with that many images, times processes / cores where there
are more processes than cores, and the communication. Side by side: the same with the steps of the unconnected
processes, which already share memory, caches and what a core really is. Nothing hides behind computing where every core
computes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.engines import run
from benchmarks.scaling_model import Cluster, Link, Work, exposed_seconds
from cifar_dist.command_line import parse_command_line
from cifar_dist.distributed.hardware import processor
from cifar_dist.models import build_model, count_parameters

MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "32"]  # 22 MB of gradients
BATCH, STEPS, SKIPPED = 48, 40, 15
COUNTS = (2, 3)
SIZES = tuple(2**power for power in range(10, 26))  # bytes
REPEATS = 9


def steps(folder: Path, data: str, count: int, batch: int) -> list[float]:
    """Seconds of train.py's steps on so many processes, without the first ones."""
    flags = ["--dataset", data, *MODEL, "--batch-size", str(batch), "--max-steps", str(STEPS), "--val-fraction", "0.01"]
    records = run(folder, "ddp" if count > 1 else "single", count, [*flags, "--lr", "1e-4", "--log-every", "1"])
    return [batch / record["images_per_second"] for record in records[SKIPPED:]]


def side_by_side(folder: Path, data: str, count: int) -> list[float]:
    """Seconds of the steps of `count` processes that train at the same time, each on its part of the batch."""
    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(steps, folder / str(number), data, 1, BATCH // count) for number in range(count)]
        return [step for found in runs for step in found.result()]


def all_reduce_times() -> list[tuple[int, float]]:
    """As one of several processes: bytes, and seconds of an all-reduce of so many, the median of some."""
    torch.distributed.init_process_group("gloo")
    found = []
    for size in SIZES:
        numbers, taken = torch.zeros(size // 4), []
        for _ in range(REPEATS):
            torch.distributed.barrier()
            began = time.perf_counter()
            torch.distributed.all_reduce(numbers)
            taken.append(time.perf_counter() - began)
        found.append((size, statistics.median(taken[1:])))
    torch.distributed.destroy_process_group()
    return found


def link_times(count: int) -> list[tuple[int, float]]:
    """What `all_reduce_times` finds on `count` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, "-m", "benchmarks.scaling_measured"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [(size, seconds) for size, seconds in json.loads(done.stdout.splitlines()[-1])]


def fit(count: int, times: list[tuple[int, float]]) -> Link:
    """Alpha and beta of a ring all-reduce that explain the times best, relative to each, by least squares."""
    from scipy.optimize import nnls

    rows = [(2 * (count - 1) / seconds, 2 * (count - 1) / count * size / seconds) for size, seconds in times]
    (alpha, inverse), _ = nnls(np.array(rows), np.ones(len(rows)))
    return Link(float(alpha), 1 / max(float(inverse), 1e-15))


def predicted(count: int, computing: float, link: Link, cores: int) -> float:
    """Seconds of a DDP step whose computing takes so long on every process; it hides nothing without a spare core."""
    _, parameters = count_parameters(build_model(parse_command_line(MODEL).config.model, 10))
    hiding = computing if cores > count else 0.0
    cluster = Cluster("this machine", link, link, per_node=count)
    return computing + exposed_seconds(Work(parameters, 0.0), "ddp", count, hiding, cluster)


def compare(folder: Path, data: str, count: int, alone: float) -> dict[str, object]:
    """Two predictions for `count` processes, of which one alone takes `alone` seconds for its part, and the truth."""
    cores, times = len(os.sched_getaffinity(0)), link_times(count)
    link, beside = fit(count, times), side_by_side(folder / f"beside{count}", data, count)
    joined = steps(folder / f"joined{count}", data, count, BATCH)
    measured = statistics.median(joined)
    predictions = {
        "by_cores": predicted(count, alone * max(1.0, count / cores), link, cores),
        "side_by_side": predicted(count, statistics.median(beside), link, cores),
    }
    shown = [f"{how} {1e3 * seconds:.1f} ms ({seconds / measured - 1:+.0%})" for how, seconds in predictions.items()]
    print(
        f"{count} processes: alpha {1e6 * link.alpha_seconds:.0f} us, beta {link.bytes_per_second / 1e9:.2f} GB/s;"
        f" predicted {', '.join(shown)}; measured {1e3 * measured:.1f} ms",
        flush=True,
    )
    return {
        "processes": count,
        "alpha_seconds": link.alpha_seconds,
        "bytes_per_second": link.bytes_per_second,
        "all_reduce_bytes_and_seconds": times,
        "predicted_seconds": predictions,
        "side_by_side_step_seconds": beside,
        "step_seconds": joined,
    }


def measure(data: str, to: Path | None) -> None:
    """Measure everything, print predictions beside steps, write JSON."""
    facts = {
        "hardware": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "accelerate", "timm")},
        "recipe": {"data": Path(data).name, "model": MODEL, "batch": BATCH},
    }
    print(f"{facts['hardware']}, {facts['cores']} cores, load before {facts['load_average']:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taken = {count: steps(folder / f"alone{count}", data, 1, BATCH // count) for count in (1, *COUNTS)}
        alone = {count: statistics.median(seconds) for count, seconds in taken.items()}
        shown = [f"{BATCH // count} images {1e3 * seconds:.1f} ms" for count, seconds in alone.items()]
        print(f"one process: {', '.join(shown)}", flush=True)
        rows = [compare(folder, data, count, alone[count]) for count in COUNTS]
    if to:
        one = {BATCH // count: seconds for count, seconds in taken.items()}
        to.write_text(json.dumps(facts | {"one_process_step_seconds": one, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    times_found = all_reduce_times()
    if os.environ["RANK"] == "0":
        print(json.dumps(times_found))
