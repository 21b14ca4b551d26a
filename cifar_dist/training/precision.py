"""The compute type and memory layout that a model trains fastest with on this machine, found by trying."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from cifar_dist.command_line import load_config
from cifar_dist.config import Config, InputConfig
from cifar_dist.distributed.control import Snapshot, any_of
from cifar_dist.distributed.group import gather, restart, say, wait_for
from cifar_dist.errors import UsageError
from cifar_dist.models import input_config
from cifar_dist.models.cpu_layers import use_cpu_layers
from cifar_dist.training.micro_batch import forward_and_backward, is_out_of_memory

MIN_SPEEDUP = 1.05  # over fp32 in the usual layout, to be taken instead
ROUNDS = 3
STEP_SECONDS = 0.3  # long enough to be timed


@dataclass(frozen=True)
class ComputeFormat:
    """How to compute: `precision`, fp32 or bf16, and whether images are kept NHWC."""

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return self.precision + (" channels-last" if self.channels_last else "")


def resolve_precision(
    config: Config, model: torch.nn.Module, accelerator: Accelerator, run_dir: Path | None
) -> tuple[Config, Accelerator]:
    """Put what ``--precision auto`` stands for in its place; without it all stays as it is.

    A run that goes on keeps what it began with, since another type would be another training. Of several processes all
    measure at the same time, as they will train, and the first one decides. What is timed is eager, without the
    optimizer and without gradients being shared.

    Args:
        config: the run's configuration.
        model: as built, or with weights; it stays as it is, but goes to the device.
        accelerator: of this process, started without a compute type.
        run_dir: the run's folder; None where nothing is trained, and so nothing measured.

    Returns:
        The configuration with a precision and a layout, and Accelerate for it.

    Raises:
        UsageError: the model does not fit into memory.
    """
    if config.run.precision != "auto":
        return config, accelerator
    if run_dir is None:
        say(accelerator, "precision   auto: measured when a training begins; this is fp32's plan")
        chosen = ComputeFormat("fp32", config.model.channels_last)
    elif (run_dir / "config.yaml").is_file():
        began = load_config(run_dir / "config.yaml")
        chosen = ComputeFormat(began.run.precision, began.model.channels_last)
        say(accelerator, f"precision   {chosen}, as the run began")
    else:
        rates = gather(accelerator, measure_formats(config, model, accelerator))[0]
        chosen = fastest(rates)
        shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        say(accelerator, f"precision   {chosen}, measured here (images/s without optimizer: {shown})")
    config = replace(
        config,
        run=replace(config.run, precision=chosen.precision),
        model=replace(config.model, channels_last=chosen.channels_last),
    )
    return config, restart(accelerator, chosen.precision, config.run.ddp_timeout)


def fastest(rates: dict[ComputeFormat, float]) -> ComputeFormat:
    """The format with the most images/s, or the first one if none is clearly faster."""
    first = next(iter(rates))
    best = max(rates, key=lambda each: rates[each])
    return best if rates[best] >= MIN_SPEEDUP * rates[first] else first


def measure_formats(config: Config, model: torch.nn.Module, accelerator: Accelerator) -> dict[ComputeFormat, float]:
    """Images/s of forward and backward passes in every format, the best of some that are made in turn.

    ``--channels-last`` leaves only formats with it; a GPU without bf16 of its own, only fp32. All processes make as
    many passes, since layers may talk to those of other processes (SyncBatchNorm).

    Raises:
        UsageError: the model does not fit into memory.
    """
    device = accelerator.device
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    layouts = (True,) if config.model.channels_last else (False, True)
    precisions = ("fp32", "bf16") if bf16 else ("fp32",)
    formats = [ComputeFormat(precision, layout) for precision in precisions for layout in layouts]
    most = config.run.micro_batch_size or max(config.run.batch_size // accelerator.num_processes, 1)
    inputs, model = input_config(model, config.model), model.to(device).train()
    snapshot = Snapshot(model, device)
    snapshot.take()
    try:
        count = _count(accelerator, model, inputs, formats[0], most)
        for each in formats[1:]:
            _seconds(model, device, inputs, count, each)  # a first pass chooses kernels
        times = [[_seconds(model, device, inputs, count, each) for each in formats] for _ in range(ROUNDS)]
    finally:
        model.to(memory_format=torch.contiguous_format)
        snapshot.restore()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # the trial is not the training
    return {each: count / min(column) for each, column in zip(formats, zip(*times, strict=True), strict=True)}


def _count(
    accelerator: Accelerator, model: torch.nn.Module, inputs: InputConfig, each: ComputeFormat, most: int
) -> int:
    """Images for a pass that is long enough and fits, on every process; at least two, which BatchNorm wants."""
    count, fitted = min(2, most), 0
    while True:
        # The first pass of a size also loads and chooses kernels, which on a GPU takes longer than the pass.
        first, second = (_seconds(model, accelerator.device, inputs, count, each) for _ in range(2))
        seconds = min(first, second)
        if any_of(accelerator, math.isinf(first) or math.isinf(second)):
            if not fitted:
                raise UsageError("--precision auto: not even two images fit into memory; take a smaller model.")
            return fitted
        fitted = count
        if any_of(accelerator, seconds >= STEP_SECONDS) or count == most:
            return count
        count = min(2 * count, most)


def _seconds(
    model: torch.nn.Module, device: torch.device, inputs: InputConfig, count: int, each: ComputeFormat
) -> float:
    """Seconds of a forward and backward pass of `count` images; infinite where they do not fit into memory."""
    layout = torch.channels_last if each.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    undo = use_cpu_layers(model, device, each.precision)
    try:
        images = torch.zeros(count, 3, inputs.img_size, inputs.img_size, device=device).contiguous(memory_format=layout)
        wait_for(device)
        began = time.perf_counter()
        forward_and_backward(model, images, each.precision)
        wait_for(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    finally:
        undo()
    return time.perf_counter() - began
