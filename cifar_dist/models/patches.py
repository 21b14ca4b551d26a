"""A layer that cuts images into patches, as one matrix product."""

from __future__ import annotations

import torch
from torch import nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose patches lie side by side, computed under autocast on a GPU as the matrix product that it is.

    cuDNN pads three channels to eight and turns the images around for it: ViT-B/16 trains 1.04 times as fast without
    (benchmarks/results/gpu.md). Weights, their names and the result but for its rounding are those of the convolution.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The convolution: images (B, 3, H, W) to (B, C, H // P, W // P)."""
        if images.is_cuda and torch.is_autocast_enabled("cuda"):
            return as_product(self, images)
        return super().forward(images)


def as_product(patches: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """What the convolution gives, by `torch.nn.functional.linear`; rows and columns that fill no patch are left out.

    Args:
        patches: with P pixels a side and from one patch to the next.
        images: (B, 3, H, W).
    """
    side = patches.kernel_size[0]
    rows, columns = images.shape[2] // side, images.shape[3] // side
    cut = images[:, :, : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
    pixels = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 P P)
    found = nn.functional.linear(pixels, patches.weight.flatten(1), patches.bias)
    return found.transpose(1, 2).unflatten(2, (rows, columns))


def multiply_patches(model: nn.Module) -> None:
    """Make the model's convolutions that cut its images into square patches `PatchConv2d`, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _cuts_images(module):
            module.__class__ = PatchConv2d


def _cuts_images(layer: nn.Conv2d) -> bool:
    side = layer.kernel_size[0]
    if layer.in_channels != 3 or layer.groups > 1 or side == 1:
        return False
    return layer.kernel_size == layer.stride == (side, side) and layer.padding == (0, 0) and layer.dilation == (1, 1)
