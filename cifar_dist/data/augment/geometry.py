"""Where pixels come from: crop and flip, and the affine operations of the policies."""

from __future__ import annotations

import torch
from torch import Tensor

TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}


def crop_and_flip(images: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor, mode: str = "zeros") -> Tensor:
    """Pad, mirror those that `flip`, and cut a window of the old size out of each padded image.

    Args:
        images: uint8 (B,S,S,3).
        padding: pixels added on each side; less than S under ``reflect``.
        top: int64 (B,) in 0..2*padding, first row of the window.
        left: int64 (B,) in 0..2*padding, first column of the window, counted before mirroring.
        flip: bool (B,), mirror the window left to right.
        mode: what is added: ``zeros``, or ``reflect`` (the image mirrored about its outermost pixels).

    Returns:
        uint8 (B,S,S,3): `hflip(crop(pad(image), top, left))` of torchvision.
    """
    batch, size = images.shape[:2]
    width = size + 2 * padding
    padded = images.new_zeros(2, batch, width, width, 3)
    if mode == "reflect":
        at = (size - 1 - (torch.arange(width, device=images.device) - padding - size + 1).abs()).abs()
        padded[0] = images.index_select(1, at).index_select(2, at)
        padded[1] = padded[0].flip(2)
    else:
        inside = padded[:, :, padding : padding + size, padding : padding + size]
        inside[0], inside[1] = images, images.flip(2)
    # Every row of a window is one run of bytes that starts at a pixel; one gather copies those runs.
    runs = padded.view(-1).unfold(0, size * 3, 3)
    image = torch.arange(batch, device=images.device) + batch * flip
    left = torch.where(flip, 2 * padding - left, left)
    row = (image * width + top)[:, None] + torch.arange(size, device=images.device)
    return runs.index_select(0, (row * width + left[:, None]).view(-1)).view(images.shape)


def affine_matrix(name: str, argument: Tensor, size: int) -> Tensor:
    """From a pixel of the result to the place in the image it is read from, PIL's ``Image.AFFINE``.

    Args:
        name: shear_x, shear_y, translate_x, translate_y or rotate.
        argument: float64 (n,): a slope, pixels that the place is moved by, or degrees counter-clockwise about the
            image's middle.
        size: pixels a side.

    Returns:
        float64 (n,6): a, b, c, d, e, f of x' = a x + b y + c and y' = d x + e y + f.
    """
    matrix = argument.new_tensor([1.0, 0, 0, 0, 1, 0]).repeat(len(argument), 1)
    if name == "rotate":
        angle, middle = -torch.deg2rad(argument), size / 2
        cosine, sine = angle.cos(), angle.sin()
        shift_x, shift_y = middle - (cosine + sine) * middle, middle + (sine - cosine) * middle
        return torch.stack([cosine, sine, shift_x, -sine, cosine, shift_y], 1)
    matrix[:, {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}[name]] = argument
    return matrix


def affine(images: Tensor, matrix: Tensor, interpolation: str, fill: Tensor) -> Tensor:
    """Read each image at the places that its matrix gives, as PIL's ``Image.transform``.

    Args:
        images: uint8 (n,S,S,3).
        matrix: float64 (n,6), see `affine_matrix`.
        interpolation: nearest, bilinear or bicubic.
        fill: uint8 (3,), the colour of places outside the image.

    Returns:
        uint8 (n,S,S,3).
    """
    size, taps = images.shape[1], TAPS[interpolation]
    centre = torch.arange(size, device=images.device, dtype=torch.float64) + 0.5
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    x = (a * centre + b * centre[:, None] + c).flatten(1)
    y = (d * centre + e * centre[:, None] + f).flatten(1)
    outside = (x < 0) | (x >= size) | (y < 0) | (y >= size)
    x, y = x.clamp(0, size - 1e-9), y.clamp(0, size - 1e-9)
    found = _gather(images, x, y, taps)
    return torch.where(outside.view(-1, size, size, 1), fill, found.view(images.shape))


def _gather(images: Tensor, x: Tensor, y: Tensor, taps: int) -> Tensor:
    """uint8 (n,P,3): `images` at places `x` and `y` (n,P), in pixels from the corner, from `taps`**2 pixels each."""
    batch, size = images.shape[:2]
    margin = taps // 2
    if taps > 1:
        x, y = x - 0.5, y - 0.5
        at = torch.arange(-margin, size + margin, device=images.device).clamp_(0, size - 1)
        images = images.index_select(1, at).index_select(2, at)  # the outermost pixels go on
    width = size + 2 * margin
    left, top = x.floor(), y.floor()
    first = margin - (taps // 2 - 1) if taps > 1 else 0
    image = torch.arange(batch, device=images.device)[:, None] * width
    start = ((image + top.long() + first) * width + left.long() + first).view(-1)
    colours = images.reshape(-1, 3)
    if taps == 1:
        return colours.index_select(0, start).view(batch, -1, 3)
    across = _weights((x - left).float(), taps).repeat_interleave(3, 2)  # (taps,n,3P): rows of numbers, not of three,
    down = _weights((y - top).float(), taps).repeat_interleave(3, 2)  # are several times faster
    total = torch.zeros_like(across[0])
    for row in range(taps):
        line = torch.zeros_like(total)
        for column in range(taps):
            pixels = colours.index_select(0, start + (row * width + column)).view(batch, -1)
            line.addcmul_(pixels.to(torch.float32), across[column])
        total.addcmul_(line, down[row])
    return total.clamp_(0, 255).to(torch.uint8).view(batch, -1, 3)  # cut to bytes, as PIL does


def _weights(past: Tensor, taps: int) -> Tensor:
    """(taps,n,P): how much each pixel counts `past` (0 to 1) the left one of the middle two."""
    if taps == 2:
        return torch.stack([1 - past, past], 0)
    square, cube = past**2, past**3
    return torch.stack([2 * square - past - cube, 1 - 2 * square + cube, past + square - cube, cube - square], 0)
