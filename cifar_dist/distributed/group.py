"""Starting Accelerate, and the few things processes say to each other."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from cifar_dist.distributed import peers
from cifar_dist.distributed.ending import FAILURE_STATUS
from cifar_dist.distributed.hardware import refuse_unknown_gpu
from cifar_dist.distributed.launch import prepare_environment
from cifar_dist.distributed.node import own_cores, own_memory_bytes
from cifar_dist.errors import UsageError

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(precision: str, timeout_seconds: int = 600) -> Accelerator:
    """Join the process group that the launcher asked for, or refuse.

    Args:
        precision: fp32, bf16 or fp16; the compute type of autocast. ZeRO and FSDP set up bf16 themselves. With auto
            Accelerate is to be started again (`restart`) once that is known.
        timeout_seconds: how long a process waits for the others, at the start and in any collective.

    Raises:
        UsageError: the launcher, the machine, its GPUs, torch and the precision do not fit together, processes are
            missing, or they would train side by side without sharing gradients.
    """
    launch = prepare_environment(precision)
    if launch.on_cpu and precision == "fp16" and not launch.deepspeed:
        raise UsageError("--precision fp16 needs a GPU; take bf16 or fp32 on a CPU.")
    sharded = launch.deepspeed or launch.fsdp
    autocast = _mixed_precision(precision, sharded)
    # Accelerate leaves out a timeout that equals its default for NCCL, and gloo's own is another.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds, microseconds=1))
    if launch.on_cpu and launch.grouped:
        group.backend = "gloo"
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        with launch.waiting(timeout_seconds):
            launch.wait_for_rank_0(timeout_seconds)
            accelerator = Accelerator(
                cpu=launch.on_cpu and not launch.deepspeed, mixed_precision=autocast, kwargs_handlers=[group, ddp]
            )
    except ValueError as error:
        raise UsageError(f"Accelerate does not start (--precision {precision}): {error}") from None
    except NotImplementedError as error:  # of GPUs that cannot reach each other
        raise UsageError(f"Accelerate does not start: {error}") from None
    except torch.distributed.DistError as error:
        raise UsageError(launch.absence(str(error), timeout_seconds)) from None
    if launch.on_cpu:
        keep_freed_memory()
    else:
        refuse_unknown_gpu(accelerator.device)
    share_cores()
    torch.backends.cudnn.deterministic = True  # else fp32 gradients of convolutions are summed in any order
    torch.set_float32_matmul_precision("highest")  # as torch has it; NVIDIA's containers have it otherwise
    launch.check(accelerator.num_processes, accelerator.distributed_type)
    peers.remember(gather(accelerator, peers.me()))
    return accelerator


def _mixed_precision(precision: str, sharded: bool) -> str:
    """What Accelerate is told; under ZeRO and FSDP the engines here set up bf16."""
    return "no" if precision in ("fp32", "auto") or (sharded and precision == "bf16") else precision


def restart(accelerator: Accelerator, precision: str, timeout_seconds: int) -> Accelerator:
    """Accelerate for another compute type, in the same process group; see `start`. It stays if it has that already."""
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if _mixed_precision(precision, sharded) == accelerator.mixed_precision:
        return accelerator
    AcceleratorState._reset_state()
    return start(precision, timeout_seconds)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel and faulting it in again every step.

    ``mallopt(3)``: blocks up to 1 GiB (an older glibc takes no more than 32 MiB) come from the heap, and the heap is
    not trimmed. A batch of 256 images of 224 pixels has 147 MiB; to fault it in takes longer than to compute it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if not mallopt(m_mmap_threshold, 2**30):
        mallopt(m_mmap_threshold, 32 * 2**20)
    mallopt(m_trim_threshold, 2**31 - 1)


def share_cores() -> None:
    """Give each of a node's processes its share of the cores, unless the user says by ``OMP_NUM_THREADS`` how many.

    torchrun and ``accelerate launch`` set that to 1 where the user has not set it. Where nobody has, Accelerate gives
    each process of a group a share of the whole machine's, be it bound to fewer or not.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), own_cores()))
        return
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or os.environ["OMP_NUM_THREADS"] != "1":
        return
    with suppress(psutil.Error):  # without a look at what the launcher was given, its 1 is taken for the user's
        if "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ():
            torch.set_num_threads(own_cores())


def seed_process(accelerator: Accelerator, seed: int, step: int) -> None:
    """Give each process a random stream of its own for dropout and stochastic depth, from `step` on."""
    words = np.random.SeedSequence([seed, step, accelerator.process_index]).generate_state(1)
    torch.manual_seed(int(words[0]))


def say(accelerator: Accelerator, *lines: str) -> None:
    """Print lines once per job; Accelerate's own `print` does so on every node."""
    if accelerator.is_main_process:
        print(*lines, sep="\n", flush=True)


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


def engine_name(accelerator: Accelerator) -> str:
    """How the job keeps and shares its training state: single, ddp, zero1 to zero3, zero3_offload or fsdp2."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        layout = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        kept = [layout.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
        return f"zero{layout['stage']}" + ("_offload" if kept != ["none", "none"] else "")
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "single" if accelerator.num_processes == 1 else "ddp"


def device_bytes(accelerator: Accelerator) -> int:
    """Memory of this process's device; on a CPU its share of what its node has for the job."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory
    return own_memory_bytes()


def peak_memory_bytes(accelerator: Accelerator) -> int:
    """The most this process has held so far: tensors on its GPU, or without one all of its resident memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The forward pass's compute type on any engine."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given, as before a clock is read; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_agreement(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Compare what every process found with what the first one did.

    Raises:
        UsageError: on every process; names those that differ, their machine, and in what.
    """
    if accelerator.num_processes == 1:
        return
    found = gather(accelerator, (platform.node(), facts))
    for rank, (machine, theirs) in enumerate(found):
        for name, first in found[0][1].items():
            if (other := theirs.get(name)) != first:  # None of a setting that other code does not have
                raise UsageError(
                    f"process {rank} (on {machine}) has another {name} than process 0 ({other} against {first});"
                    " give every process the same command, code and data."
                )


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Every process's value, by rank, on every process."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def first_failure(accelerator: Accelerator, failure: str) -> str:
    """The first process's failure, known to every process; an empty string if none has one."""
    return next(filter(None, gather(accelerator, failure)), "")


@contextmanager
def shared_buffers(accelerator: Accelerator, module: torch.nn.Module) -> Iterator[None]:
    """Give every process the mean of all processes' buffers (BatchNorm statistics), so that all evaluate one model.

    Afterwards each process has its own again: whether and when a run is evaluated does not change its training.
    """
    own = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if accelerator.num_processes == 1 or not own:
        yield
        return
    kept = [buffer.clone() for buffer in own]
    flat = torch.cat([buffer.flatten().double() for buffer in own])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    for buffer, mean in zip(own, flat.split([buffer.numel() for buffer in own]), strict=True):
        buffer.copy_(mean.view(buffer.shape))
    try:
        yield
    finally:
        for buffer, value in zip(own, kept, strict=True):
            buffer.copy_(value)


def total(accelerator: Accelerator, sums: torch.Tensor) -> list[float]:
    """Sum a small float64 tensor over all processes and fetch it: one collective, one host sync."""
    return accelerator.reduce(sums, reduction="sum").tolist()
