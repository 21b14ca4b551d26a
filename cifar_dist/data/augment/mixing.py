"""mixup and CutMix of neighbours in the global batch, the same on any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cifar_dist.config import AugmentConfig
from cifar_dist.data.augment import draws

_CELLS = 4096


@lru_cache(maxsize=4)
def _beta_quantiles(alpha: float) -> Tensor:
    """float64 (_CELLS + 1,): the inverse distribution function of Beta(alpha, alpha) at even steps from 0 to 1."""
    from scipy.stats import beta

    return torch.from_numpy(beta.ppf(torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64).numpy(), alpha, alpha))


def symmetric_beta(alpha: float, u: Tensor) -> Tensor:
    """Numbers of Beta(alpha, alpha) from as many uniform ones in [0, 1), by linear interpolation of its quantiles."""
    cell = (u * _CELLS).long()
    table = _beta_quantiles(alpha)
    return torch.lerp(table[cell], table[cell + 1], u * _CELLS - cell)


@dataclass(frozen=True)
class Pairs:
    """How the two images of each of P pairs are mixed.

    Attributes:
        lam: float32 (P,), the share of each image in itself.
        cut: bool (P,), CutMix rather than mixup.
        box: int64 (P,4), top, bottom, left and right (ends exclusive) of what CutMix swaps.
    """

    lam: Tensor
    cut: Tensor
    box: Tensor


class Mixing:
    """timm's ``Mixup`` with ``mode='pair'``, but pairs are the rows 2 j and 2 j + 1 and follow from the first's id.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017; Yun et al., "CutMix: Regularization Strategy to
    Train Strong Classifiers with Localizable Features", 2019.

    Args:
        config: alphas, probabilities and label smoothing.
        seed: the run's seed.
        num_classes: K.
    """

    def __init__(self, config: AugmentConfig, seed: int, num_classes: int) -> None:
        self._config, self._seed, self._num_classes = config, seed, num_classes

    def pairs(self, ids: Tensor, epoch: int, size: int) -> Pairs:
        """How the pairs of the samples `ids` (2 P,), on the host, are mixed, with images of `size` pixels a side."""
        config = self._config
        numbers = torch.arange(draws.MIX_APPLY, draws.MIX_X + 1)[:, None]
        apply, switch, u, y, x = draws.uniform(self._seed, epoch, ids[0::2], numbers)
        cut = switch < (config.mixup_switch_prob if config.mixup and config.cutmix else float(config.cutmix > 0))
        lam = torch.where(cut, symmetric_beta(config.cutmix or 1.0, u), symmetric_beta(config.mixup or 1.0, u))
        lam = torch.where(apply < config.mixup_prob, lam, 1.0).float()
        # The box is timm's `rand_bbox`: it may hang over the border, and then lam follows from what is left of it.
        side = (size * (1 - lam).double().sqrt()).long()[:, None]
        centre = (torch.stack([y, x], 1) * size).long()
        low, high = (centre - side // 2).clamp(0, size), (centre + (side + 1) // 2).clamp(0, size)
        swapped = (high - low).prod(1).double() / size**2
        box = torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
        return Pairs(torch.where(cut, (1 - swapped).float(), lam), cut, box)

    def __call__(self, images: Tensor, labels: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Mix images (2 P,3,T,T); `labels` int64 (2 P,) on their device, `ids` (2 P,) on the host.

        Returns:
            new images, and float32 (2 P,K): the smoothed targets, mixed alike.
        """
        pairs = self.pairs(ids, epoch, images.shape[-1])
        return mix_images(images, pairs), self._targets(labels, pairs.lam.to(labels.device, non_blocking=True))

    def _targets(self, labels: Tensor, lam: Tensor) -> Tensor:
        smoothing, classes = self._config.smoothing, self._num_classes
        off = smoothing / classes
        targets = torch.full((len(labels), classes), off, device=labels.device)
        targets.scatter_(1, labels[:, None], 1 - smoothing + off)
        other = targets.view(-1, 2, classes).flip(1).view(-1, classes)
        share = lam.repeat_interleave(2)[:, None]
        return targets * share + other * (1 - share)


def mix_images(images: Tensor, pairs: Pairs) -> Tensor:
    """Images (2 P,3,T,T), each mixed with its neighbour; the memory layout stays."""
    device, at = images.device, torch.arange(images.shape[-1], device=images.device)
    lam, cut = pairs.lam.to(device, non_blocking=True), pairs.cut.to(device, non_blocking=True)
    top, bottom, left, right = pairs.box.to(device, non_blocking=True).T[:, :, None]
    swapped = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :]
    # One formula for both: the share of each pixel in itself.
    share = torch.where(cut[:, None, None], (~swapped).float(), lam[:, None, None])[:, None]
    one, two = images[0::2], images[1::2]
    mixed = torch.empty_like(images)
    mixed[0::2] = one * share + two * (1 - share)
    mixed[1::2] = two * share + one * (1 - share)
    return mixed
