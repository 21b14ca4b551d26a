"""Random numbers as a function of (seed, epoch, sample id), and what each of them decides."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# One number of a sample's stream each; a new augmentation takes the next one. They are pinned: a change changes runs.
CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X = range(5)
JITTER_ORDER, JITTER_BRIGHTNESS, JITTER_CONTRAST, JITTER_COLOUR = range(5, 9)
MIX_APPLY, MIX_SWITCH, MIX_LAM, MIX_Y, MIX_X = range(9, 14)
ERASE_APPLY, ERASE_TOP, ERASE_LEFT, ERASE_COLOUR = range(14, 18)  # the last takes 3, one a channel
ERASE_AREA, ERASE_ASPECT = 20, 30  # 10 each, one an attempt
BOX_AREA, BOX_RATIO, BOX_TOP, BOX_LEFT = 40, 50, 60, 61  # the first two take 10, one an attempt
POLICY_OP, POLICY_APPLY, POLICY_LEVEL, POLICY_SIGN, POLICY_FILTER = range(64, 69)
POLICY_STRIDE = 5  # from one layer to the next
ERASE_PIXELS = 2**20  # 3 S**2, one a number of the image

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (the one of torch copies the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, 2014), on int64 that wraps around."""
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift(z, 31)


@lru_cache(maxsize=16)
def _key(seed: int, epoch: int) -> int:
    return int(_mix(_mix(torch.tensor(seed) + _GAMMA) + (epoch + 1) * torch.tensor(_GAMMA)))


def uniform(seed: int, epoch: int, ids: Tensor, draw: int | Tensor) -> Tensor:
    """Random numbers that depend on nothing but the arguments; equal on every device.

    Each sample of an epoch has a SplitMix64 stream of its own, of which `draw` names one number.

    Args:
        seed: the run's seed, 0 to 2**63 - 1.
        epoch: 0, 1, ...
        ids: (B,) int64 sample ids.
        draw: which number of the sample's stream, 0, 1, ...; or int64 of a shape that broadcasts against (B,).

    Returns:
        float64 in [0, 1), (B,) or the broadcast shape, with 53 random bits.
    """
    state = _mix(ids + _key(seed, epoch))
    steps = torch.as_tensor(draw, device=ids.device) + 1
    return _shift(_mix(state + steps * _GAMMA), 11).double() * 2.0**-53


def normal(seed: int, epoch: int, ids: Tensor, draw: int | Tensor) -> Tensor:
    """Like `uniform`, but of the standard normal distribution."""
    return torch.special.ndtri(uniform(seed, epoch, ids, draw).clamp_min_(2.0**-54))
