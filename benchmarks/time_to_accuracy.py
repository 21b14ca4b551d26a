"""Time to the same top-1 on a CPU: trained as train.py does it, and by the loop that everyone writes, in one process.

    python -m benchmarks.time_to_accuracy --data DIR_WITH_HUB_PARQUET --json FILE [--models cnn4 …]

AdamW at one rate, bf16, same first weights: ours as benchmarks.cpu has it, the other benchmarks/plain_loop.py, no
workers; what train.py tells malloc serves both here. In turn they train a few steps, once no other process computes;
after a chunk the same code scores both on the first test images. A race ends when both reached the target, or after
--minutes of steps. `ratio` is of all steps' seconds, `ratio_at_median` of steps times a median step's. The images'
order and draws differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_seed

from benchmarks.cpu import layout
from benchmarks.gpu import real
from benchmarks.gpu_rows import PRECISION, Bench, Case, Ours, Way
from benchmarks.machine import facts
from benchmarks.plain_loop import MEAN, STD, PlainLoop, Setting
from cifar_dist.config import DataConfig, InputConfig, ModelConfig
from cifar_dist.cost.peak import device_peak
from cifar_dist.data import load_test_data
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import device_bytes, start
from cifar_dist.durable import replace_text
from cifar_dist.models import input_config
from cifar_dist.training.engine import Evaluator


@dataclass(frozen=True)
class Goal:
    """Top-1 `target` at `learning_rate`, scored every `chunk` steps on `test_images` images, `races` times."""

    model: str
    img_size: int
    batch_size: int
    learning_rate: float
    target: float
    chunk: int
    test_images: int
    races: int = 1


@dataclass(frozen=True)
class Mark:
    """Where a loop was after so many steps: their seconds, and the top-1 (a fraction) they led to."""

    steps: float
    seconds: float
    top1: float


TURNS, BUSY_PERCENT = 5, 10  # that a chunk is cut into; of all cores, when they are not ours alone
GOALS = (
    Goal("cnn4", 32, 64, 1e-3, 0.60, 100, 5000, races=3),
    Goal("resnet18_cifar", 32, 128, 1e-3, 0.45, 20, 2000),
    Goal("resnet18", 224, 32, 1e-3, 0.30, 20, 500),
    Goal("vit_tiny_patch16_224", 224, 32, 3e-4, 0.25, 20, 500),
)


def reached(marks: list[Mark], target: float) -> Mark | None:
    """Where top-1 first was `target`, on the line between two marks; None if it never was."""
    for before, after in pairwise(marks):
        if before.top1 < target <= after.top1:
            part = (target - before.top1) / (after.top1 - before.top1)
            steps = before.steps + part * (after.steps - before.steps)
            return Mark(steps, before.seconds + part * (after.seconds - before.seconds), target)
    return None


def score(bench: Bench, loop: Ours | PlainLoop, goal: Goal, test: ResidentSet) -> float:
    """Top-1 of what a loop trains, on images that are normalised and resized as in its training."""
    config, plain = ModelConfig(goal.model, img_size=goal.img_size), InputConfig(goal.img_size, MEAN, STD, "bilinear")
    own = input_config(loop.model, config) if isinstance(loop, Ours) else plain
    preprocess = Preprocess(own, bench.device, torch.float32)
    found = Evaluator(bench.accelerator, preprocess, 100, PRECISION).scores(loop.model, test)
    loop.model.train()
    return found["top1"]


def race(bench: Bench, goal: Goal, test: ResidentSet, seed: int, limit_seconds: float) -> dict[str, Any]:
    """Train both, in turn, until both are there or `limit_seconds` are over."""
    case, test = Case(goal.model, goal.img_size, goal.batch_size), test.take(torch.arange(goal.test_images))
    (nhwc, _), turn = layout(case), goal.chunk // TURNS
    setting = Setting(case.model, case.img_size, case.batch_size, PRECISION, 0, True, goal.learning_rate)
    flags = f"--lr {goal.learning_rate} --sched constant --seed {seed}"
    loops: dict[str, Any] = {"ours": Ours(bench, case, Way("ours", channels_last=nhwc), flags)}
    set_seed(seed)
    with closing(PlainLoop(bench.pictures, setting)) as loops["plain"]:
        turns: dict[str, list[float]] = {"ours": [], "plain": []}
        marks = {name: [Mark(0, 0.0, score(bench, loop, goal, test))] for name, loop in loops.items()}
        while sum(map(sum, turns.values())) < limit_seconds:
            for name, loop in list(loops.items()) * TURNS:
                while psutil.cpu_percent(0.2) > BUSY_PERCENT:
                    pass
                turns[name].append(loop.run(turn))
            for name, loop in loops.items():
                marks[name].append(Mark(len(turns[name]) * turn, sum(turns[name]), score(bench, loop, goal, test)))
            print(case.model, *(f"  {name} {own[-1]}" for name, own in marks.items()), flush=True)
            if all(reached(own, goal.target) for own in marks.values()):
                break
    bench.accelerator.free_memory()
    ours, plain = (reached(marks[name], goal.target) for name in ("ours", "plain"))
    step = {name: statistics.median(own) / turn for name, own in turns.items()}
    return asdict(goal) | {
        "seed": seed, "channels_last": nhwc, "step_seconds": step, "turn_seconds": turns,
        "reached": {"ours": ours and asdict(ours), "plain": plain and asdict(plain)},
        "ratio": plain.seconds / ours.seconds if ours and plain else None,
        "ratio_at_median": plain.steps * step["plain"] / (ours.steps * step["ours"]) if ours and plain else None,
        "marks": {name: [asdict(mark) for mark in own] for name, own in marks.items()},
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Race in every model, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of parquet files as on the Hub")
    parser.add_argument("--models", nargs="+", default=[goal.model for goal in GOALS])
    parser.add_argument("--minutes", type=float, default=12.0, help="of steps in a race, both loops together")
    parser.add_argument("--json", type=Path, required=True)
    args, accelerator = parser.parse_args(words), start(PRECISION)
    data, pictures = real(args.data, device_bytes(accelerator))
    bench = Bench(accelerator, data, pictures, device_peak(accelerator.device, PRECISION), 0.0)
    where = facts("torch", "torchvision", "timm", "accelerate", "pillow")
    test, rows = load_test_data(DataConfig(dataset=args.data)).test, []
    for goal in GOALS:
        for seed in range(goal.races if goal.model in args.models else 0):
            rows.append(race(bench, goal, test, seed, 60 * args.minutes))
            print(goal.model, *(rows[-1][name] for name in ("reached", "ratio", "ratio_at_median")), flush=True)
            replace_text(args.json, json.dumps(where | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
