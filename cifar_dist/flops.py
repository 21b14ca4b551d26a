"""How much a model computes for one image, counted without computing it, and what part of a device's peak that is."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

TRAINING_PASSES = 3  # forward, and a backward pass of twice its products
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense TFLOP/s by NVIDIA's data sheets (RTX: whitepapers), tensor cores adding up in fp32; None where it states none.
# Sheets that give only what structured sparsity would do are halved (L4, H100, H200, B200).
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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image's forward pass; a multiply-add is two.

    Papers and many counters say GFLOPs for what is here `macs` in 1e9, half as much. Those that look at modules only,
    such as thop, see no product that belongs to none, so not attention's: that is `macs_without_attention`, to which
    thop adds 4 operations for every element of a LayerNorm and 3 for every one of a Softmax module. So it is that
    ViT-B/16 at 224 pixels with 10 classes is quoted as 16.86 GFLOPs (here 16.85) and Swin-B as 15.17 (15.13), where all
    of their products make 17.56 and 15.43 GMACs.

    Attributes:
        forward: all matrix products and convolutions, attention's products too.
        attention: the part in products of two activations, attention's QKᵀ and AV.
    """

    forward: int
    attention: int

    @property
    def macs(self) -> float:
        """Multiply-adds."""
        return self.forward / 2

    @property
    def macs_without_attention(self) -> float:
        """Multiply-adds of convolutions and linear layers only."""
        return (self.forward - self.attention) / 2


@dataclass(frozen=True)
class Peak:
    """The most a device can compute.

    Attributes:
        flops_per_second: of dense matrix products.
        source: where the figure is from.
    """

    flops_per_second: float
    source: str


def count_flops(model: nn.Module, img_size: int) -> Flops:
    """Count the forward pass in evaluation of one RGB image of `img_size` pixels a side.

    torch.utils.flop_counter counts on the meta device, where attention, fused or not, comes as batched products, and
    nothing else in an image classifier does. What it has no formula for counts nothing: norms, activations, softmax,
    pooling, biases, sums, and operators that other libraries add. Nothing is computed, and the model stays as it is.
    """
    twin = _without_values(model).eval()
    # With gradients: without them torch batches products with weights too, and the counter fails on CaiT.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, img_size, img_size, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    attention = [count for name, count in counts.items() if "bmm" in str(name) or "attention" in str(name)]
    return Flops(forward=counter.get_total_flops(), attention=sum(attention))


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, which takes no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"))
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def device_peak(device: torch.device, precision: str) -> Peak:
    """What its maker states for a GPU, by its exact name; for any other device the best of some large matrix products.

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
    """The best of square matrix products, tried for so many seconds."""
    sizes = (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    best = 0.0
    for size in sizes:
        matrix = torch.ones(size, size, device=device, dtype=DTYPES[precision])
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=seconds / len(sizes))
        best = max(best, 2 * size**3 / min(measured.times))
    return Peak(best, f"measured, the best of {precision} matrix products of sizes {', '.join(map(str, sizes))}")


def mfu(flops: Flops, images_per_second: float, num_processes: int, peak: Peak) -> float:
    """Model FLOPs utilisation of a training: the fraction of the devices' peak that the model itself needs.

    As PaLM (Chowdhery et al. 2022, appendix B) has it, with a backward pass of twice the forward's operations (Kaplan
    et al. 2020) and without what is computed again.

    Args:
        flops: of one image's forward pass.
        images_per_second: that all processes together train on.
        num_processes: devices.
        peak: of one of them.
    """
    return TRAINING_PASSES * flops.forward * images_per_second / (num_processes * peak.flops_per_second)
