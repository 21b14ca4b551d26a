"""The compute type and memory layout that a model trains fastest with on this machine, found by trying."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from cifar_dist.command_line import load_config
from cifar_dist.config import Config, InputConfig
from cifar_dist.control import BeforeStep
from cifar_dist.distributed import autocast, gather, restart, say
from cifar_dist.models import input_config

WORTH = 1.05  # times as fast as fp32 in the usual layout, to be taken instead
ROUNDS = 3
STEP_SECONDS = 0.3  # long enough to be timed


@dataclass(frozen=True)
class Way:
    """How to compute: `precision`, fp32 or bf16, and whether images are kept NHWC."""

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return self.precision + (" channels-last" if self.channels_last else "")


def settle(
    config: Config, model: torch.nn.Module, accelerator: Accelerator, run_dir: Path | None
) -> tuple[Config, Accelerator]:
    """Put what ``--precision auto`` stands for in its place; without it all stays as it is.

    A run that goes on keeps what it began with, since another type would be another training. Of several processes all
    measure at the same time, as they will train, and the first one decides.

    Args:
        config: the run's configuration.
        model: as built, or with weights; it stays as it is, but goes to the device.
        accelerator: of this process, started without a compute type.
        run_dir: the run's folder, if there is one.

    Returns:
        The configuration with a precision and a layout, and Accelerate for it.
    """
    if config.run.precision != "auto":
        return config, accelerator
    saved = None if run_dir is None else run_dir / "config.yaml"
    if saved is not None and saved.is_file():
        began = load_config(saved)
        way = Way(began.run.precision, began.model.channels_last)
    else:
        rates = gather(accelerator, measure(config, model, accelerator))[0]
        way = fastest(rates)
        shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        say(accelerator, f"precision   {way}, measured here (images/s without optimizer: {shown})")
    config = replace(
        config,
        run=replace(config.run, precision=way.precision),
        model=replace(config.model, channels_last=way.channels_last),
    )
    return config, restart(accelerator, way.precision, config.run.ddp_timeout)


def fastest(rates: dict[Way, float]) -> Way:
    """The way with the most images/s, or the first one if none is clearly faster."""
    first = next(iter(rates))
    best = max(rates, key=lambda way: rates[way])
    return best if rates[best] >= WORTH * rates[first] else first


def measure(config: Config, model: torch.nn.Module, accelerator: Accelerator) -> dict[Way, float]:
    """Images/s of forward and backward passes in every way, the best of some that are made in turn.

    ``--channels-last`` leaves only ways with it; a GPU without bf16 of its own, only fp32.
    """
    bf16 = accelerator.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    layouts = (True,) if config.model.channels_last else (False, True)
    ways = [Way(precision, layout) for precision in (("fp32", "bf16") if bf16 else ("fp32",)) for layout in layouts]
    most = config.run.micro_batch_size or max(config.run.batch_size // accelerator.num_processes, 1)
    inputs, model = input_config(model, config.model), model.to(accelerator.device).train()
    before = BeforeStep(model, accelerator.device)
    before.keep()
    try:
        count = 1
        while _seconds(model, accelerator, inputs, count, ways[0]) < STEP_SECONDS and count < most:
            count = min(2 * count, most)
        for way in ways[1:]:
            _seconds(model, accelerator, inputs, count, way)  # a first pass chooses kernels
        times = [[_seconds(model, accelerator, inputs, count, way) for way in ways] for _ in range(ROUNDS)]
    finally:
        model.to(memory_format=torch.contiguous_format)
        before.put_back()
        for parameter in model.parameters():
            parameter.grad = None
    return {way: count / min(column) for way, column in zip(ways, zip(*times, strict=True), strict=True)}


def _seconds(model: torch.nn.Module, accelerator: Accelerator, inputs: InputConfig, count: int, way: Way) -> float:
    """Seconds of a forward and backward pass of `count` images."""
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    images = torch.zeros(count, 3, inputs.img_size, inputs.img_size, device=accelerator.device)
    images = images.contiguous(memory_format=layout)
    wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else bool
    wait()
    began = time.perf_counter()
    with autocast(accelerator.device, way.precision):
        loss = model(images).float().logsumexp(1).sum()
    loss.backward()
    wait()
    return time.perf_counter() - began
