"""Test-time augmentation: the views of an image over which evaluate.py averages a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_dist.data.augment.geometry import crop_and_flip


@dataclass(frozen=True)
class View:
    """How an image is shown to the model.

    Attributes:
        weight: of its probabilities in the average.
        mirrored: left to right.
        moved: pixels of the stored image, down and to the right (negative: up and to the left), before mirroring; what
            is missing then is mirrored in.
    """

    weight: float
    mirrored: bool = False
    moved: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Uint8 (B,S,S,3) to the same shape."""
        padding = abs(self.moved)
        start = torch.full((len(images),), padding - self.moved, device=images.device)
        flip = torch.full((len(images),), self.mirrored, device=images.device)
        return crop_and_flip(images, padding, start, start, flip, "reflect")


# flip-shift: the views and weights of Jordan 2024 (arXiv:2404.00498), who averages logits, while we do probabilities.
VIEWS = {
    "flip": tuple(View(1 / 2, mirrored) for mirrored in (False, True)),
    "flip-shift": tuple(
        View(weight / 2, mirrored, moved)
        for moved, weight in ((0, 1 / 2), (-1, 1 / 4), (1, 1 / 4))
        for mirrored in (False, True)
    ),
}
