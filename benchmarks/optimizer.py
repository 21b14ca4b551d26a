"""A step of AdamW and SGD on a CPU: torch's loop over operators against its fused kernel, in turn.

    python -m benchmarks.optimizer [--models cnn4 …] [--repeats 20] [--json FILE]

The weights are a model's, the gradients random numbers; medians. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.machine import facts
from cifar_dist.config import ModelConfig
from cifar_dist.distributed.ending import run_main
from cifar_dist.models import build_model

MODELS = ("cnn4", "resnet18_cifar", "vit_tiny_patch16_224")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.05),
    "sgd": partial(torch.optim.SGD, lr=1e-4, weight_decay=0.05, momentum=0.9, nesterov=True),
}


def measure(model: str, name: str, repeats: int) -> dict[str, object]:
    """Milliseconds of a step in both ways."""
    network = build_model(ModelConfig(model=model), 10)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    ways = {fused: OPTIMIZERS[name](network.parameters(), fused=fused) for fused in (False, True)}
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2 + repeats):  # the first two make the moments and touch their memory
        for fused, optimizer in ways.items():
            began = perf_counter()
            optimizer.step()
            taken[fused].append(1e3 * (perf_counter() - began))
    plain_ms, fused_ms = (statistics.median(times[2:]) for times in taken.values())
    return {"model": model, "optimizer": name, "plain_ms": plain_ms, "fused_ms": fused_ms, "ratio": plain_ms / fused_ms}


def main() -> None:
    """Measure every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(model, name, args.repeats) for model in args.models for name in OPTIMIZERS]
    print("model                 optimizer  plain ms  fused ms  ratio")
    for row in rows:
        times = f"{row['plain_ms']:8.2f}  {row['fused_ms']:8.2f}  {row['ratio']:5.1f}"
        print(f"{row['model']:20}  {row['optimizer']:9}  {times}")
    if args.json:
        where = facts("torch", "timm")
        args.json.write_text(json.dumps(where | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
