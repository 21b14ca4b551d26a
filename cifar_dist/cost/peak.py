"""The most that a device can compute: as its maker states, or measured.

Stated are dense TFLOP/s, tensor cores adding up in fp32, by NVIDIA's data sheet of each card (V100, T4, A10, A100, L4,
L40S, H100, H200, HGX B200) and, for GeForce, the whitepapers of Ampere GA102 (RTX 3090) and Ada (RTX 4090). Sheets that
give only what structured sparsity would do are halved. The tests reckon the same, within 2 %, from multiprocessors,
boost clock and operations a clock (of the B200 in fp32 alone).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch

from cifar_dist.cost.flops import Peak
from cifar_dist.cost.speed import durations
from cifar_dist.distributed.group import DTYPES

# By torch's name of a card without its brand; None where the sheet states none. Halved: L4, H100, H200, B200.
FORMATS = ("fp16", "bf16", "tf32", "fp32")
DATA_SHEETS: dict[str, tuple[float | None, ...]] = {
    r"V100-SXM[23]-(16|32)GB": (125, None, None, 15.7),
    r"V100-PCIE-(16|32)GB": (112, None, None, 14),
    r"T4": (65, None, None, 8.1),
    r"A10": (125, 125, 62.5, 31.2),
    r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe": (312, 312, 156, 19.5),
    r"L4": (121, 121, 60, 30.3),
    r"L40S": (362, 362, 183, 91.6),
    r"H100 80GB HBM3": (989.5, 989.5, 494.5, 67),
    r"H100 PCIe": (756.5, 756.5, 378, 51),
    r"H200": (989.5, 989.5, 494.5, 67),
    r"B200": (2250, 2250, 1100, 75),
    r"RTX 3090": (71, 71, 35.6, 35.6),
    r"RTX 4090": (165.2, 165.2, 82.6, 82.6),
}


def device_peak(device: torch.device, precision: str) -> Peak:
    """What its maker states for a GPU, by its exact name; for any other device the best of some large products.

    In fp32 a GPU's peak is that of TF32 where torch may use it: for convolutions it may unless told otherwise.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    short = re.sub("^(NVIDIA |Tesla |GeForce )+", "", name)
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    wanted = ("tf32", "fp32") if precision == "fp32" and tf32 else (precision,)
    for pattern, stated in DATA_SHEETS.items():
        if re.fullmatch(pattern, short):
            sheet = {kind: teraflops for kind, teraflops in zip(FORMATS, stated, strict=True) if teraflops}
            for kind in filter(sheet.__contains__, wanted):
                return Peak(1e12 * sheet[kind], f"NVIDIA's figure for {name}, dense {kind}")
    return _measured_peak(device, precision)


def _measured_peak(device: torch.device, precision: str, seconds: float = 1.0) -> Peak:
    """The best of square matrix products, and on a CPU of 3 x 3 convolutions, tried for so many seconds.

    Of both, as a library may not use all that a processor has: in fp32 MKL multiplies matrices on an AMD with AVX-512
    at less than half the speed at which oneDNN convolves (benchmarks/results/speed/products.txt).
    """
    make = partial(torch.ones, device=device, dtype=DTYPES[precision])
    tries: list[tuple[float, Callable[[], object]]] = []
    for size in (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        matrix = make(size, size)
        tries.append((2.0 * size**3, partial(torch.matmul, matrix, matrix)))
    if device.type == "cpu":
        images, weight = make(64, 128, 16, 16), make(128, 128, 3, 3)
        there = [tensor.to(memory_format=torch.channels_last) for tensor in (images, weight)]
        tries.append((18.0 * images.numel() * 128, partial(torch.conv2d, *there, padding=1)))
    best = max(flops / min(durations(work, device, seconds / len(tries))) for flops, work in tries)
    kinds = "matrix products and convolutions" if device.type == "cpu" else "matrix products"
    return Peak(best, f"measured, the best of some {precision} {kinds}")
