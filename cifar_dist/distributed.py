"""Starting Accelerate, and the few things processes say to each other."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed

from cifar_dist.errors import UsageError

T = TypeVar("T")


def start(precision: str) -> Accelerator:
    """Join the process group that the launcher asked for, or refuse.

    Args:
        precision: fp32, bf16 or fp16; the compute type of autocast.

    Raises:
        UsageError: the device lacks the precision, or the processes would train side by side
            without sharing gradients.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; take bf16 or fp32 on a CPU.")
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise UsageError(f"--precision {precision} does not work on this device: {error}") from None
    if on_cpu:
        _keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}; launch with"
            " torchrun --nproc-per-node N train.py …, or accelerate launch --num_processes N train.py …"
        )
    if launched > 1 and accelerator.distributed_type == DistributedType.NO:
        raise UsageError(f"{launched} processes were started but none would share gradients; check the launch config.")
    return accelerator


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel and faulting it in again every step.

    ``mallopt(3)``: blocks up to 32 MiB, the largest value it takes, come from the heap, and the heap is not trimmed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 * 2**20)
    mallopt(m_trim_threshold, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every process, so that all build the same weights."""
    set_seed(seed)


def seed_process(accelerator: Accelerator, seed: int) -> None:
    """Give each process a random stream of its own for dropout and stochastic depth."""
    torch.manual_seed(seed * 1_000_003 + accelerator.process_index)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process and hand its result, or its `UsageError`, to every process."""
    outcome: list[object] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UsageError as error:
            outcome[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UsageError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def total(accelerator: Accelerator, sums: torch.Tensor) -> list[float]:
    """Sum a small float64 tensor over all processes and fetch it: one collective, one host sync."""
    return accelerator.reduce(sums, reduction="sum").tolist()


def finish(accelerator: Accelerator) -> None:
    """Leave the process group, so that no process waits for one that has gone."""
    accelerator.end_training()
