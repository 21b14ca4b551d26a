"""RandAugment, TrivialAugment and colour jitter: which operation each image gets, and how strong.

A layer gives every image one operation. Which one follows from (seed, epoch, sample id) and so is worked out on the
host, which knows these: grouping images by operation on a GPU would have to wait for it at every group. What goes to
the device is, for each group, which images are in it and their arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cifar_dist.data.augment import colour, draws
from cifar_dist.data.augment.geometry import affine, affine_matrix
from cifar_dist.policy_string import RandPolicy

COLOUR_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": colour.autocontrast,
    "equalize": colour.equalize,
    "invert": colour.invert,
    "posterize": colour.posterize,
    "solarize": colour.solarize,
    "solarize_add": colour.solarize_add,
    "color": colour.colour,
    "contrast": colour.contrast,
    "brightness": colour.brightness,
    "sharpness": colour.sharpness,
}
AFFINE_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = (*COLOUR_OPS, *AFFINE_OPS)
_LEVELS = 10.0  # timm's magnitudes are tenths
_BINS = 31  # TrivialAugment's


@dataclass(frozen=True)
class Layer:
    """One operation an image, on the host.

    Attributes:
        op: int64 (B,), a place in `OPS`, or -1 for none.
        argument: float64 (B,), what it means is up to the operation.
        interpolation: (B,) of bool, or the name of the one filter of all: bicubic where true, else bilinear.
    """

    op: Tensor
    argument: Tensor
    interpolation: Tensor | str

    def apply_(self, images: Tensor, fill: Tensor) -> None:
        """Do it to uint8 (B,S,S,3), in place; `fill` (3,) is the colour of what lies outside an image."""
        device = images.device

        def change(rows: Tensor, operate: Callable[[Tensor, Tensor], Tensor], argument: Tensor) -> None:
            if len(rows):
                there = rows.to(device, non_blocking=True)
                argument = argument.to(device, non_blocking=True)
                images.index_copy_(0, there, operate(images.index_select(0, there), argument))

        for number, operate in enumerate(COLOUR_OPS.values()):
            rows = (self.op == number).nonzero()[:, 0]
            change(rows, operate, self.argument[rows])
        moved, how = self.op >= len(COLOUR_OPS), self.interpolation
        filters = {how: moved} if isinstance(how, str) else {"bilinear": moved & ~how, "bicubic": moved & how}
        for name, where in filters.items():
            rows = where.nonzero()[:, 0]
            change(rows, partial(affine, interpolation=name, fill=fill), self._matrices(rows, images.shape[1]))

    def _matrices(self, rows: Tensor, size: int) -> Tensor:
        matrix = torch.empty(len(rows), 6, dtype=torch.float64)
        for number, name in enumerate(AFFINE_OPS, len(COLOUR_OPS)):
            here = self.op[rows] == number
            matrix[here] = affine_matrix(name, self.argument[rows][here], size)
        return matrix


def _choose(op: Tensor, arguments: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Of the operations that `arguments` names in its order, those at `op`: places in `OPS` and their arguments."""
    nothing = torch.zeros(len(op), dtype=torch.float64)
    table = torch.stack([nothing if of is None else of.double() for of in arguments.values()])
    places = torch.tensor([OPS.index(name) if name in OPS else -1 for name in arguments])
    return places[op], table.gather(0, op[None])[0]


class RandAugment:
    """timm's RandAugment over its lists ``_RAND_TRANSFORMS`` and ``_RAND_INCREASING_TRANSFORMS``.

    Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2019.
    """

    def __init__(self, policy: RandPolicy, seed: int) -> None:
        self._policy, self._seed = policy, seed
        self.num_layers = policy.n

    def layer(self, number: int, ids: Tensor, epoch: int, size: int) -> Layer:
        """What layer `number` does to the samples `ids` (B,), on the host, whose images have `size` pixels a side."""
        policy = self._policy
        first = draws.POLICY_STRIDE * number
        numbers = torch.arange(draws.POLICY_OP, draws.POLICY_OP + draws.POLICY_STRIDE)[:, None] + first
        op, apply, level, sign, cubic = draws.uniform(self._seed, epoch, ids, numbers)
        if math.isinf(policy.mstd):
            magnitude = level * policy.m
        else:
            noise = draws.normal(self._seed, epoch, ids, draws.POLICY_LEVEL + first) if policy.mstd else 0.0
            magnitude = policy.m + policy.mstd * torch.as_tensor(noise, dtype=torch.float64).expand(len(ids))
        arguments = rand_arguments(magnitude.clamp(0, policy.mmax), sign < 0.5, policy.inc, size)
        places, argument = _choose((op * len(arguments)).long(), arguments)
        return Layer(torch.where(apply < policy.p, places, -1), argument, cubic < 0.5)


def rand_arguments(magnitude: Tensor, negative: Tensor, increasing: bool, size: int) -> dict[str, Tensor | None]:
    """timm's arguments for a magnitude (B,) and the sign, by operation in timm's order."""
    level = magnitude / _LEVELS
    sign = torch.where(negative, -1.0, 1.0)
    bits, threshold = (level * 4).trunc(), (level * 256).trunc().clamp(max=256)
    factor = level * 1.8 + 0.1
    if increasing:
        bits, threshold, factor = 4 - bits, 256 - threshold, (1 + sign * level * 0.9).clamp(min=0.1)
    return {
        "autocontrast": None,
        "equalize": None,
        "invert": None,
        "rotate": sign * level * 30,
        "posterize": bits,
        "solarize": threshold,
        "solarize_add": (level * 110).trunc().clamp(max=128),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": sign * level * 0.3,
        "shear_y": sign * level * 0.3,
        "translate_x": sign * level * 0.45 * size,
        "translate_y": sign * level * 0.45 * size,
    }


class TrivialAugment:
    """torchvision's TrivialAugmentWide: one operation an image, of one of 31 strengths, none of them tuned.

    Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", 2021.
    """

    num_layers = 1

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def layer(self, number: int, ids: Tensor, epoch: int, size: int) -> Layer:
        """See `RandAugment.layer`."""
        numbers = torch.tensor([draws.POLICY_OP, draws.POLICY_LEVEL, draws.POLICY_SIGN])[:, None]
        op, level, sign = draws.uniform(self._seed, epoch, ids, numbers)
        arguments = trivial_arguments((level * _BINS).long(), sign < 0.5)
        return Layer(*_choose((op * len(arguments)).long(), arguments), "nearest")


def trivial_arguments(bin: Tensor, negative: Tensor) -> dict[str, Tensor | None]:
    """torchvision's arguments for a strength (B,) of 0 to 30 and the sign, by operation in torchvision's order."""
    level, sign = bin / (_BINS - 1), torch.where(negative, -1.0, 1.0)
    shear, factor = sign * level * 0.99, 1 + sign * level * 0.99
    # Pixels come from where the image is not moved to; float32 as torchvision has it: step 15 is 15.99.. and so 15.
    moved = -sign * torch.linspace(0, 32, _BINS)[bin].trunc()
    return {
        "identity": None,
        "shear_x": shear,
        "shear_y": shear,
        "translate_x": moved,
        "translate_y": moved,
        "rotate": sign * level * 135,
        "brightness": factor,
        "color": factor,
        "contrast": factor,
        "sharpness": factor,
        "posterize": (8 - level * 6).round(),
        "solarize": 255 * (1 - level),
        "autocontrast": None,
        "equalize": None,
    }


class ColourJitter:
    """torchvision's ColorJitter: brightness, contrast and saturation by factors around 1, in random order.

    Args:
        strength: the factors lie between ``max(0, 1 - strength)`` and ``1 + strength``.
        seed: the run's seed.
    """

    num_layers = 3

    def __init__(self, strength: float, seed: int) -> None:
        self._low, self._high, self._seed = max(0.0, 1 - strength), 1 + strength, seed
        ops = [OPS.index(name) for name in ("brightness", "contrast", "color")]
        self._ops = torch.tensor(ops)
        self._orders = torch.tensor(list(itertools.permutations(range(len(ops)))))

    def layer(self, number: int, ids: Tensor, epoch: int, size: int) -> Layer:
        """See `RandAugment.layer`."""
        order = draws.uniform(self._seed, epoch, ids, draws.JITTER_ORDER)
        which = self._orders[(order * len(self._orders)).long(), number]
        factor = draws.uniform(self._seed, epoch, ids, draws.JITTER_BRIGHTNESS + which)
        return Layer(self._ops[which], self._low + (self._high - self._low) * factor, "nearest")
