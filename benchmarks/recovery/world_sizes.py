"""R6: a run goes on with another number of processes: the same samples in every step, and the losses of one process.

    python -m benchmarks.recovery.world_sizes --trials 3 [--seed 0] [--json FILE]

A run of two epochs (28 steps; without batch norm and dropout, which depend on the number of processes) is cut at two
random steps and goes on each time with another number of processes: 1, 2, 1, then 2, 1, 2, then 2, 3, 1. Every process
notes the ids of the samples that count in each step. Together they must be those of the one-process run in every step,
each once an epoch, and every logged loss within 1e-6 (relative) of its.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import Failures, begin, campaign
from benchmarks.recovery.jobs import Job, replace_everywhere

FLAGS = shlex.split(
    "--dataset digits --model test_vit --img-size 32 --wandb disabled --epochs 2 --batch-size 96 --micro-batch-size 16"
    " --opt momentum --lr 2e-2 --warmup-epochs 1 --clip-grad 1 --mixup 0.4 --cutout 6 --smoothing 0.1 --log-every 1"
    " --resume auto"
)
EPOCH, WORLDS, TOLERANCE = 14, ((1, 2, 1), (2, 1, 2), (2, 3, 1)), 1e-6
Samples = dict[int, list[int]]  # by step, sorted ids


def notes_samples(folder: Path, life: int) -> Callable[[int], None]:
    """A hook: each process writes step and ids of every micro-batch to a file of its own."""

    def hook(rank: int) -> None:
        file = (folder / f"samples-{life}-{rank}.jsonl").open("a", buffering=1)

        def noting(make_batches: Callable[..., Any]) -> Callable[..., Any]:
            def made(*arguments: Any) -> Any:
                batches = make_batches(*arguments)
                parts = batches._parts

                def noted(step: int) -> Iterator[Any]:
                    for part in parts(step):
                        file.write(json.dumps([step, part.ids[part.weights.cpu() > 0].tolist()]) + "\n")
                        yield part

                batches._parts = noted
                return batches

            return made

        replace_everywhere("cifar_dist.training.stream_batches.make_batches", noting)

    return hook


def train_in_lives(folder: Path, lives: list[tuple[int, int]]) -> tuple[Samples, list[float]]:
    """Train up to each step with its number of processes; the samples of every step, and every loss."""
    folder.mkdir()
    for life, (count, steps) in enumerate(lives):
        flags = [*FLAGS, "--run-dir", str(folder / "run"), "--max-steps", str(steps)]
        job = Job(flags, count, folder / "said.txt", hook=notes_samples(folder, life))
        statuses = job.wait(180)
        job.end()
        if statuses is None or any(statuses):
            raise RuntimeError(f"{count} processes up to step {steps} ended with {statuses}")
    samples: Samples = {}
    for file in folder.glob("samples-*"):
        for step, ids in map(json.loads, file.read_text().splitlines()):
            samples[step] = sorted(samples.get(step, []) + ids)
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return samples, [record["train/loss"] for record in records if "train/loss" in record]


def run(trials: int, seed: int, folder: Path) -> dict[str, Any]:
    """Cut and go on; a row for each trial, and failures."""
    begin(folder)
    dice, rows, failures = random.Random(seed), [], Failures()
    expected, losses = train_in_lives(folder / "one", [(1, 2 * EPOCH)])
    for epoch in range(2):
        ids = [number for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for number in expected[step]]
        if len(ids) != len(set(ids)) or set(ids) != {number for step in range(EPOCH) for number in expected[step]}:
            failures.add(f"one process does not take every sample once in epoch {epoch}")
    for trial in range(trials):
        worlds, cuts = WORLDS[trial % len(WORLDS)], sorted(dice.sample(range(1, 2 * EPOCH), 2))
        place, failure, apart = folder / f"trial-{trial}", "", None
        try:
            samples, found = train_in_lives(place, list(zip(worlds, [*cuts, 2 * EPOCH], strict=True)))
            wrong = [step for step in expected if samples.get(step) != expected[step]]
            apart = max(abs(mine / theirs - 1) for mine, theirs in zip(found, losses, strict=True))
            if wrong:
                failure = f"other samples in steps {wrong}"
            elif apart > TOLERANCE:
                failure = f"a loss is {apart:.1e} from the one-process run's"
        except (RuntimeError, ValueError) as error:
            failure = str(error)
        rows.append(
            {
                "processes": " > ".join(map(str, worlds)),
                "cut after": " and ".join(map(str, cuts)),
                "largest relative difference of a loss": None if apart is None else f"{apart:.1e}",
                "ok": not failure,
            }
        )
        if failure:
            failures.add(f"trial {trial}, seed {seed}: {worlds} cut after {cuts}: {failure}: {place}")
        else:
            shutil.rmtree(place)
    return {"rows": rows, "failures": failures}


if __name__ == "__main__":
    campaign(__doc__, run, trials=3)
