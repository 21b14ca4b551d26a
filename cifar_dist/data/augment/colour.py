"""What happens to the values of pixels: PIL's ImageOps and ImageEnhance, on batches of bytes.

Every operation takes uint8 (n,S,S,3) and one float64 argument an image (n,), and returns new uint8 (n,S,S,3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _each(argument: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) as (n,1,1,1) of `dtype`."""
    return argument.to(dtype)[:, None, None, None]


def _blend(plain: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``Image.blend``: `plain` for a factor of 0, the image for 1, beyond it for more; cut to bytes."""
    plain = plain.float()
    mixed = torch.sub(images, plain).mul_(_each(factor, torch.float32)).add_(plain)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """int32 (n,S,S,1): PIL's conversion to ``L``."""
    red, green, blue = images.to(torch.int32).split(1, -1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """``ImageEnhance.Brightness``: black for a factor of 0."""
    return (images * _each(factor, torch.float32)).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """``ImageEnhance.Contrast``: the image's mean grey for a factor of 0."""
    pixels = images.shape[1] * images.shape[2]
    total = _grey(images).sum((1, 2, 3), keepdim=True)
    return _blend((total.double() / pixels + 0.5).floor(), images, factor)


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """``ImageEnhance.Color`` (saturation): greys for a factor of 0."""
    return _blend(_grey(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """``ImageEnhance.Sharpness``: blurred by 3 x 3 pixels for a factor of 0; the outermost pixels stay."""
    whole = images.to(torch.int32)
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inside = slice(1, -1)
    # The pixel itself counts 5 of 13; the half is PIL's rounding.
    whole[:, inside, inside] = (2 * (around + 4 * whole[:, inside, inside]) + 13) // 26
    return _blend(whole, images, factor)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """``ImageOps.invert``."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """``ImageOps.posterize``: keep the `bits` highest bits, all from 8, none below 1."""
    dropped = (8 - bits.long()).clamp(0, 8)
    return images & _each((255 << dropped) & 255, torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """``ImageOps.solarize``: invert what is not below `threshold`."""
    return torch.where(images < _each(threshold, torch.float32), images, 255 - images)


def solarize_add(images: Tensor, add: Tensor) -> Tensor:
    """timm's ``solarize_add``: add to what is below 128; `add` is whole, 0 to 128."""
    return torch.where(images < 128, images + _each(add, torch.uint8), images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """``ImageOps.autocontrast``: stretch every channel from 0 to 255, unless it has one value only."""
    low, high = images.amin((1, 2), keepdim=True).double(), images.amax((1, 2), keepdim=True).double()
    scale = torch.full_like(low, 255.0) / (high - low).clamp_min(1)  # a number / a tensor is rounded twice
    stretched = (images * scale + -low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """``ImageOps.equalize``: spread every channel's histogram evenly."""
    batch, rows, columns, _channels = images.shape
    place = images.view(batch, -1, 3).transpose(1, 2).long()  # (n,3,P)
    counts = torch.zeros(batch, 3, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, place, torch.ones((), dtype=torch.int64, device=images.device).expand(place.shape))
    brightest = counts.gather(2, place.amax(2, keepdim=True))
    step = (rows * columns - brightest) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp_min(1)
    spread = table.clamp_(max=255).gather(2, place).to(torch.uint8).transpose(1, 2).view(images.shape)
    return torch.where(step.view(batch, 1, 1, 3) > 0, spread, images)
