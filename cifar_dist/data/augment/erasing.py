"""What removes a part of each normalised image: cutout and random erasing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cifar_dist.data.augment import draws

_AREA = (0.02, 1 / 3)  # of the image
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_ATTEMPTS = 10


def cutout_(images: Tensor, side: int, centre_y: Tensor, centre_x: Tensor) -> None:
    """Set a square of `side` pixels in each image to 0, in place; it may hang over the border.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    Args:
        images: floats (B,S,S,3), contiguous.
        side: pixels.
        centre_y: int64 (B,) in 0..S-1.
        centre_x: int64 (B,) in 0..S-1.
    """
    batch, size = images.shape[:2]
    at = torch.arange(size, device=images.device)

    def outside(centre: Tensor) -> Tensor:
        offset = at - centre[:, None] + side // 2
        return ((offset < 0) | (offset >= side)).to(images.dtype)

    keep = torch.maximum(outside(centre_y)[:, :, None], outside(centre_x).repeat_interleave(3, 1)[:, None, :])
    images.view(batch, size, size * 3).mul_(keep)  # rows of 3 S numbers: several times faster than masking pixels


class Erasing:
    """timm's RandomErasing, one rectangle an image.

    Zhong et al., "Random Erasing Data Augmentation", 2017. It is of the images as they are kept, before they are
    resized; a bicubic resize cuts colours to the range of pixels.

    Args:
        probability: that an image has a rectangle erased.
        mode: what the rectangle becomes: ``const`` the mean, ``rand`` one normally distributed colour, ``pixel`` such
            a colour for every pixel.
        seed: the run's seed.
    """

    def __init__(self, probability: float, mode: str, seed: int) -> None:
        self._probability, self._mode, self._seed = probability, mode, seed

    def boxes(self, ids: Tensor, epoch: int, size: int) -> tuple[Tensor, Tensor]:
        """Which of the samples `ids` (B,), on the host, lose a rectangle, and which: top, bottom, left, right.

        Returns:
            bool (B,) and int64 (B,4), ends exclusive, for images of `size` pixels a side.
        """
        attempts = torch.arange(_ATTEMPTS)[:, None]
        apply = draws.uniform(self._seed, epoch, ids, draws.ERASE_APPLY)
        area = draws.uniform(self._seed, epoch, ids, draws.ERASE_AREA + attempts)
        aspect = draws.uniform(self._seed, epoch, ids, draws.ERASE_ASPECT + attempts)
        area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * size**2
        aspect = (_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * aspect).exp()
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = (height < size) & (width < size)
        first = fits.int().argmax(0, keepdim=True)  # the first attempt that fits
        height, width = height.gather(0, first)[0], width.gather(0, first)[0]
        top = (draws.uniform(self._seed, epoch, ids, draws.ERASE_TOP) * (size - height + 1)).long()
        left = (draws.uniform(self._seed, epoch, ids, draws.ERASE_LEFT) * (size - width + 1)).long()
        return (apply < self._probability) & fits.any(0), torch.stack([top, top + height, left, left + width], 1)

    def erase_(self, images: Tensor, ids: Tensor, epoch: int) -> None:
        """Erase in normalised floats (B,S,S,3), in place; `ids` (B,) lie on the host."""
        size, device = images.shape[1], images.device
        applies, boxes = self.boxes(ids, epoch, size)
        rows = applies.nonzero()[:, 0]
        if not len(rows):
            return
        top, bottom, left, right = boxes[rows].to(device, non_blocking=True).T[:, :, None]
        at = torch.arange(size, device=device)
        inside = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :]
        colours = self._colours(ids[rows].to(device, non_blocking=True), epoch, size).to(images.dtype)
        rows = rows.to(device, non_blocking=True)
        images.index_copy_(0, rows, torch.where(inside[..., None], colours, images.index_select(0, rows)))

    def _colours(self, ids: Tensor, epoch: int, size: int) -> Tensor:
        """(n,S,S,3), or what broadcasts to it: the colours of the samples `ids`."""
        if self._mode == "const":
            return torch.zeros((), device=ids.device)
        shape = (size, size, 3) if self._mode == "pixel" else (1, 1, 3)
        first = draws.ERASE_PIXELS if self._mode == "pixel" else draws.ERASE_COLOUR
        numbers = torch.arange(first, first + math.prod(shape), device=ids.device)
        return draws.normal(self._seed, epoch, ids[:, None], numbers).view(-1, *shape)
