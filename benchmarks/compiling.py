"""What `--compile` costs at the start and gives afterwards: as train.py does, and as one would without it.

    python -m benchmarks.compiling [--models vit_tiny_patch16_224:224:8 …] [--ways whole train.py …]
        [--backend inductor|eager] [--json FILE]

A model is NAME:PIXELS:BATCH. Ways: `uncompiled`; `whole`, by one call for the model; `blocks`, by one for each block of
a transformer; `train.py`. Each has a process and an empty cache of compiled code of its own. `first step` and `first
evaluation` are seconds with what is compiled for them; `step` is the median of those that follow, forward and backward
pass of noise. bf16 on a CPU as on a GPU. The backend `eager` traces, and compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import facts
from cifar_dist.config import ModelConfig
from cifar_dist.durable import replace_text
from cifar_dist.models import build_model
from cifar_dist.models.compilation import compile_model, transformer_blocks
from cifar_dist.models.cpu_layers import use_cpu_layers

MODELS = ("vit_tiny_patch16_224:224:8", "swin_tiny_patch4_window7_224:224:4", "resnet18_cifar:32:32")
WAYS = ("uncompiled", "whole", "blocks", "train.py")
STEPS = 10


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes, waited for."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compile_as(way: str, model: nn.Module, backend: str) -> None:
    """Let the compiler have the model, or its blocks."""
    compile_in_place = nn.Module.compile

    def trace(self: nn.Module, dynamic: bool | None = None, **_: Any) -> None:
        compile_in_place(self, backend="eager", dynamic=dynamic)

    if backend == "eager":
        nn.Module.compile = trace  # type: ignore[method-assign]
    if way == "whole":
        model.compile()
    elif way == "blocks":
        torch._dynamo.config.recompile_limit = 64  # else some are left as they are
        for block in transformer_blocks(model):
            block.compile()
    elif way == "train.py":
        compile_model(model, "default")


def measure(word: str, way: str, backend: str) -> dict[str, Any]:
    """One model in one way, in this process."""
    name, pixels, batch_size = word.split(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, img_size=int(pixels)), 10).to(device).train()
    use_cpu_layers(model, device, "bf16")
    images = torch.randn(int(batch_size), 3, int(pixels), int(pixels), device=device)
    if not transformer_blocks(model):
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    compile_as(way, model, backend)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(images).float().logsumexp(1).sum()

    def step() -> None:
        model.zero_grad()
        forward().backward()

    first, later = seconds_of(step), [seconds_of(step) for _ in range(STEPS)]
    model.eval()
    with torch.no_grad():
        evaluation = seconds_of(forward)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"first_step": first, "steps": later, "first_evaluation": evaluation, "graphs": compilations}


def alone(word: str, way: str, backend: str) -> dict[str, Any]:
    """The same in a process that finds nothing compiled."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compiling", "--one", word, way, "--backend", backend]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"model": word, "way": way, **json.loads(found.splitlines()[-1])}


def main() -> None:
    """Measure every model in every way, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        word, way = args.one
        print(json.dumps(measure(word, way, args.backend)))
        return
    rows = []
    print("model                               way         first step, s  first evaluation, s  step, ms  graphs")
    for word in args.models:
        with torch.device("meta"):
            is_transformer = bool(transformer_blocks(build_model(ModelConfig(model=word.split(":")[0]), 10)))
        for way in args.ways:
            if way == "blocks" and not is_transformer:
                continue
            row = alone(word, way, args.backend)
            rows.append(row)
            step = 1e3 * statistics.median(row["steps"])
            times = f"{row['first_step']:13.1f}  {row['first_evaluation']:19.1f}  {step:8.0f}"
            print(f"{word:35} {way:11} {times}  {row['graphs']:6}", flush=True)
    if args.json:
        replace_text(
            args.json, json.dumps(facts("torch", "timm") | {"backend": args.backend, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
