"""How fast a model answers, measured: one image at a time, and as many at once as pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from cifar_dist.config import InputConfig
from cifar_dist.data.augment import Preprocess
from cifar_dist.distributed.group import autocast, wait_for
from cifar_dist.distributed.hardware import device_name
from cifar_dist.errors import UsageError
from cifar_dist.training.micro_batch import is_out_of_memory

FASTER = 1.02  # what a doubled batch must bring
FEWEST_RUNS = 3
IMAGE_SIDE = 32  # pixels of CIFAR's images
MISSES = 2  # sizes in a row that bring nothing, after which the search ends
TRIES = 20  # of a batch size, in the time of the search
WARM_UP_RUNS = 2


@dataclass(frozen=True)
class Speed:
    """How a model answered: forward passes alone, of normalised images that were on the device already.

    Attributes:
        latency_median_seconds: of one image at a time, until the device has the logits.
        latency_p95_seconds: 95 % of those passes took at most this long.
        images_per_second: with `batch_size` images at a time, in the median pass.
        batch_size: the fastest of those tried.
        peak_memory_bytes: at that batch size, of all tensors on the GPU; None on a CPU, where a process cannot tell
            what it holds for this from what it has held before.
        energy_joules_per_image: at that batch size, of the whole GPU; None where NVIDIA's NVML does not tell.
        runs: how many passes the latencies are over.
        device: its name; a CPU's with the number of threads.
        precision: fp32, bf16 or fp16.
    """

    latency_median_seconds: float
    latency_p95_seconds: float
    images_per_second: float
    batch_size: int
    peak_memory_bytes: int | None
    energy_joules_per_image: float | None
    runs: int
    device: str
    precision: str


@dataclass(frozen=True)
class _Trial:
    """A model that answers as in evaluation."""

    model: nn.Module
    preprocess: Preprocess
    device: torch.device
    precision: str

    def answering(self, count: int) -> Callable[[], torch.Tensor]:
        """A forward pass of `count` images of noise, in the layout that evaluation gives CIFAR's, ready to be run."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (count, IMAGE_SIDE, IMAGE_SIDE, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)
        return partial(self._answer, self.preprocess(pixels))

    @torch.no_grad()
    def _answer(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return self.model(images).float()


def measure_speed(
    model: nn.Module, input: InputConfig, device: torch.device, precision: str, seconds: float = 2.0
) -> Speed:
    """Measure latency, then which batch size is fastest, then speed, memory and energy at that size.

    Batch sizes double from 1 until two in a row make no more images per second, though each was tried twice, or memory
    or time are at an end. Every pass is waited for, and medians are compared: other programs may disturb some.

    Args:
        model: images (B, 3, S, S) in, logits (B, K) out; it is left on the device, in evaluation mode.
        input: what it expects of its images.
        device: where to measure.
        precision: fp32, bf16 or fp16; of autocast, as in evaluation.
        seconds: bounds each of the three parts; a pass is not cut short, and a part has at least five.

    Raises:
        UsageError: not even one image fits into memory.
    """
    trial = _Trial(model.to(device).eval(), Preprocess(input, device, torch.float32), device, precision)
    try:
        latencies = durations(trial.answering(1), device, seconds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError("not even one image fits into memory; take a smaller --model or --img-size.") from None
    batch_size = _fastest_batch(trial, _rate(1, latencies), seconds)
    answer = trial.answering(batch_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = energy_joules(device)
    passes = durations(answer, device, seconds)
    after = energy_joules(device)
    images = batch_size * (len(passes) + WARM_UP_RUNS)
    return Speed(
        latency_median_seconds=float(np.median(latencies)),
        latency_p95_seconds=float(np.percentile(latencies, 95)),
        images_per_second=_rate(batch_size, passes),
        batch_size=batch_size,
        peak_memory_bytes=_peak_memory_bytes(device),
        energy_joules_per_image=None if before is None or after is None else (after - before) / images,
        runs=len(latencies),
        device=device_name(device),
        precision=precision,
    )


def durations(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """How long `work` takes, each time until the device has done it, after a warm-up.

    Args:
        work: what to run.
        device: what it runs on.
        seconds: how long to go on; at least three runs are timed.

    Returns:
        Seconds of each run.
    """
    for _ in range(WARM_UP_RUNS):
        work()
    wait_for(device)
    taken: list[float] = []
    while len(taken) < FEWEST_RUNS or sum(taken) < seconds:
        began = time.perf_counter()
        work()
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return taken


def _rate(size: int, passes: Sequence[float]) -> float:
    """Images a second in the median pass."""
    return size / float(np.median(passes))


def _fastest_batch(trial: _Trial, best_rate: float, seconds: float) -> int:
    """Images at a time that make most images per second, of 1, which make `best_rate`, 2, 4 and so on."""
    fastest, size, missed = 1, 2, 0
    end = time.perf_counter() + seconds
    while missed < MISSES and time.perf_counter() < end:
        try:
            answer = trial.answering(size)
            rate = _rate(size, durations(answer, trial.device, seconds / TRIES))
            if rate < FASTER * best_rate:
                rate = max(rate, _rate(size, durations(answer, trial.device, seconds / TRIES)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < FASTER * best_rate:
            missed += 1
        else:
            fastest, best_rate, missed = size, rate, 0
        size *= 2
    if trial.device.type == "cuda":
        torch.cuda.empty_cache()
    return fastest


def _peak_memory_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def energy_joules(device: torch.device) -> float | None:
    """What the GPU has used since its driver started, all of it; None without NVML or where it keeps no such count."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None
