"""A transformer's patch embedding as one matrix product."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from torch import nn


class PatchConv2d(nn.Conv2d):
    """A convolution whose patches lie side by side, computed under autocast on a GPU as the matrix product that it is.

    cuDNN pads three channels to eight and turns the images around for it: compiled as CUDA graphs, ViT-B/16 trains 1.04
    times as fast without (benchmarks/results/gpu.md). Weights, their names, and the result but for its rounding and its
    strides are those of the convolution.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The convolution: images (B, C, H, W) to (B, D, rows, columns) of patches."""
        if images.is_cuda and torch.is_autocast_enabled("cuda"):
            return as_product(self, images)
        return super().forward(images)


def as_product(patches: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """What the convolution gives, by `torch.nn.functional.linear`; pixels that fill no patch are left out.

    Args:
        patches: with a stride of the kernel's size, and no padding.
        images: (B, C, H, W), at least a patch.
    """
    height, width = patches.kernel_size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    cut = images[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    pixels = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, pixels of one)
    found = nn.functional.linear(pixels, patches.weight.flatten(1), patches.bias)
    return found.transpose(1, 2).unflatten(2, (rows, columns))


def multiply_patches(model: nn.Module) -> None:
    """Make the convolution of each of timm's patch embeddings (ViT, Swin, …) a `PatchConv2d`, in place."""
    for module in model.modules():
        if isinstance(module, PatchEmbed) and type(module.proj) is nn.Conv2d:
            module.proj.__class__ = PatchConv2d
