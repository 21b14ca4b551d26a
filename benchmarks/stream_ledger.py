"""A ledger of a streamed data set: which rows each process is given, step by step, and whether the images are theirs.

    python benchmarks/stream_ledger.py --data DIR_WITH_HUB_PARQUET

Writes the train split anew as 1 and as 20 files of unequal length. For 1, 2 and 3 processes (each an operating-system
process of its own) it streams two epochs, and again with a cut at a random step after which another number of processes
goes on. Checked against PIL and pyarrow alone: every row once an epoch over all processes, the same rows in the same
step for every number of processes, and every image and label equal to the row's own. Exit status 1 if anything differs.
"""

import argparse
import io
import itertools
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.data import load_training_data
from cifar_dist.data.stream import StreamSet
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.training.stream_batches import StreamBatches

PIXELS = InputConfig(32, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "bilinear")
FLAGS = "--model cnn4 --data-mode stream --batch-size 510 --epochs 2 --crop-padding 0 --hflip 0 --shuffle-window 4096"
WORLDS = (1, 2, 3)
Given = tuple[int, int, int]  # sample id, the sum of its pixels, weighted by place, and its label
Ledger = dict[int, list[Given]]  # by step


def checksums(images: torch.Tensor) -> list[int]:
    """One whole number for each image (B,3,32,32) of greys, that depends on every pixel's place."""
    weights = torch.arange(1, 3 * 32 * 32 + 1)
    return (images.flatten(1).round().long() * weights).sum(1).tolist()


def batches_of(folder: Path, process: int, processes: int) -> tuple[StreamBatches, int]:
    """What train.py would give this process, and the steps of two epochs."""
    config = parse_command_line(["--dataset", str(folder), "--cache-dir", str(folder / "cache"), *FLAGS.split()]).config
    train = load_training_data(config.data, 2**40).train
    assert isinstance(train, StreamSet)
    plan = make_plan(config, Sizes(len(train), 0, None, 10, 0, 0, 0, 0), processes)
    accelerator = SimpleNamespace(process_index=process, device=torch.device("cpu"))
    parallel: Any = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    return StreamBatches(train, config, plan, PIXELS, parallel), plan.total_steps


def keep_ledger(folder: Path, process: int, processes: int, first: int, last: int, answer: Any) -> None:
    """Send this process's ledger of the steps from `first` to before `last`."""
    torch.set_num_threads(1)
    batches, _ = batches_of(folder, process, processes)
    seen: Ledger = {}
    for step in range(first, last):
        given = []
        rows, weights = batches._own(step)
        found = [
            pair
            for batch in batches(step)
            for pair in zip(checksums(batch.images), batch.targets.tolist(), strict=True)
        ]
        for row, weight, (number, label) in zip(rows.tolist(), weights.tolist(), found, strict=True):
            if weight > 0:
                given.append((row, number, label))
        seen[step] = given
    batches.close()
    answer.send(seen)


def together(folder: Path, processes: int, first: int, last: int) -> Ledger:
    """The ledgers of all processes as one."""
    pipes, workers = [], []
    for process in range(processes):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        work = (folder, process, processes, first, last, theirs)
        workers.append(multiprocessing.Process(target=keep_ledger, args=work))
        workers[-1].start()
        pipes.append(ours)
    parts = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    return {step: [given for part in parts for given in part[step]] for step in range(first, last)}


def rewrite(table: pyarrow.Table, test: Path, folder: Path, files: int) -> None:
    """The table as `files` parquet files of unequal length."""
    (folder / "plain_text").mkdir(parents=True)
    cuts = (np.linspace(0, 1, files + 1) ** 1.5 * len(table)).astype(int)
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        name = folder / "plain_text" / f"train-{number:05d}-of-{files:05d}.parquet"
        pyarrow.parquet.write_table(table.slice(first, last - first), name, row_group_size=1000)
    (folder / "plain_text" / "test-00000-of-00001.parquet").symlink_to(test)


def truth(table: pyarrow.Table) -> list[int]:
    """The checksum of every row, decoded by PIL."""
    sums = []
    for value in table.column("img").to_pylist():
        image = np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGB"))
        sums += checksums(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    return sums


def faults(by_step: list[list[Given]], reference: list[list[Given]], ids: set[int], own: list[Given]) -> list[int]:
    """Rows lost, repeated, with a wrong image and with a wrong label, and steps with other rows than the reference's.

    Args:
        by_step: what was given in each step of two epochs.
        reference: the same, given to one process.
        ids: the sample ids of an epoch.
        own: every row as it is.
    """
    halves = by_step[: len(by_step) // 2], by_step[len(by_step) // 2 :]
    epochs = [list(itertools.chain(*half)) for half in halves]
    return [
        sum(len(ids - {row for row, _, _ in epoch}) for epoch in epochs),
        sum(len(epoch) - len({row for row, _, _ in epoch}) for epoch in epochs),
        sum(own[row][1] != number for epoch in epochs for row, number, _ in epoch),
        sum(own[row][2] != label for epoch in epochs for row, _, label in epoch),
        sum(mine != theirs for mine, theirs in zip(by_step, reference, strict=True)),
    ]


def main() -> int:
    """Keep and check all ledgers; print a row each. Returns 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data.resolve()
    table = pyarrow.parquet.read_table(next(data.rglob("train-*.parquet")))
    test = next(data.rglob("test-*.parquet"))
    own = list(zip(range(len(table)), truth(table), table.column("label").to_pylist(), strict=True))
    faulty = False
    print(
        "files  processes  cut at  goes on with  rows an epoch  lost  repeated  wrong image  wrong label  other order"
        "  seconds"
    )
    for files in (1, 20):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "set"
            rewrite(table, test, folder, files)
            batches, steps = batches_of(folder, 0, 1)
            ids, reference = set(batches._data.ids.tolist()), None
            cuts = random.Random(files)
            for processes, after in itertools.product(WORLDS, (None, *WORLDS)):
                began, cut = time.perf_counter(), steps if after is None else cuts.randrange(1, steps)
                ledger = together(folder, processes, 0, cut)
                if after is not None:
                    ledger |= together(folder, after, cut, steps)
                by_step = [sorted(ledger[step]) for step in range(steps)]
                reference = reference or by_step
                found = faults(by_step, reference, ids, own)
                faulty = faulty or any(found)
                goes_on = f"{'':6}  {'':12}" if after is None else f"{cut:6}  {after:12}"
                lost, repeated, image, label, order = found
                print(
                    f"{files:5}  {processes:9}  {goes_on}  {len(ids):13}  {lost:4}  {repeated:8}  {image:11}"
                    f"  {label:11}  {order:11}  {time.perf_counter() - began:7.1f}",
                    flush=True,
                )
    return int(faulty)


if __name__ == "__main__":
    raise SystemExit(main())
