"""What a machine computes on: its processor, and its GPUs, also those that torch cannot use."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

from cifar_dist.errors import UsageError, first_line

CPU_ON_PURPOSE = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES where no GPU is to be used; the last is SLURM's
CURE = "install a torch that fits (pytorch.org)"
ON_CPU = "or take the CPU on purpose, by CUDA_VISIBLE_DEVICES=-1"


def processor() -> str:
    """The CPU's name; with its family and model where the name says no number, as on rented machines."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    said = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    name = said.get("model name") or platform.processor() or platform.machine()
    if any(character.isdigit() for character in name.partition("@")[0]) or "cpu family" not in said:
        return name
    return f"{name}, family {said['cpu family']}, model {said['model']}"


def cpu_name(name: str, threads: int) -> str:
    """A CPU with the number of threads that work, as people read it."""
    return f"{name} ({threads} thread{'s' * (threads != 1)})"


def device_name(device: torch.device) -> str:
    """A GPU's name, or the CPU's with torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(processor(), torch.get_num_threads())


@cache
def tell_of_idle_gpus() -> None:
    """Say once, on stderr, that GPUs of this machine lie idle since torch cannot use them, if there are any.

    torch takes the CPU then, such as where the driver is too old for its CUDA, and trains a hundred times slower.

    Raises:
        UsageError: SLURM gave the job GPUs, which are paid for.
    """
    on_purpose = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if on_purpose or os.environ.get("CUDA_VISIBLE_DEVICES") in CPU_ON_PURPOSE:
        return
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"
    found = _nvidia_gpus()
    if not found and not given:
        return
    try:
        torch.cuda.init()
        reason = "it sees none"
    except (RuntimeError, AssertionError) as error:  # the latter by a torch without CUDA
        reason = first_line(error).partition(". ")[0]
    text = f"{found or 'the GPUs that SLURM gave'} on {platform.node()}: torch {torch.__version__} cannot use them"
    if given:
        raise UsageError(f"{text} ({reason}); {CURE}, or ask for none.")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {text} ({reason}), so the CPU does the work; {CURE}, {ON_CPU}.", file=sys.stderr, flush=True)


def _nvidia_gpus() -> str:
    """The machine's GPUs and their driver, as NVIDIA's own library sees them; empty without that or any."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)) if count else ""
    except pynvml.NVMLError:
        return ""
    return f"{count} GPU{'s' * (count != 1)} ({name}, driver {driver})" if count else ""


def refuse_unknown_gpu(device: torch.device) -> None:
    """Try a GPU.

    Raises:
        UsageError: torch was not built for it, as today's no longer are for what is older than an RTX 20 or a T4.
    """
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        known = ", ".join(torch.cuda.get_arch_list())
        major, minor = torch.cuda.get_device_capability(device)
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and torch {torch.__version__} is built for"
            f" {known}; {CURE}, {ON_CPU}."
        ) from None
