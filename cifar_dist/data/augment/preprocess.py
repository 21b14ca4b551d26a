"""What every image goes through, in training and evaluation: normalise and resize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.config import InputConfig

_CACHE_BYTES = 8 * 2**20


def resize_matrix(size: int, new_size: int, interpolation: str) -> Tensor:
    """float32 (new_size, size): the antialiased filter of PIL and torchvision along one side, read off an identity."""
    identity = torch.eye(size)[None, None]
    return F.interpolate(identity, size=(new_size, size), mode=interpolation, antialias=True)[0, 0]


class Preprocess:
    """What evaluation does to images: normalise (in fp32, then rounded to `dtype`) and resize (in `dtype`).

    The resize is two matrix products with PIL's antialiased filters, equal to PIL on 8-bit images within one grey
    level, and left out when the images already have the model's size. Bicubic overshoots the range of pixels and is
    clipped after each product, as PIL does.

    Args:
        input: size, mean, std and filter the model expects.
        device: where the images live.
        dtype: floating type of the result.
    """

    def __init__(self, input: InputConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        self._input, self._dtype = input, dtype
        self._mean = torch.tensor(input.mean, device=device) * 255
        self._std_inverse = 1 / (torch.tensor(input.std, device=device) * 255)
        self._range = [(-mean / std, (1 - mean) / std) for mean, std in zip(input.mean, input.std, strict=True)]
        self._matrices: dict[int, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (B,S,S,3) to `dtype` (B,3,T,T)."""
        return self.resize(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 (B,S,S,3) to (pixel / 255 - mean) / std, `dtype` (B,S,S,3)."""
        pixels = images.shape[1] * images.shape[2]
        flat = images.reshape(len(images), -1).to(torch.float32)  # long rows: several times faster than rows of 3
        flat.sub_(self._mean.repeat(pixels)).mul_(self._std_inverse.repeat(pixels))
        return flat.to(self._dtype).view(images.shape)

    def resize(self, images: Tensor) -> Tensor:
        """Images (B,S,S,3) to (B,3,T,T); channels_last in memory where nothing had to be resized."""
        size, new_size = images.shape[1], self._input.img_size
        images = images.permute(0, 3, 1, 2)
        if size == new_size:
            return images
        if size not in self._matrices:
            matrix = resize_matrix(size, new_size, self._input.interpolation)
            self._matrices[size] = matrix.to(images.device, images.dtype)
        matrix = self._matrices[size]
        wide = self._clip_(images.contiguous() @ matrix.T)
        resized = images.new_empty(len(images), 3, new_size, new_size)
        # On a CPU the result is made in parts that are still in its cache when they are clipped.
        part = len(images) if images.is_cuda else max(1, _CACHE_BYTES // resized[:1].nbytes)
        for source, target in zip(wide.split(part), resized.split(part), strict=True):
            self._clip_(torch.matmul(matrix, source, out=target))
        return resized

    def _clip_(self, images: Tensor) -> Tensor:
        """Cut normalised images (B,3,H,W) to the range of pixels, in place; bilinear filters stay within it."""
        if self._input.interpolation != "bilinear":
            for channel, (black, white) in enumerate(self._range):  # a tensor of bounds is many times slower on a CPU
                images[:, channel].clamp_(black, white)
        return images
