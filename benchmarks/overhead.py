"""What our training loop costs beside the least one can write, with the same kernels on the same batch.

    python -m benchmarks.overhead [--models cnn4:8 cnn4:64 …] [--seconds 2] [--repeats 7] [--json FILE]

The bare loop is forward, loss, backward, optimizer step, and zeroed gradients, by hand. Ours is `train_step` with all
that makes a run exact and safe: the schedule, buffers and random streams kept for a step that is refused, the check
that loss and gradient are finite, what processes decide together, and the means. Both take one batch that is made
already, the same model, AdamW and precision, in turn. `added` is the median of each repeat's difference. A model's
number is its batch. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F

from benchmarks.gpu import noise
from benchmarks.gpu_rows import LR, PRECISION, WARM_UP_STEPS, Bench, Case, Ours, Way
from benchmarks.machine import facts
from cifar_dist.config import ModelConfig, OptimConfig
from cifar_dist.cost.peak import device_peak
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import autocast, start
from cifar_dist.models import build_model, input_config
from cifar_dist.models.cpu_layers import use_cpu_layers
from cifar_dist.optim import fuse, make_optimizer

MODELS = ("cnn4:8", "cnn4:64", "cnn4:256", "resnet18_cifar:32", "vit_tiny_patch16_224:16")
WAY = Way("ours", channels_last=True)


class Bare:
    """The least loop: one model, one batch, AdamW."""

    def __init__(self, name: str, batch_size: int, device: torch.device):
        self._device = device
        model = build_model(ModelConfig(model=name), 10)
        size = input_config(model, ModelConfig(model=name)).img_size
        use_cpu_layers(model, device, PRECISION)
        self._model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._optimizer = fuse(make_optimizer(self._model, OptimConfig(lr=float(LR))))
        images = torch.randn(batch_size, 3, size, size, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.arange(batch_size, device=device) % 10

    def run(self, steps: int) -> float:
        """Train so many steps; seconds until the device has done them."""
        began = perf_counter()
        for _ in range(steps):
            with autocast(self._device, PRECISION):
                logits = self._model(self._images)
            F.cross_entropy(logits.float(), self._labels).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - began


def measure(bench: Bench, name: str, batch_size: int, repeats: int) -> dict[str, object]:
    """Milliseconds of a step in both loops, in turn."""
    ours, bare = Ours(bench, Case(name, 0, batch_size), WAY), Bare(name, batch_size, bench.device)
    ours.run(WARM_UP_STEPS, fixed=True)
    step = min(bare.run(WARM_UP_STEPS) for _ in range(2)) / WARM_UP_STEPS
    steps = max(1, round(bench.seconds / step))
    pairs = []
    for _ in range(repeats):
        pairs.append([1e3 * bare.run(steps) / steps, 1e3 * ours.run(steps, fixed=True) / steps])
    bare_ms, ours_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    added = statistics.median(mine - least for least, mine in pairs)
    return {
        "model": name, "batch_size": batch_size, "bare_ms": bare_ms, "ours_ms": ours_ms, "added_ms": added,
        "added_share": added / bare_ms, "pairs_ms": pairs,
    }  # fmt: skip


def main() -> None:
    """Measure every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each window")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    accelerator = start(PRECISION)
    data, pictures = noise(10_000)
    bench = Bench(accelerator, data, pictures, device_peak(accelerator.device, PRECISION), args.seconds)
    rows = []
    print("model                  batch   bare ms   ours ms   added ms   added")
    for word in args.models:
        name, _, batch_size = word.partition(":")
        row = measure(bench, name, int(batch_size), args.repeats)
        rows.append(row)
        print(
            f"{name:22}  {batch_size:>4}  {row['bare_ms']:8.2f}  {row['ours_ms']:8.2f}  {row['added_ms']:9.3f}"
            f"  {row['added_share']:6.1%}",
            flush=True,
        )
        accelerator.free_memory()
    if args.json:
        args.json.write_text(json.dumps(facts("torch", "timm", "accelerate") | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
