"""A ViT's training step on a CPU, with torch's fused kernel for attention and with plain products, in turn.

    python -m benchmarks.attention [--models vit_tiny_patch16_224:224:16 …] [--repeats 7] [--json FILE]

A model is NAME:PIXELS:BATCH. A step is forward, loss and backward pass of noise; `ratio` is the median over repeats of
the fused kernel's time over the other's in the same repeat: above 1 the plain products are faster.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import facts
from cifar_dist.config import ModelConfig
from cifar_dist.distributed.hardware import processor
from cifar_dist.durable import replace_text
from cifar_dist.models import build_model

MODELS = (
    "vit_small_cifar:32:32", "test_vit:64:64", "vit_tiny_patch16_224:224:16", "vit_tiny_patch16_224:384:4",
    "vit_base_patch16_224:224:4",
)  # fmt: skip


def step_seconds(model: nn.Module, images: torch.Tensor, precision: str) -> float:
    """Seconds of a forward and backward pass."""
    model.zero_grad()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images).float().logsumexp(1).sum()
    loss.backward()
    return time.perf_counter() - began


def compare(name: str, pixels: int, batch_size: int, precision: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in both ways, after one of each that does not count."""
    model = build_model(ModelConfig(model=name, img_size=pixels), 10)
    images = torch.randn(batch_size, 3, pixels, pixels)
    layers = [module for module in model.modules() if hasattr(module, "fused_attn")]
    found: dict[str, list[float]] = {"fused": [], "plain": []}
    for _ in range(repeats + 1):
        for way, times in found.items():
            for layer in layers:
                layer.fused_attn = way == "fused"  # type: ignore[assignment]
            times.append(step_seconds(model, images, precision))
    return {way: times[1:] for way, times in found.items()}


def main() -> None:
    """Compare every model in both precisions, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {args.repeats}")
    print("model                   pixels  batch  precision   fused ms   plain ms  ratio")
    for word in args.models:
        name, pixels, batch_size = word.split(":")
        for precision in ("bf16", "fp32"):
            times = compare(name, int(pixels), int(batch_size), precision, args.repeats)
            ratio = statistics.median(
                fused / plain for fused, plain in zip(times["fused"], times["plain"], strict=True)
            )
            rows.append({"model": word, "precision": precision, "seconds": times, "ratio": ratio})
            fused, plain = (1e3 * statistics.median(times[way]) for way in ("fused", "plain"))
            print(
                f"{name:22}  {pixels:>6}  {batch_size:>5}  {precision:>9}  {fused:9.1f}  {plain:9.1f}  {ratio:5.2f}",
                flush=True,
            )
    if args.json:
        replace_text(args.json, json.dumps(facts("torch", "timm") | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
