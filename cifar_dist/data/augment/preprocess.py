"""What every image goes through, in training and evaluation: normalise and resize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.config import InputConfig


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
        black_and_white = torch.tensor([[0.0], [255.0]], device=device)
        self._range = ((black_and_white - self._mean) * self._std_inverse).to(dtype)[:, :, None, None]
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
        if self._input.interpolation == "bilinear":  # stays within the range of its pixels
            return matrix @ (images.contiguous() @ matrix.T)
        wide = (images.contiguous() @ matrix.T).clamp_(*self._range)
        return (matrix @ wide).clamp_(*self._range)
