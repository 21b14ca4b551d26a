"""Batched augmentation and preprocessing on the device: uint8 (B,S,S,3) in, normalised (B,3,T,T) out.

The randomness of a sample is a pure function of (seed, epoch, sample id), so its pixels do not depend on the batch,
the process or the step it falls into.

The order is crop, flip, normalise, cutout, resize. Normalising acts on each pixel alone (affine) and resizing is a
linear filter whose weights add up to 1, so these two commute; doing the resize last, and the rest on the small image,
costs least. Two places are fixed by convention: padding is black and so comes before normalising (as in torchvision),
and cutout fills with the mean, which is 0 and so comes after it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.config import AugmentConfig, InputConfig

# One number of a sample's stream each; a new augmentation takes the next one.
CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X = range(5)
_DRAWS = 5
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


def crop_and_flip(images: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad with zeros, mirror those that `flip`, and cut a window of the old size out of each padded image.

    Args:
        images: uint8 (B,S,S,3).
        padding: pixels added on each side.
        top: int64 (B,) in 0..2*padding, first row of the window.
        left: int64 (B,) in 0..2*padding, first column of the window, counted before mirroring.
        flip: bool (B,), mirror the window left to right.

    Returns:
        uint8 (B,S,S,3): `hflip(crop(pad(image), top, left))` of torchvision.
    """
    batch, size = images.shape[:2]
    width = size + 2 * padding
    padded = images.new_zeros(2, batch, width, width, 3)
    inside = padded[:, :, padding : padding + size, padding : padding + size]
    inside[0], inside[1] = images, images.flip(2)
    # Every row of a window is one run of bytes that starts at a pixel; one gather copies those runs.
    runs = padded.view(-1).unfold(0, size * 3, 3)
    image = torch.arange(batch, device=images.device) + batch * flip
    left = torch.where(flip, 2 * padding - left, left)
    row = (image * width + top)[:, None] + torch.arange(size, device=images.device)
    return runs.index_select(0, (row * width + left[:, None]).view(-1)).view(images.shape)


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


class Augment:
    """What training does to images: random crop and flip, normalise, cutout, resize; see the module's text.

    Args:
        augment: sizes and probabilities; mixup, cutmix and smoothing act on whole batches and are not done here.
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
        self._draws = torch.arange(_DRAWS, device=device)[:, None]

    def __call__(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Images uint8 (B,S,S,3) of the samples `ids` (B,) in `epoch` to `dtype` (B,3,T,T)."""
        choice, size = self._augment, images.shape[1]
        u = uniform(self._seed, epoch, ids, self._draws)

        def below(bound: int, draw: int) -> Tensor:
            return (u[draw] * bound).long()

        padding = choice.crop_padding
        if padding or choice.hflip:
            offsets = 2 * padding + 1
            top, left = below(offsets, CROP_Y), below(offsets, CROP_X)
            images = crop_and_flip(images, padding, top, left, u[FLIP] < choice.hflip)
        pixels = self._preprocess.normalise(images)
        if choice.cutout:
            cutout_(pixels, choice.cutout, below(size, CUTOUT_Y), below(size, CUTOUT_X))
        return self._preprocess.resize(pixels)
