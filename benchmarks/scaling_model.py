"""The reckoning of scaling.py: what messages take on a cluster, and how much of that a step shows.

Messages take alpha + bytes / beta. All-reduce is the better of a ring, 2 (p-1) alpha + 2 (p-1)/p n/beta (Patarasuk and
Yuan 2009), and a double binary tree (Sanders, Speck and Traeff 2009), as NCCL chooses between them; all-gather and
reduce-scatter are half a ring. A process sends 2 n in DDP and ZeRO-1 and -2, 3 n in ZeRO-3 (Rajbhandari et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cifar_dist.memory import ZERO_BUCKET

GRADIENT_BYTES = 4  # a number: gradients and weights are fp32 on every engine, also under bf16 (cifar_dist.memory)
DDP_BUCKET_BYTES = 25 * 2**20  # torch's bucket_cap_mb
FLAGS_BYTES = 5 * 4  # what processes agree on at the end of a step (cifar_dist.distributed.control)
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
