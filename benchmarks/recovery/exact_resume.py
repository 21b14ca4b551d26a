"""Cut and resumed is equal to uninterrupted, bit for bit: every engine, precision and way to hold the data.

    python -m benchmarks.recovery.exact_resume --trials 1 [--seed 0] [--json FILE]

A trial is all of: one process, DDP and ZeRO-1, 2 and 3 on two; fp32 and bf16; resident and stream; a ViT with dropout
and stochastic depth, mixup, accumulation, and a moving average where the engine keeps one. Each run is cut in two
random steps, once by SIGTERM and once by kill -9, and given the same command again.
"""

from __future__ import annotations

import itertools
import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import Failures, begin, campaign, final_digest
from benchmarks.recovery.jobs import ROOT, Job, replace_everywhere

FLAGS = shlex.split(
    "--dataset digits --model test_vit --img-size 32 --wandb disabled --epochs 2 --batch-size 192 --micro-batch-size 48"
    " --lr 2e-3 --warmup-epochs 1 --clip-grad 1 --drop 0.2 --drop-path 0.2 --mixup 0.4 --smoothing 0.1 --log-every 1"
    " --shuffle-window 300 --checkpoint-every 2 --resume auto"
)
STEPS = 14
ENGINES = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


def under(engine: str, cut_at: int | None, number: signal.Signals, rank: int) -> None:
    """Ask for the engine, and for a signal in a step, as a launcher and a bad day would."""
    if engine.startswith("zero"):
        os.environ.update(
            ACCELERATE_USE_DEEPSPEED="true",
            ACCELERATE_DEEPSPEED_CONFIG_FILE=str(ROOT / "ds_configs" / f"{engine}.json"),
            ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
        )
    if cut_at is not None:
        replace_everywhere("cifar_dist.training.engine.train_step", partial(_cut, cut_at, number))


def _cut(at: int, number: signal.Signals, original: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count()

    def step(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    return step


def run(trials: int, seed: int, folder: Path) -> dict[str, Any]:
    """Every case, `trials` times with other cuts; a row for each, and failures."""
    begin(folder)
    dice, rows, failures = random.Random(seed), [], Failures()
    for engine, precision, mode in itertools.product(ENGINES, ("fp32", "bf16"), ("resident", "stream")):
        name, count = f"{engine}-{precision}-{mode}", ENGINES[engine]
        flags = [*FLAGS, "--precision", precision, "--data-mode", mode]
        flags += [] if engine == "zero3" else ["--model-ema-decay", "0.9"]
        same, cuts = 0, []

        def start(label: str, at: int | None = None, by: signal.Signals = signal.SIGKILL) -> list[int] | None:
            run_dir = folder / f"{name}-{label}"  # noqa: B023  used at once
            hook = partial(under, engine, at, by)  # noqa: B023
            job = Job([*flags, "--run-dir", str(run_dir)], count, folder / f"{name}.txt", hook=hook)  # noqa: B023
            statuses = job.wait(60 if by == signal.SIGKILL and at is not None else 180)
            job.end()
            return statuses

        whole = start("whole")
        for trial in range(trials):
            stop, death = sorted(dice.sample(range(1, STEPS), 2))
            cuts.append((stop, death))
            start(f"cut-{trial}", stop - 1, signal.SIGTERM)  # in the step that makes `stop`, which it ends
            start(f"cut-{trial}", death - stop)
            start(f"cut-{trial}")
            try:
                digests = {final_digest(folder / f"{name}-{label}") for label in ("whole", f"cut-{trial}")}
            except (OSError, IndexError):
                digests = set()
            if whole != [0] * count or len(digests) != 1:
                failures.add(f"{name} cut at {stop} and {death}: not the uninterrupted run's state: {folder}/{name}*")
            else:
                same += 1
                shutil.rmtree(folder / f"{name}-cut-{trial}")
        rows.append(
            {"engine": engine, "precision": precision, "data": mode, "runs": trials, "equal": same, "cut": cuts}
        )
    return {"rows": rows, "failures": failures}


if __name__ == "__main__":
    campaign(__doc__, run, trials=1)
