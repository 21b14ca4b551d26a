"""What a machine computes on: its processor, and its GPUs, also those that torch cannot use."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from cifar_dist.errors import UsageError, first_line

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NONE_VISIBLE = ("", "-1", "NoDevFiles")  # on purpose; the last is SLURM's
ANOTHER_TORCH = "install a torch that fits (pytorch.org)"


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
    """A GPU's name, or the CPU's with torch's threads; of other devices their kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(processor(), torch.get_num_threads()) if device.type == "cpu" else device.type


def tell_of_idle_gpus() -> None:
    """Say on stderr that GPUs of this machine lie idle since torch cannot use them, if there are any.

    torch takes the CPU then, such as where the driver is too old for its CUDA.

    Raises:
        UsageError: SLURM gave the job GPUs, for which others wait.
    """
    if any(os.environ.get(name) in NONE_VISIBLE for name in VISIBLE):
        return
    given = os.environ.get("SLURM_GPUS_ON_NODE", "") not in ("", "0")
    found = _nvidia_gpus() or ("GPUs that SLURM gave" if given else "")
    if not found:
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter by a torch without CUDA
        reason = first_line(error).partition(". ")[0]
        text = f"{found} on {platform.node()}: torch {torch.__version__} uses none ({reason})"
        if given:
            raise UsageError(f"{text}; {_cure(reason)}, or ask SLURM for none.") from None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: {text}, so the CPU does the work; {_cure(reason)}.", file=sys.stderr, flush=True)


def _cure(reason: str) -> str:
    """What can be done where CUDA does not start, by torch's words for why."""
    if "too old" in reason or "not compiled" in reason:
        return ANOTHER_TORCH
    if "no NVIDIA driver" in reason:
        return "install the driver, or start the container with GPUs (--nv, --gpus all)"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible}: name some that there are"
    return "nvidia-smi may say more"


def _nvidia_gpus() -> str:
    """The machine's GPUs and their driver, as NVIDIA's own library sees them; empty without that or any."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)) if count else ""
    except pynvml.NVMLError_LibRmVersionMismatch:
        return "GPUs whose driver was renewed without a restart"
    except pynvml.NVMLError:
        return ""
    return f"{count} GPU{'s' * (count != 1)} ({name}, driver {driver})" if count else ""


def refuse_unknown_gpu(device: torch.device) -> None:
    """Let a GPU add two numbers.

    Raises:
        UsageError: torch was not built for it, as today's are no longer for what is older than Turing (RTX 20, T4).
    """
    try:
        torch.ones(1, device=device) + 1
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        known = ", ".join(torch.cuda.get_arch_list())
        major, minor = torch.cuda.get_device_capability(device)
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and torch {torch.__version__} is built for"
            f" {known}; {ANOTHER_TORCH}, or take the CPU: CUDA_VISIBLE_DEVICES=-1."
        ) from None
