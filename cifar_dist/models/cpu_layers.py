"""Layers that a model trains faster with in bf16 on a CPU than with torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cifar_dist.models.cpu_convolution import FASTER


def use_cpu_layers(model: nn.Module, device: torch.device, precision: str) -> Callable[[], None]:
    """Compute attention by plain matrix products and gradients of convolutions by `cpu_convolution`, in place.

    There a training step of a ViT takes 1.1 to 2 times as long with torch's fused kernel for attention, of a CNN up to
    2.2 times with its gradients (benchmarks/results/speed.md); in fp32 they do not. Weights and their names stay the
    same, and the whole gradient is as near to fp32's. Plain products take memory with the square of the tokens.

    Args:
        model: any; only timm's attention, where it is fused, and plain convolutions are changed.
        device: where it computes.
        precision: fp32, bf16 or fp16; only in bf16 on a CPU anything is changed.

    Returns:
        What sets them back.
    """
    if device.type != "cpu" or precision != "bf16":
        return lambda: None
    attention: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    convolutions = {module: type(module) for module in model.modules() if type(module) in FASTER}
    for module in attention:
        module.fused_attn = False
    for module, kind in convolutions.items():
        module.__class__ = FASTER[kind]

    def undo() -> None:
        for module in attention:
            module.fused_attn = True
        for module, kind in convolutions.items():
            module.__class__ = kind

    return undo
