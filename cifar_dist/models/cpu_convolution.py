"""Gradients of convolutions in bf16 on a CPU, where torch's own take many times as long as the forward pass.

Four are slow there, and are computed here by what torch is fast at (benchmarks/results/speed.md). Of a depthwise
convolution, the weight gradient for kernels above 3 × 3, by products of image rows, and for smaller ones on a few rows
of pixels, by torch's own after padding; the input gradient with a stride, by a convolution without one. Of a dense one,
the weight gradient at few positions, by products of patches laid out side by side (im2col, Chellapilla et al. 2006).
For a while that takes memory for copies of the input. The forward pass is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

SMALL_KERNEL = 3  # up to which torch is fast at depthwise weight gradients
FEW_POSITIONS, FEW_FOR_MANY = 25, 49  # up to which it is not at others, from so many channels on:
CHANNELS, MANY_CHANNELS = 128, 256


class CpuConv2d(nn.Conv2d):
    """A convolution that has these gradients where they are the faster ones, in bf16 on a CPU, and else is torch's.

    That is for images (B, C, H, W), dense or depthwise, uncompiled. Double backward works, `torch.func` does not.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (_in_bf16(input, weight) and self._gains(input)):
            return super()._conv_forward(input, weight, bias)
        tensors = [None if each is None else each.to(torch.bfloat16) for each in (input, weight, bias)]
        return _Convolution.apply(*tensors, self.stride[0], self._zeros()[0])

    def _gains(self, x: Tensor) -> bool:
        kernel, stride, zeros = self.kernel_size, self.stride, self._zeros()
        square = all(pair[0] == pair[1] for pair in (kernel, stride, zeros)) and zeros[0] < kernel[0]
        if not (square and self.padding_mode == "zeros" and self.dilation == (1, 1)):
            return False
        if self.groups > 1:
            depthwise = self.groups == self.in_channels == self.out_channels
            ours = stride[0] > 1 or kernel[0] > SMALL_KERNEL or _is_low(x, kernel[0], stride[0], zeros[0])
            return depthwise and ours
        positions = math.prod((side + 2 * zeros[0] - kernel[0]) // stride[0] + 1 for side in x.shape[2:])
        channels = min(self.in_channels, self.out_channels)
        return channels >= CHANNELS and positions <= (FEW_FOR_MANY if channels >= MANY_CHANNELS else FEW_POSITIONS)

    def _zeros(self) -> Sequence[int]:
        """Zeros above and to the left; of "same" to the left and right, which differ for an even kernel."""
        return self.padding if isinstance(self.padding, tuple) else self._reversed_padding_repeated_twice[:2]


class CpuConv2dSame(Conv2dSame, CpuConv2d):
    """The same with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, D, H / stride, W / stride), rounded up."""
        padded = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return self._conv_forward(padded, self.weight, self.bias)


FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: CpuConv2d, Conv2dSame: CpuConv2dSame}


def _in_bf16(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or x.ndim != 4 or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64
    return x.dtype == weight.dtype == torch.bfloat16


def _is_low(x: Tensor, kernel: int, stride: int, padding: int) -> bool:
    """Whether an image has so few rows that oneDNN 3.13 does not use its depthwise kernel for the weight gradient.

    Measured for 3 × 3 kernels with one zero around the image, and strides of 1 and 2.
    """
    return padding == 1 and x.shape[2] < kernel + stride - 1


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.groups = stride, padding, x.shape[1] // weight.shape[1]
        return conv2d(x, weight, bias, stride, padding, groups=ctx.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given = grad, x, weight, ctx.stride, ctx.padding
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        found: list[Tensor | None] = [None, None, None]
        if of_x and ctx.groups > 1 and ctx.stride > 1:
            found[0] = depthwise_input_gradient(*given)
        if of_weight and ctx.groups > 1 and weight.shape[-1] > SMALL_KERNEL:
            found[1] = depthwise_weight_gradient(*given)
        elif of_weight and ctx.groups > 1 and _is_low(x, weight.shape[-1], ctx.stride, ctx.padding):
            found[1] = low_depthwise_weight_gradient(*given)
        elif of_weight and ctx.groups == 1:
            found[1] = dense_weight_gradient(*given)
        if of_bias and (found[1] is not None or not of_weight):  # torch would compute the weight's with it
            found[2] = grad.sum((0, 2, 3))
        left = [want and each is None for want, each in zip((of_x, of_weight, of_bias), found, strict=True)]
        if any(left):
            settings = [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0], ctx.groups
            torchs = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *settings, left)
            found = [theirs if each is None else each for each, theirs in zip(found, torchs, strict=True)]
        return *found, None, None


# Each of these takes the gradient of the output, (B, D, rows, columns), and what the convolution was given: the input
# (B, C, H, W), the weight, the stride of both dimensions, and the zeros around an image, fewer than the kernel's K.


def dense_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Of a convolution without groups, (D, C, K, K): the output's gradient times the input's patches."""
    kernel, (images, depth, rows, columns) = weight.shape[-1], grad.shape
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
    image, line, pixel, _ = padded.stride()
    shape, strides = (images, rows, columns, kernel, x.shape[1]), (image, stride * line, stride * pixel, pixel, 1)
    outputs = grad.permute(0, 2, 3, 1).reshape(-1, depth).t()
    found = torch.empty_like(weight)
    for row in range(kernel):
        patches = padded.as_strided(shape, strides, row * line).flatten(3).flatten(0, 2)
        found[:, :, row] = (outputs @ patches).view(depth, kernel, -1).transpose(1, 2)
    return found


def depthwise_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Of a depthwise convolution, (C, 1, K, K): sums along diagonals of products of rows.

    For a channel and a row of the kernel, the output gradient's rows times the input's rows that it meets, over all
    images, is (columns, width); the kernel's column j met output column c at input column stride · c + j. Products are
    rounded before they are summed: it is farther from the exact gradient than torch's, mostly 1.4 to 4 times.
    """
    kernel, (_, channels, rows, columns) = weight.shape[-1], grad.shape
    height, width = stride * (rows - 1) + kernel, stride * (columns - 1) + kernel  # of what was read, with padding
    below, right = height - padding - x.shape[2], width - padding - x.shape[3]
    read = pad(x.contiguous(), (padding, right, padding, below + -height % stride))  # less where a stride leaves a rest
    read = read.unflatten(2, (-1, stride)).permute(1, 3, 2, 0, 4).contiguous()  # (C, stride, …, B, width)
    outputs = grad.contiguous().permute(1, 3, 2, 0).reshape(channels, columns, -1)
    found = torch.empty_like(weight)
    for row in range(kernel):
        first = row // stride
        products = torch.bmm(outputs, read[:, row % stride, first : first + rows].flatten(1, 2))
        diagonals = products.as_strided((channels, kernel, columns), (columns * width, 1, stride + width))
        found[:, 0, row] = diagonals.sum(2)
    return found


def low_depthwise_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Of a depthwise convolution, (C, 1, K, K): torch's, of images to which the zeros around belong."""
    settings = [stride] * 2, [0, 0], [1, 1], False, [0, 0], len(weight), [False, True, False]
    return torch.ops.aten.convolution_backward(grad, pad(x, [padding] * 4), weight, None, *settings)[1]


def depthwise_input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Of a depthwise convolution, (B, C, H, W): the gradient with zeros in between, by the kernel turned around."""
    kernel, (images, channels, _, _) = weight.shape[-1], grad.shape
    height, width = (side + 2 * padding - kernel + 1 for side in x.shape[2:])  # of the output without the stride
    layout = torch.channels_last if grad.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    apart = torch.empty(images, channels, height, width, dtype=grad.dtype, memory_format=layout).zero_()
    apart[:, :, ::stride, ::stride] = grad
    return conv2d(apart, weight.flip(2, 3), padding=kernel - 1 - padding, groups=channels)
