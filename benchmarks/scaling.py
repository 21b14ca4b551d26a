"""Step time on 1 to 512 GPUs, reckoned from operations, bytes and link speeds; and the reckoning against this machine.

    python -m benchmarks.scaling                                   # tables, as in benchmarks/results/scaling.md
    python -m benchmarks.scaling --gpu FILE                        # with speeds that benchmarks.gpu measured
    python -m benchmarks.scaling --measure [--data DIR] [--json FILE]

A step is computing, the optimizer's pass over memory, and what of the communication does not hide behind computing.
Parameters and operations are counted by cifar_dist, batches are the recipes'; the rest is below and in scaling_model,
each with its source.

--measure trains on 1, 2 and 3 gloo processes of this machine with one thread each, measures the links and one process,
and prints what the same functions make of that beside the steps that were measured (see scaling_measured).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu import RESNET, SWIN, VIT, WRN
from benchmarks.gpu_rows import PLAIN, Case, count_operators, flops_of
from benchmarks.scaling_measured import measure
from benchmarks.scaling_model import NVLINK, PCIE, Work, examples_factor, last_gain, step_seconds
from cifar_dist.command_line import parse_command_line
from cifar_dist.cost.flops import Peak, mfu
from cifar_dist.cost.peak import DATA_SHEETS
from cifar_dist.models import build_model, count_parameters

COUNTS = tuple(2**power for power in range(10))
RECIPES = {VIT: "vit_base", SWIN: "swin_base", RESNET: "resnet18_25epochs", WRN: "wrn28_10_25epochs"}  # recipes/best
PEAK = Peak(1e12 * (DATA_SHEETS["H100 80GB HBM3"][1] or 0), "NVIDIA's data sheet")
MEMORY_BYTES_PER_SECOND = 3.35e12  # H100 SXM, NVIDIA's data sheet
UPDATE_BYTES = 32  # a parameter: AdamW reads and writes weight and moments, reads the gradient, and its norm was taken
OPERATOR_SECONDS = 5e-6  # of Python and PyTorch before a kernel can start: an assumption


def work_of(case: Case, images_per_second: float) -> Work:
    """A model's work on one H100 that trains so many images/s."""
    with torch.device("meta"):
        model = build_model(parse_command_line(["--model", case.model]).config.model, 10)
    _, parameters = count_parameters(model)
    update = UPDATE_BYTES * parameters / MEMORY_BYTES_PER_SECOND
    return Work(parameters, 1 / images_per_second, count_operators(case) * OPERATOR_SECONDS, update)


def batch_of(case: Case) -> int:
    """Its recipe's global batch."""
    return parse_command_line(["--config", f"recipes/best/{RECIPES[case]}.yaml"]).config.run.batch_size


def markdown(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A table."""
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""


def fixed_batch(works: dict[Case, Work]) -> Iterator[str]:
    """What more processes bring when the global batch, and so the training, stays the recipe's."""
    for cluster in (NVLINK, PCIE):
        rows = []
        for count in COUNTS:
            cells = [str(count)]
            for case, work in works.items():
                batch = batch_of(case)
                if batch % count:
                    cells.append("")
                    continue
                one, many = (step_seconds(work, "ddp", c, batch / c, cluster) for c in (1, count))
                cells.append(f"{batch // count}: {1e3 * many:.1f} ms, {one / many:.1f} x, {one / many / count:.0%}")
            if any(cells[1:]):
                rows.append(cells)
        ends = [str(last_gain(work, batch_of(case), cluster)) for case, work in works.items()]
        rows.append(["worth it up to", *ends])
        yield f"DDP, {cluster.name}: images a process, a step, speed-up, efficiency\n"
        yield from markdown(["processes", *(f"{case.model}, batch {batch_of(case)}" for case in works)], rows)


def growing_batch(works: dict[Case, Work]) -> Iterator[str]:
    """What is left of each process's speed when all keep the recipe's whole batch, for each engine."""
    counts = (2, 8, 16, 64, 512)
    for cluster in (NVLINK, PCIE):
        rows = []
        for case, work in works.items():
            for engine in ("ddp", "zero1", "zero3"):
                batch = batch_of(case)
                one = step_seconds(work, engine, 1, batch, cluster)
                found = [f"{one / step_seconds(work, engine, count, batch, cluster):.0%}" for count in counts]
                rows.append([case.model, {"zero1": "zero1, zero2"}.get(engine, engine), *found])
        yield f"{cluster.name}: efficiency with the recipe's batch on every process\n"
        yield from markdown(["model", "engine", *map(str, counts)], rows)


def critical_batch(batch: int) -> Iterator[str]:
    """How much sooner a training is done if the batch grows with the processes and each keeps all of its speed."""
    scales = (1000, 4000, 16000)
    rows = [
        [f"{count}", f"{batch * count:,}"]
        + [f"{count * examples_factor(batch, s) / examples_factor(batch * count, s):.1f} x" for s in scales]
        for count in COUNTS
    ]
    rows.append(["ever more", "", *(f"{1 + s / batch:.1f} x" for s in scales)])
    yield from markdown(["processes", "global batch", *(f"noise scale {s:,}" for s in scales)], rows)


def rates(path: Path | None) -> dict[Case, float]:
    """Images/s of one GPU: the best that `benchmarks.gpu` measured of the project's, or its aims."""
    found = {case: case.images_per_second for case in RECIPES}
    rows = json.loads(path.read_text())["rows"] if path else []
    for case in RECIPES:
        own = [row for row in rows if row["case"]["model"] == case.model and row["way"]["name"] != PLAIN.name]
        found[case] = max((row["images_per_second"] or 0.0 for row in own), default=0.0) or found[case]
    return found


def tables(path: Path | None) -> Iterator[str]:
    """All tables, line by line."""
    speeds = rates(path)
    works = {case: work_of(case, speed) for case, speed in speeds.items()}
    rows = []
    for case, work in works.items():
        flops = flops_of(case.model, case.img_size)
        numbers = [f"{work.parameters / 1e6:.1f}", f"{flops.forward / 1e9:.2f}", f"{speeds[case]:,.0f}"]
        numbers += [f"{mfu(flops, speeds[case], 1, PEAK):.0%}", f"{1e3 * work.update_seconds:.2f}"]
        rows.append([case.model, *numbers, f"{1e3 * work.floor_seconds:.1f}"])
    header = ["model", "parameters, M", "forward, GFLOP", "images/s of one", "MFU", "optimizer, ms", "floor, ms"]
    yield from markdown(header, rows)
    yield from fixed_batch(works)
    yield from growing_batch(works)
    yield from critical_batch(batch_of(VIT))


def main() -> None:
    """Print the tables, or measure here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=Path, help="JSON file of benchmarks.gpu (default: its aims)")
    parser.add_argument("--measure", action="store_true", help="1, 2 and 3 gloo processes on this machine instead")
    parser.add_argument("--data", default="digits", help="as train.py's --dataset")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.measure:
        measure(args.data, args.json)
        return
    print(*tables(args.gpu), sep="\n")


if __name__ == "__main__":
    main()
