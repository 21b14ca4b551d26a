"""Training images/s on a CPU: as train.py does it, against the loop that everyone writes, in turn.

    python -m benchmarks.cpu --data DIR_WITH_HUB_PARQUET [--models cnn4:32:64 …] [--repeats 3] [--json FILE]

A model is NAME:PIXELS:BATCH. Both train it with AdamW, crop, flip and normalising in bf16: ours with --precision auto's
layout and the resident set, the other is benchmarks/plain_loop.py, loading with 0, 1 and 2 workers. Each repeat starts
every loop in a process of its own, as each would be run (train.py tells malloc to keep freed memory, which would serve
the other, too), warms it up, and times one window of steps; `ratio` is the median over repeats of ours against the best
of the others in the same repeat. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu import noise, plain_pictures, resident
from benchmarks.gpu_rows import PRECISION, WARM_UP_STEPS, Bench, Case, Ours, Way
from benchmarks.machine import facts
from benchmarks.plain_loop import PlainLoop, Setting
from cifar_dist.command_line import parse_command_line
from cifar_dist.cost.flops import Peak
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import device_bytes, start
from cifar_dist.distributed.hardware import processor
from cifar_dist.models import build_model
from cifar_dist.training.precision import measure_formats

MODELS = (
    "cnn4:32:64", "resnet18_cifar:32:128", "vit_tiny_patch16_224:224:32", "resnet18:224:32", "efficientnet_b0:64:64",
)  # fmt: skip
WORKERS = (0, 1, 2)
NOISE = 10_000  # images, without --data
T = TypeVar("T")


def layout(case: Case) -> tuple[bool, dict[str, float]]:
    """Whether --precision auto would keep images NHWC in bf16, and what it measures."""
    config = parse_command_line(
        f"--model {case.model} --img-size {case.img_size} --batch-size {case.batch_size}".split()
    ).config
    rates = measure_formats(config, build_model(config.model, 10), start(PRECISION))
    own = {each: rate for each, rate in rates.items() if each.precision == PRECISION}
    return max(own, key=lambda each: own[each]).channels_last, {str(each): rate for each, rate in rates.items()}


def rate(loop: Ours | PlainLoop, case: Case, seconds: float, ahead: int = 0) -> float:
    """Images/s in a window of about so many seconds, after a warm-up that uses up `ahead` batches loaded meanwhile."""
    loop.run(WARM_UP_STEPS + ahead)
    steps = max(2, round(seconds * WARM_UP_STEPS / loop.run(WARM_UP_STEPS)))
    return case.batch_size * steps / loop.run(steps)


def our_rate(data: str | None, case: Case, nhwc: bool, seconds: float) -> float:
    """Images/s of ours."""
    accelerator = start(PRECISION)
    split = resident(data, device_bytes(accelerator)) if data else noise(NOISE)[0]
    bench = Bench(accelerator, split, [], Peak(0.0, "not asked for"), seconds)
    return rate(Ours(bench, case, Way("ours", channels_last=nhwc)), case, seconds)


def plain_rate(data: str | None, case: Case, workers: int, seconds: float) -> float:
    """Images/s of the loop that everyone writes; nothing of ours was started in its process."""
    set_start_method("fork", force=True)  # as on Linux where nobody says otherwise: workers begin at once
    pictures = plain_pictures(data) if data else noise(NOISE)[1]
    setting = Setting(case.model, case.img_size, case.batch_size, PRECISION, workers, on_cpu=True)
    with closing(PlainLoop(pictures, setting)) as loop:
        return rate(loop, case, seconds, ahead=2 * workers)


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def compare(data: str | None, case: Case, seconds: float, repeats: int) -> dict[str, Any]:
    """Images/s of every loop in every repeat."""
    nhwc, probed = alone(layout, case)
    found = []
    for _ in range(repeats):
        rates = {"ours": alone(our_rate, data, case, nhwc, seconds)}
        for workers in WORKERS:
            rates[f"{workers} workers"] = alone(plain_rate, data, case, workers, seconds)
        found.append(rates)
    ratios = [rates["ours"] / max(value for name, value in rates.items() if name != "ours") for rates in found]
    medians = {name: statistics.median(rates[name] for rates in found) for name in found[0]}
    return {
        "model": case.model, "img_size": case.img_size, "batch_size": case.batch_size, "channels_last": nhwc,
        "probed": probed, "images_per_second": found, "medians": medians, "ratios": ratios,
        "ratio": statistics.median(ratios),
    }  # fmt: skip


def main() -> None:
    """Compare every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of parquet files as on the Hub (default: noise)")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{processor()}, {torch.get_num_threads()} threads; images/s, medians of {args.repeats}")
    print(
        "model                   pixels  batch  "
        + "".join(f"{f'{n} workers':>11}" for n in WORKERS)
        + "       ours  ratio"
    )
    for word in args.models:
        name, pixels, batch_size = word.split(":")
        row = compare(args.data, Case(name, int(pixels), int(batch_size)), args.seconds, args.repeats)
        rows.append(row)
        plain = "".join(f"{row['medians'][f'{n} workers']:11,.0f}" for n in WORKERS)
        print(
            f"{name:22}  {pixels:>6}  {batch_size:>5}  {plain}  {row['medians']['ours']:9,.0f}  {row['ratio']:5.2f}",
            flush=True,
        )
        if args.json:
            where = facts("torch", "torchvision", "timm", "accelerate", "pillow")
            args.json.write_text(json.dumps(where | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
