"""RandomResizedCrop: a box of random area and shape, resized to what the model sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cifar_dist.config import InputConfig
from cifar_dist.data.augment import draws

_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


class ResizedCrop:
    """torchvision's RandomResizedCrop (Szegedy et al., "Going deeper with convolutions", 2015, section 6).

    A box whose area is a share of the image's that is drawn evenly, and whose ratio of width to height is drawn evenly
    on a logarithmic scale from 3/4 to 4/3; where ten of them do not fit into the image, all of it.

    Args:
        scale: the smallest and the largest share.
        input: size and filter the model expects.
        seed: the run's seed.
    """

    def __init__(self, scale: tuple[float, ...], input: InputConfig, seed: int) -> None:
        self._low, self._high = scale
        self._size, self._interpolation, self._seed = input.img_size, input.interpolation, seed

    def boxes(self, ids: Tensor, epoch: int, size: int) -> Tensor:
        """The boxes of the samples `ids` (B,), on the host, in images of `size` pixels a side.

        Returns:
            int64 (B,4): top, left, height, width.
        """
        attempts = torch.arange(_ATTEMPTS)[:, None]
        area = draws.uniform(self._seed, epoch, ids, draws.BOX_AREA + attempts)
        ratio = draws.uniform(self._seed, epoch, ids, draws.BOX_RATIO + attempts)
        area = (self._low + (self._high - self._low) * area) * size**2
        ratio = (_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio).exp()
        height, width = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
        fits = (height > 0) & (height <= size) & (width > 0) & (width <= size)
        first = fits.int().argmax(0, keepdim=True)  # the first attempt that fits
        height, width = (torch.where(fits.any(0), side.gather(0, first)[0], size) for side in (height, width))
        top = (draws.uniform(self._seed, epoch, ids, draws.BOX_TOP) * (size - height + 1)).long()
        left = (draws.uniform(self._seed, epoch, ids, draws.BOX_LEFT) * (size - width + 1)).long()
        return torch.stack([top, left, height, width], 1)

    def __call__(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Images uint8 (B,S,S,3) of the samples `ids` (B,), on the host, to uint8 (B,T,T,3)."""
        batch, size, new = len(images), images.shape[1], self._size
        top, left, height, width = self.boxes(ids, epoch, size).to(images.device, non_blocking=True).T
        down, across = self._filters(top, height, size), self._filters(left, width, size)
        rows = torch.matmul(down[:, None], images.permute(0, 3, 1, 2).to(torch.float32))  # (B,3,T,S)
        made = torch.bmm(rows.view(batch, 3 * new, size), across.mT)
        pixels = made.round_().clamp_(0, 255).to(torch.uint8)
        return pixels.view(batch, 3, new, new).permute(0, 2, 3, 1).contiguous()

    def _filters(self, start: Tensor, length: Tensor, size: int) -> Tensor:
        """float32 (B,T,S): PIL's antialiased filter along one side, of `length` (B,) pixels from `start` (B,) on."""
        at = torch.arange(size, device=start.device) - start[:, None, None]
        step = (length / self._size)[:, None, None]
        middle = (torch.arange(self._size, device=start.device)[:, None] + 0.5) * step
        weights = _kernel((at + 0.5 - middle) / step.clamp(min=1), self._interpolation)
        weights *= (at >= 0) & (at < length[:, None, None])
        return weights / weights.sum(2, keepdim=True)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """How much a pixel counts that is `x` pixels away: a triangle, or Keys' cubic with a = -1/2."""
    x = x.abs_()
    if interpolation == "bilinear":
        return x.neg_().add_(1).clamp_(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
