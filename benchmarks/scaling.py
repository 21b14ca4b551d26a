"""Step time on 1 to 512 GPUs, reckoned from operations, bytes and link speeds; and the reckoning against this machine.

    python -m benchmarks.scaling                                   # tables, as in benchmarks/results/scaling.md
    python -m benchmarks.scaling --gpu FILE                        # with speeds that benchmarks.gpu measured
    python -m benchmarks.scaling --measure [--data DIR] [--json FILE]

A step is computing, the optimizer's pass over memory, and what of the communication does not hide behind computing.
Parameters and operations are counted by cifar_dist, batches are the recipes'; the rest is below, each with its source.
Messages take alpha + bytes / beta. All-reduce is the better of a ring, 2 (p-1) alpha + 2 (p-1)/p n/beta (Patarasuk and
Yuan 2009), and a double binary tree (Sanders, Speck and Traeff 2009), as NCCL chooses between them; all-gather and
reduce-scatter are half a ring. A process sends 2 n in DDP and ZeRO-1 and -2, 3 n in ZeRO-3 (Rajbhandari et al. 2020).

--measure trains on 1, 2 and 3 gloo processes of this machine with one thread each, measures the links and one process,
and prints what the same functions make of that beside the steps that were measured (see scaling_measured).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import RESNET, SWIN, VIT, WRN
from benchmarks.gpu_rows import PLAIN, Case, count_operators, flops_of
from cifar_dist.command_line import parse_command_line
from cifar_dist.cost.flops import Peak, mfu
from cifar_dist.cost.peak import DATA_SHEETS
from cifar_dist.memory import ZERO_BUCKET
from cifar_dist.models import build_model, count_parameters

COUNTS = tuple(2**power for power in range(10))
RECIPES = {VIT: "vit_base", SWIN: "swin_base", RESNET: "resnet18_25epochs", WRN: "wrn28_10_25epochs"}  # recipes/best
PEAK = Peak(1e12 * (DATA_SHEETS["H100 80GB HBM3"][1] or 0), "NVIDIA's data sheet")
GRADIENT_BYTES = 4  # a number: gradients and weights are fp32 on every engine, also under bf16 (cifar_dist.memory)
DDP_BUCKET_BYTES = 25 * 2**20  # torch's bucket_cap_mb
MEMORY_BYTES_PER_SECOND = 3.35e12  # H100 SXM, NVIDIA's data sheet
UPDATE_BYTES = 32  # a parameter: AdamW reads and writes weight and moments, reads the gradient, and its norm was taken
OPERATOR_SECONDS = 5e-6  # of Python and PyTorch before a kernel can start: an assumption
FLAGS_BYTES = 5 * 4  # what processes agree on at the end of a step (cifar_dist.control)
WORTH = 1.2  # twice the processes must make a step this much shorter


@dataclass(frozen=True)
class Link:
    """What a message takes: seconds before its first byte arrives, and bytes/s of one direction."""

    alpha_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` processes; `inner` joins those of a node, `outer` is all that leaves one."""

    name: str
    inner: Link
    outer: Link
    per_node: int = 8

    def nodes(self, count: int) -> int:
        """That `count` processes need."""
        return -(-count // self.per_node)

    def ring(self, count: int) -> Link:
        """The mean latency and the narrowest place of a ring through all processes, node by node."""
        nodes = self.nodes(count)
        if nodes == 1:
            return self.inner
        alpha = ((count - nodes) * self.inner.alpha_seconds + nodes * self.outer.alpha_seconds) / count
        return Link(alpha, min(self.inner.bytes_per_second, self.outer.bytes_per_second))


# Latencies: NCCL's own (src/graph/tuning.cc, hwLat, Ring, Simple). NVLink 4: 900 GB/s in both directions together;
# a ConnectX-7 of 400 Gb/s for each of a node's 8 GPUs (DGX H100); PCIe 5.0 x 16: 64 GB/s a direction.
NVLINK = Cluster("NVLink, 8 x 400 Gb/s InfiniBand", Link(3.4e-6, 450e9), Link(14e-6, 8 * 50e9))
PCIE = Cluster("PCIe 5, 1 x 400 Gb/s InfiniBand", Link(5.7e-6, 64e9), Link(14e-6, 50e9))


@dataclass(frozen=True)
class Work:
    """What a step of one process has to do.

    Attributes:
        parameters: that train.
        image_seconds: computing for one image, forward and backward.
        floor_seconds: no step computes in less, however few its images.
        update_seconds: the optimizer's, over all parameters.
    """

    parameters: int
    image_seconds: float
    floor_seconds: float = 0.0
    update_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Of all gradients, or all weights."""
        return GRADIENT_BYTES * self.parameters


def half_ring(count: int, nbytes: float, cluster: Cluster) -> float:
    """Seconds of an all-gather or a reduce-scatter of `nbytes` in all."""
    link = cluster.ring(count)
    return (count - 1) * (link.alpha_seconds + nbytes / count / link.bytes_per_second)


def all_reduce(count: int, nbytes: float, cluster: Cluster) -> float:
    """Seconds of an all-reduce: a ring, or a double binary tree over nodes with a chain in each, if that is faster."""
    ring = 2 * half_ring(count, nbytes, cluster)
    if (nodes := cluster.nodes(count)) == 1:
        return ring
    depth = (cluster.per_node - 1) * cluster.inner.alpha_seconds + math.log2(nodes) * cluster.outer.alpha_seconds
    return min(ring, 2 * depth + 2 * nbytes / cluster.ring(count).bytes_per_second)


def exposed_seconds(work: Work, engine: str, count: int, computing: float, cluster: Cluster) -> float:
    """What a step waits for others. Two thirds of computing are backward.

    DDP sends a bucket as soon as backward has filled it, so that all but the last hide behind the rest of backward.
    DeepSpeed's stages 1 and 2 hide nothing unless told (overlap_comm), and gather the weights after the update. Stage 3
    gathers them in forward and backward and reduces in backward, all but the first and the last bucket hidden. At the
    end of every step processes agree on a few flags.

    Args:
        work: of the step.
        engine: ddp, zero1, zero2 or zero3.
        count: processes.
        computing: seconds of one process's forward and backward.
        cluster: of the processes.
    """
    if count == 1:
        return 0.0
    buckets = -(-work.nbytes // (DDP_BUCKET_BYTES if engine == "ddp" else GRADIENT_BYTES * ZERO_BUCKET))
    part = work.nbytes / buckets
    forward, backward = computing / 3, computing * 2 / 3
    verdict = all_reduce(count, FLAGS_BYTES, cluster)
    if engine == "ddp":
        one = all_reduce(count, part, cluster)
        return verdict + max(one, buckets * one - (1 - 1 / buckets) * backward)
    one = half_ring(count, part, cluster)
    if engine in ("zero1", "zero2"):
        return verdict + 2 * buckets * one
    return verdict + max(one, buckets * one - forward) + max(one, 2 * buckets * one - backward)


def step_seconds(work: Work, engine: str, count: int, micro: float, cluster: Cluster) -> float:
    """A step of `count` processes with `micro` images each, without accumulation."""
    computing = max(micro * work.image_seconds, work.floor_seconds)
    update = work.update_seconds / (count if engine.startswith("zero") else 1)
    return computing + update + exposed_seconds(work, engine, count, computing, cluster)


def last_gain(work: Work, batch: int, cluster: Cluster) -> int:
    """The most processes that a global batch is worth: twice as many would not make a step `WORTH` times shorter."""
    count = 1
    while batch % (2 * count) == 0:
        steps = [step_seconds(work, "ddp", c, batch / c, cluster) for c in (count, 2 * count)]
        if steps[0] < WORTH * steps[1]:
            break
        count *= 2
    return count


def examples_factor(batch: float, noise_scale: float) -> float:
    """How many times the fewest possible images a training needs: 1 + B / B_noise (McCandlish et al. 2018)."""
    return 1 + batch / noise_scale


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
        from benchmarks.scaling_measured import measure

        measure(args.data, args.json)
        return
    print(*tables(args.gpu), sep="\n")


if __name__ == "__main__":
    main()
