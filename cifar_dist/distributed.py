"""Starting Accelerate, and the few things processes say to each other."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed

from cifar_dist.errors import FAILURE_STATUS, UsageError

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(precision: str) -> Accelerator:
    """Join the process group that the launcher asked for, or refuse.

    Args:
        precision: fp32, bf16 or fp16; the compute type of autocast.

    Raises:
        UsageError: the device lacks the precision, or the processes would train side by side
            without sharing gradients.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if missing := [name for name in LAUNCHER_VARIABLES if launched > 1 and name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {launched} but {', '.join(missing)} are not set; start with torchrun --nproc-per-node N."
        )
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; take bf16 or fp32 on a CPU.")
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise UsageError(f"Accelerate does not start with --precision {precision}: {error}") from None
    if on_cpu:
        _keep_freed_memory()
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}; launch with"
            " torchrun --nproc-per-node N train.py …"
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


def seed_process(accelerator: Accelerator, seed: int, step: int) -> None:
    """Give each process a random stream of its own for dropout and stochastic depth, from `step` on."""
    words = np.random.SeedSequence([seed, step, accelerator.process_index]).generate_state(1)
    torch.manual_seed(int(words[0]))


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process and hand its result to every process, or end them all if it fails.

    Raises:
        UsageError: `work` raised it, on every process.
        SystemExit: `work` failed otherwise, on the others than the main process, where its own error goes on.
    """
    outcome: list[object] = [None]
    error: BaseException | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except BaseException as raised:
            error = raised
            outcome[0] = raised if isinstance(raised, UsageError) else SystemExit(FAILURE_STATUS)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if error is not None:
        raise error
    if isinstance(outcome[0], (UsageError, SystemExit)):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def share_buffers(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Give every process the main process's buffers (BatchNorm statistics), so that all evaluate one model."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def total(accelerator: Accelerator, sums: torch.Tensor) -> list[float]:
    """Sum a small float64 tensor over all processes and fetch it: one collective, one host sync."""
    return accelerator.reduce(sums, reduction="sum").tolist()


def finish(accelerator: Accelerator) -> None:
    """Leave the process group, so that no process waits for one that has gone."""
    accelerator.end_training()
