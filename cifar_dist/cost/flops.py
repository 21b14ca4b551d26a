"""How much a model computes for one image, counted without computing it, and what part of a device's peak that is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TRAINING_PASSES = 3  # forward, and a backward pass of twice its products


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
