"""What a process may use of its node: its part of the cores and of the memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from cifar_dist.distributed import slurm


def own_cores() -> int:
    """Cores that are this process's part of those that its node's processes may use; 1 at least.

    srun mostly binds each task to cores of its own; processes of other launchers have theirs in common.
    """
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_srun = slurm.in_step() and "TORCHELASTIC_RUN_ID" not in os.environ
    all_here = int(os.environ.get("SLURM_CPUS_ON_NODE", free)) if by_srun else free
    return max(min(free, all_here // _processes()), 1)


def own_memory_bytes(root: Path = Path("/")) -> int:
    """This process's part of the memory that its node's processes may use together.

    That is the machine's, or less where a control group says so: a container's, or that of a SLURM job.

    Args:
        root: of the file system.
    """
    limits = [psutil.virtual_memory().total]
    with suppress(OSError):  # no Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):  # of versions 2 and 1
                file = "memory.limit_in_bytes" if kinds else "memory.max"
                limits += _limits(root / "sys/fs/cgroup" / kinds / path.lstrip("/"), file)
    return min(limits) // _processes()


def _limits(folder: Path, file: str) -> list[int]:
    """Those of a group and of all that it lies in."""
    found = []
    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # there is none, or it is `max`
            found.append(int((place / file).read_text()))
    return found


def _processes() -> int:
    """How many of the job's there are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
