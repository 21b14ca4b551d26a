"""Everything that training does to single images, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from cifar_dist.config import AugmentConfig, InputConfig
from cifar_dist.data.augment.draws import CROP_X, CROP_Y, CUTOUT_X, CUTOUT_Y, FLIP, uniform
from cifar_dist.data.augment.erasing import Erasing, cutout_
from cifar_dist.data.augment.geometry import crop_and_flip
from cifar_dist.data.augment.policy import ColourJitter, RandAugment, TrivialAugment
from cifar_dist.data.augment.preprocess import Preprocess
from cifar_dist.data.augment.resized_crop import ResizedCrop
from cifar_dist.policy_string import parse_policy


class Augment:
    """What training does to images, but for mixing; see the package's text.

    Args:
        augment: sizes and probabilities; mixup, cutmix and smoothing act on pairs and are done by `Mixing`.
        input: size, mean, std and filter the model expects.
        seed: the run's seed.
        device: where the images live.
        dtype: floating type of the result.
    """

    def __init__(
        self, augment: AugmentConfig, input: InputConfig, seed: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self._augment, self._seed = augment, seed
        self._preprocess = Preprocess(input, device, dtype)
        self._resized_crop = None if augment.scale is None else ResizedCrop(augment.scale, input, seed)
        self._draws = torch.arange(CUTOUT_X + 1, device=device)[:, None]
        self._policies: list[tuple[RandAugment | TrivialAugment | ColourJitter, Tensor]] = []
        if augment.aa is not None:
            policy = parse_policy(augment.aa)
            # timm fills with the mean, torchvision with black.
            fill = [0.0] * 3 if policy is None else [min(255.0, round(255 * value)) for value in input.mean]
            chosen = TrivialAugment(seed) if policy is None else RandAugment(policy, seed)
            self._policies.append((chosen, torch.tensor(fill, device=device).to(torch.uint8)))
        if augment.color_jitter:
            black = torch.zeros(3, dtype=torch.uint8, device=device)
            self._policies.append((ColourJitter(augment.color_jitter, seed), black))
        self._erasing = Erasing(augment.reprob, augment.remode, seed) if augment.reprob else None

    def __call__(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Images uint8 (B,S,S,3) of the samples `ids` (B,) in `epoch` to `dtype` (B,3,T,T).

        `ids` may lie on the host or with the images; resized crops, policies and erasing choose on the host and so are
        faster for ids that are there.
        """
        choice = self._augment
        if self._resized_crop is not None:
            images = self._resized_crop(images, ids.cpu(), epoch)
        size = images.shape[1]
        there = ids.to(images.device, non_blocking=True)
        u = uniform(self._seed, epoch, there, self._draws)

        def below(bound: int, draw: int) -> Tensor:
            return (u[draw] * bound).long()

        padding = choice.crop_padding
        if padding or choice.hflip:
            offsets = 2 * padding + 1
            top, left, flip = below(offsets, CROP_Y), below(offsets, CROP_X), self._flip(there, epoch, u[FLIP])
            images = crop_and_flip(images, padding, top, left, flip, choice.crop_mode)
        elif self._policies:
            images = images.clone()
        for policy, fill in self._policies:
            for number in range(policy.num_layers):
                policy.layer(number, ids.cpu(), epoch, size).apply_(images, fill)
        pixels = self._preprocess.normalise(images)
        if choice.cutout:
            cutout_(pixels, choice.cutout, below(size, CUTOUT_Y), below(size, CUTOUT_X))
        if self._erasing is not None:
            self._erasing.erase_(pixels, ids.cpu(), epoch)
        return self._preprocess.resize(pixels)

    def _flip(self, ids: Tensor, epoch: int, u: Tensor) -> Tensor:
        """bool (B,): which are mirrored.

        Alternating is that of airbench (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024): at random in
        epoch 0, from then on the other way each epoch.
        """
        if self._augment.flip_mode == "random":
            return u < self._augment.hflip
        return (uniform(self._seed, 0, ids, FLIP) < self._augment.hflip) ^ bool(epoch % 2)
