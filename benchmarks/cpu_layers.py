"""A model's training step on a CPU with layers as torch computes them and with ours, in turn.

    python -m benchmarks.cpu_layers attention [--models vit_tiny_patch16_224:224:16 …] [--repeats 7] [--json FILE]
    python -m benchmarks.cpu_layers convolution [--models resnet18_cifar:32:64 …] [--repeats 7] [--json FILE]

`attention` is by torch's fused kernel or plain products, in bf16, as train.py does it then, and in fp32; `convolution`
is with torch's or our gradients, in bf16, its weights kept channels-last. A model is NAME:PIXELS:BATCH. A step is
forward, loss and backward pass of noise, without an optimizer; `ratio` is the median over repeats of torch's time over
ours in the same repeat: above 1 ours is faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import facts
from cifar_dist.config import ModelConfig
from cifar_dist.distributed.group import keep_freed_memory
from cifar_dist.distributed.hardware import processor
from cifar_dist.durable import replace_text
from cifar_dist.models import build_model
from cifar_dist.models.cpu_convolution import FASTER

MODELS = {
    "attention": (
        "vit_small_cifar:32:32", "test_vit:64:64", "vit_tiny_patch16_224:224:16", "vit_tiny_patch16_224:384:4",
        "vit_base_patch16_224:224:4",
    ),
    "convolution": (
        "cnn4:32:64", "airbench94:32:64", "resnet18_cifar:32:64", "resnet18:64:64", "resnet18:224:16", "resnet50:64:64",
        "dla34:64:64", "mobilenetv2_100:32:64", "mobilenetv2_100:64:64", "mobilenetv3_large_100:64:64",
        "efficientnet_b0:64:64", "efficientnet_b0:128:16", "tf_efficientnet_lite0:64:64", "efficientnetv2_rw_t:64:32",
        "convnext_atto:64:64", "convnext_tiny:64:64", "convmixer_768_32:32:32",
    ),
}  # fmt: skip
Switch = Callable[[bool], None]


def attention_switch(model: nn.Module) -> Switch:
    """What makes attention plain products, or torch's kernel again."""
    layers = [module for module in model.modules() if hasattr(module, "fused_attn")]

    def switch(ours: bool) -> None:
        for layer in layers:
            layer.fused_attn = not ours  # type: ignore[assignment]

    return switch


def convolution_switch(model: nn.Module) -> Switch:
    """What gives convolutions our gradients, or torch's again."""
    model.to(memory_format=torch.channels_last)
    layers = {module: type(module) for module in model.modules() if type(module) in FASTER}

    def switch(ours: bool) -> None:
        for layer, torchs in layers.items():
            layer.__class__ = FASTER[torchs] if ours else torchs

    return switch


def step_seconds(model: nn.Module, images: torch.Tensor, precision: str) -> float:
    """Seconds of a forward and backward pass."""
    model.zero_grad()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images).float().logsumexp(1).sum()
    loss.backward()
    return time.perf_counter() - began


def compare(layers: str, word: str, precision: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in both ways, after one of each that does not count."""
    name, pixels, batch_size = word.split(":")
    model = build_model(ModelConfig(model=name, img_size=None if layers == "convolution" else int(pixels)), 10)
    switch = {"attention": attention_switch, "convolution": convolution_switch}[layers](model)
    images = torch.randn(int(batch_size), 3, int(pixels), int(pixels))
    if layers == "convolution":
        images = images.contiguous(memory_format=torch.channels_last)
    found: dict[str, list[float]] = {"torch": [], "ours": []}
    for _ in range(repeats + 1):
        for way, times in found.items():
            switch(way == "ours")
            times.append(step_seconds(model, images, precision))
    return {way: times[1:] for way, times in found.items()}


def main() -> None:
    """Compare every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", choices=MODELS)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as train.py does
    rows = []
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {args.repeats}")
    print("model                         precision   torch ms    ours ms  ratio")
    for word in args.models or MODELS[args.layers]:
        for precision in ("bf16", "fp32") if args.layers == "attention" else ("bf16",):
            times = compare(args.layers, word, precision, args.repeats)
            ratio = statistics.median(torchs / ours for torchs, ours in zip(times["torch"], times["ours"], strict=True))
            rows.append({"model": word, "precision": precision, "seconds": times, "ratio": ratio})
            torchs, ours = (1e3 * statistics.median(times[way]) for way in ("torch", "ours"))
            print(f"{word:28}  {precision:>9}  {torchs:9.1f}  {ours:9.1f}  {ratio:5.2f}", flush=True)
    if args.json:
        replace_text(args.json, json.dumps(facts("torch", "timm") | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
