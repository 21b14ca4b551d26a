"""What launchers say in the environment, read before Accelerate starts.

Accelerate itself starts one process, or several that share nothing, without a word when a launcher and the machine do
not fit together. Here every launcher's variables become one `Launch`, or a refusal.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from cifar_dist.distributed import slurm
from cifar_dist.distributed.hardware import tell_of_idle_gpus
from cifar_dist.errors import UsageError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
TELLS_AFTER_SECONDS = 10  # of waiting for other processes
START = "start with torchrun --standalone --nproc-per-node N train.py …"
# What a launch config can set and the recipe sets too: variable, values that say nothing, where to say it instead.
SETTINGS = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto"), "--micro-batch-size"),
    ("ACCELERATE_GRADIENT_CLIPPING", ("auto", "none"), "--clip-grad"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "--compile"),
)


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for: how many processes, on what, with which engine."""

    world_size: int
    on_cpu: bool
    deepspeed: bool
    fsdp: bool

    @property
    def grouped(self) -> bool:
        """Whether there is a process group; torchrun makes one even for a single process."""
        return "LOCAL_RANK" in os.environ

    @contextmanager
    def waiting(self, timeout_seconds: int) -> Iterator[None]:
        """The time in which processes wait for each other: signals end it at once, and after a while it says so.

        There is nothing to save yet, and torch waits where Python does not hear of signals.
        """
        if not self.grouped or self.world_size == 1:
            yield
            return
        handlers = {number: now for number in signal.valid_signals() if callable(now := signal.getsignal(number))}
        if threading.current_thread() is not threading.main_thread():  # which alone may set them
            handlers = {}
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = (
            f"rank {os.environ['RANK']} waits for the others of {self.world_size} processes at {place}, for up to"
            f" {timeout_seconds} seconds (--ddp-timeout); if none is to come, unset RANK, LOCAL_RANK and WORLD_SIZE"
            " (of srun: SLURM_PROCID)"
        )
        told = threading.Timer(TELLS_AFTER_SECONDS, lambda: print(said, file=sys.stderr, flush=True))
        told.daemon = True
        told.start()
        try:
            yield
        finally:
            told.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def wait_for_rank_0(self, timeout_seconds: int) -> None:
        """Wait until rank 0 listens: torch waits too, but ends with pages of its own stack.

        Raises:
            UsageError: it did not within the time, or its name is unknown.
        """
        if not self.grouped:
            return
        place = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                if os.environ["RANK"] == "0":
                    socket.getaddrinfo(*place)
                else:
                    socket.create_connection(place, timeout=min(10, timeout_seconds)).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UsageError(self.absence(str(error), timeout_seconds)) from None
            time.sleep(0.2)

    def check(self, world_size: int, kind: DistributedType) -> None:
        """Compare what Accelerate started with what was asked for.

        Raises:
            UsageError: other processes or another engine than asked for.
        """
        if world_size != self.world_size:
            raise UsageError(f"{self.world_size} processes were started but Accelerate sees {world_size}; {START}")
        engine = "DEEPSPEED" if self.deepspeed else "FSDP" if self.fsdp else ""
        if (engine and kind.name != engine) or (world_size > 1 and kind == DistributedType.NO):
            raise UsageError(
                f"the launcher asked for {engine or 'processes that share gradients'} but Accelerate started"
                f" distributed_type {kind.name}; take a file of accelerate_configs/."
            )

    def absence(self, reason: str, timeout_seconds: int) -> str:
        """What to tell the user when processes did not come, given torch's reason."""
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (reason.splitlines() or [""])[0]
        if "address already in use" in reason:
            return f"MASTER_PORT: {place} is taken by another program; choose another (--main_process_port)."
        if came := re.search(r"(\d+)/(\d+) clients joined", reason):
            found = f"{came[1]} of {came[2]} processes came to {place}"
        elif absent := re.search(r"wait timeout.*keys: \S*/(\d+)(?:,|$)", reason):  # the ranks' addresses, one by one
            found = f"rank {absent[1]} of {self.world_size} did not come to {place}"
        else:
            found = (
                f"rank {os.environ['RANK']} of {self.world_size} did not reach the others at {place} ({reason:.160})"
            )
        return (
            f"{found} within --ddp-timeout {timeout_seconds}; check that every node was started, with this address,"
            " and that each can reach it."
        )


def prepare_environment(precision: str) -> Launch:
    """Read what the launcher set, complete it under srun, and refuse what would train wrongly or hang.

    Args:
        precision: fp32, bf16 or fp16, which a launch config must not contradict.

    Returns:
        What Accelerate is to be started for.

    Raises:
        UsageError: the variables contradict each other, the machine or the recipe.
    """
    if "WORLD_SIZE" not in os.environ:
        _refuse_lone_processes()
        if slurm.in_step():
            os.environ.update(slurm.rank_variables() | slurm.engine_variables())
    world_size = _ranks()
    by_choice = _flag("ACCELERATE_USE_CPU")
    launch = Launch(
        world_size,
        on_cpu=not torch.accelerator.is_available() or by_choice,
        deepspeed=_flag("ACCELERATE_USE_DEEPSPEED"),
        fsdp=_flag("ACCELERATE_USE_FSDP"),
    )
    if launch.on_cpu and not by_choice and not PartialState._shared_state:  # once, and not when started again
        tell_of_idle_gpus()
    _refuse_second_homes(precision)
    _check_devices(launch)
    if launch.deepspeed:
        _prepare_deepspeed(launch)
    return launch


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _number(name: str, default: int | None = None) -> int:
    """An environment variable that counts something."""
    text = os.environ[name] if default is None else os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}, not a number; {START}")
    return int(text)


def _refuse_lone_processes() -> None:
    """Refuse launchers that start processes which would each train alone."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        raise UsageError(
            "accelerate launch was asked for several processes but starts one this way (--cpu, MULTI_CPU or no"
            " distributed_type); take --config_file accelerate_configs/cpu_multi.yaml or multi_gpu.yaml, with"
            " --num_processes N (for one process: unset MASTER_ADDR)."
        )
    for size, rank in MPI_VARIABLES:
        if size in os.environ and _number(size) > 1 and not slurm.is_own_rank(rank):
            raise UsageError(
                f"mpirun started {os.environ[size]} processes ({size}), which is not supported; {START}, or srun."
            )
    if found := [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]:
        raise UsageError(f"{' and '.join(found)} are set but WORLD_SIZE is not; unset them, or {START}")


def _ranks() -> int:
    """How many processes there are, once their variables agree."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    world_size = _number("WORLD_SIZE")
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing and (world_size > 1 or "LOCAL_RANK" in os.environ):
        raise UsageError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} are not set; {START} (under srun: unset WORLD_SIZE)"
        )
    if world_size > 1 and not 0 < _number("MASTER_PORT") < 2**16:
        raise UsageError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, which the processes cannot agree on; {START}")
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in os.environ and limit in os.environ and _number(name) >= _number(limit):
            raise UsageError(f"{name} is {os.environ[name]} but {limit} is {os.environ[limit]}; {START}")
    if _number("LOCAL_WORLD_SIZE", world_size) > world_size:
        raise UsageError(
            f"LOCAL_WORLD_SIZE is {os.environ['LOCAL_WORLD_SIZE']} but WORLD_SIZE is {world_size}; {START}"
        )
    return world_size


def _refuse_second_homes(precision: str) -> None:
    """Refuse a launch config that sets what the recipe sets, so that a number has one home."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", precision):
        raise UsageError(
            f"the launch config says mixed_precision {asked} but --precision is {precision}; say it with --precision"
            " and leave it out of the launch config."
        )
    for name, silent, flag in SETTINGS:
        value = os.environ.get(name, silent[0]).lower()
        if value not in silent:
            raise UsageError(f"the launch config sets {name} to {value}; say it in the recipe instead: {flag}.")


def _check_devices(launch: Launch) -> None:
    """Refuse an engine without its devices, and more processes than devices."""
    if launch.fsdp and launch.on_cpu:
        raise UsageError(
            "the launch config asks for FSDP, which needs GPUs, and none is used here; take"
            " accelerate_configs/cpu_multi.yaml or accelerate_configs/zero3.yaml."
        )
    if launch.fsdp and os.environ.get("FSDP_VERSION", "1") != "2":  # Accelerate's default
        raise UsageError(
            "the launch config asks for FSDP 1; set fsdp_version to 2, as accelerate_configs/fsdp2.yaml does."
        )
    if launch.fsdp and _flag("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UsageError(  # Accelerate 1.15 then fails on buffers and on parameters of the model itself
            "the launch config sets fsdp_cpu_ram_efficient_loading, which the models here do not survive; set it to"
            " false, as accelerate_configs/fsdp2.yaml does."
        )
    if launch.on_cpu or launch.world_size == 1:
        return
    here = _number("LOCAL_WORLD_SIZE", _number("LOCAL_RANK") + 1)
    devices = torch.accelerator.device_count()
    if here > devices:
        raise UsageError(
            f"{here} processes were started on this node but each sees {devices} GPU(s); start as many as there are"
            " (under srun: --gpus-per-node N instead of --gpus-per-task)."
        )


def _prepare_deepspeed(launch: Launch) -> None:
    """Check what DeepSpeed needs, and keep it from compiling on a CPU.

    Its shared-memory collectives are compiled for minutes at the first start; gloo does the same without.
    """
    if missing := [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]:
        raise UsageError(  # Accelerate reads DeepSpeed's configuration with transformers
            f"the launch config asks for DeepSpeed, but {' and '.join(missing)} is not installed:"
            " pip install -e '.[deepspeed]'"
        )
    if not launch.grouped:
        raise UsageError(
            "ACCELERATE_USE_DEEPSPEED is set but no launcher started this process; start with"
            " accelerate launch --config_file accelerate_configs/zero2.yaml train.py …"
        )
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config != "none" and not Path(config).is_file():
        raise UsageError(
            f"deepspeed_config_file is {config}, not a file in {Path.cwd()}; start in the repository root."
        )
    if launch.on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
