"""Which of its two implementations of attention a timm model computes with."""

from __future__ import annotations

import torch
from torch import nn


def use_plain_attention(model: nn.Module, device: torch.device, precision: str) -> list[nn.Module]:
    """Let attention in bf16 on a CPU be plain matrix products instead of torch's fused kernel.

    There a training step of a ViT takes 1.1 to 2 times as long with that kernel (benchmarks/results/speed.md); in fp32
    it does not. The gradient is as near to fp32's either way. Plain products take memory with the square of the tokens.

    Args:
        model: any; only layers that timm has fused are changed.
        device: where it computes.
        precision: fp32, bf16 or fp16.

    Returns:
        The layers that were changed, for who wants to set ``fused_attn`` back.
    """
    if device.type != "cpu" or precision != "bf16":
        return []
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    return fused
