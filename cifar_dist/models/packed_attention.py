"""Attention of ViT and Swin on a GPU by kernels of our own, which read and write queries, keys and values packed.

torch's fused attention gives the gradients of the three one by one, to be copied together for the layer before; with a
bias, as in Swin's windows, it also wants that written out for every window, and gives a gradient for every window.
How much faster a model trains: benchmarks/results/gpu.md.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

_HAS_TRITON = find_spec("triton") is not None
WINDOW_HEAD, WINDOW_TOKENS = 32, range(1, 65)  # channels of a head, and tokens; measured with 49
IMAGE_HEAD, IMAGE_TOKENS = 64, range(129, 257)  # measured with 197
PRODUCT_TOKENS = 256  # of a window whose table's gradient is a matrix product


class PackedWindowAttention(WindowAttention):
    """timm's attention within windows (Swin, arXiv:2103.14030), under autocast on a GPU by `window_attention`.

    That takes heads of 32 channels, at most 64 tokens, and compute capability 8.0. Weights and their names are the
    same. Scores and biases are not rounded in between, and on any GPU the gradient of the table of biases repeats
    itself, compiled, too.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (windows, N, C) to the same; ``mask`` (M, N, N) is added to scores, to window i's mask i modulo M."""
        if not (_on_gpu(x) and is_new() and self._suits()):
            return super().forward(x, mask)
        bias = self._get_rel_pos_bias()[0].float()
        return self.proj_drop(self.proj(window_attention(self.qkv(x), bias, mask, self.scale)))

    def _get_rel_pos_bias(self) -> Tensor:
        table, area = self.relative_position_bias_table, self.window_area
        if area > PRODUCT_TOKENS or not _adds_in_any_order(table):
            return super()._get_rel_pos_bias()
        index: Any = self.relative_position_index
        rows = Gathered.apply(table, index.flatten())
        return rows.view(area, area, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def _suits(self) -> bool:
        fits = self.proj.in_features == WINDOW_HEAD * self.num_heads and self.window_area in WINDOW_TOKENS
        return fits and not _drops(self)


class PackedAttention(Attention):
    """timm's attention among all tokens (ViT, arXiv:2010.11929), under autocast on a GPU by `image_attention`.

    That takes compute capability 9.0, heads of 64 channels and 129 to 256 tokens, as ViT-B/16 has 197 at 224 px.
    Without gradients cuDNN's forward pass, which torch takes, is the faster.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, C) to the same."""
        if attn_mask is not None or is_causal or not (_on_gpu(x) and is_hopper() and self._suits(x.shape[1])):
            return super().forward(x, attn_mask, is_causal)
        out, _ = image_attention(self.qkv(x), self.num_heads, self.scale)
        return self.proj_drop(self.proj(out))

    def _suits(self, tokens: int) -> bool:
        plain = self.gate is None and all(type(n) is nn.Identity for n in (self.q_norm, self.k_norm, self.norm))
        fits = self.head_dim == IMAGE_HEAD and tokens in IMAGE_TOKENS
        return plain and fits and self.fused_attn and torch.is_grad_enabled() and not _drops(self)


_PACKED: dict[type[nn.Module], type[nn.Module]] = {WindowAttention: PackedWindowAttention, Attention: PackedAttention}


def pack_attention(model: nn.Module) -> None:
    """Make timm's two layers of attention in a model those above, in place."""
    for module in model.modules():
        if packed := _PACKED.get(type(module)):
            module.__class__ = packed


def _drops(layer: Any) -> bool:
    return layer.training and layer.attn_drop.p > 0


def _on_gpu(x: Tensor) -> bool:
    return _HAS_TRITON and x.is_cuda and torch.version.hip is None and torch.is_autocast_enabled("cuda")


def _adds_in_any_order(table: Tensor) -> bool:
    """Whether an index's gradient may be summed up by atomic operations, as compiled code on a GPU does."""
    return table.is_cuda


@torch.compiler.assume_constant_result
def is_new() -> bool:
    """Whether the GPU has the matrix units that Triton needs for bf16 (Ampere, or newer)."""
    return torch.cuda.get_device_capability() >= (8, 0)


@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    """Whether it is an H100, H200 or their like."""
    return torch.cuda.get_device_capability() == (9, 0)


class Gathered(torch.autograd.Function):
    """Rows of a table, with a gradient that repeats itself: compiled, that of an index is summed up in any order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        """Table (T, H) and index int64 (K,) to (K, H)."""
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The table's, as a matrix product: (K, H) to (T, H)."""
        (index,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            chosen = torch.arange(ctx.rows, device=index.device)[:, None] == index
            return (chosen.to(wide.dtype) @ wide).to(grad.dtype), None


def _whole(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


@torch.library.custom_op(
    "cifar_dist::window_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor bias, Tensor? mask, float scale) -> Tensor",
)
def window_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of each window's tokens to one another, softmax(q kᵀ · scale + bias + mask) v, for every head.

    Args:
        qkv: bf16 or fp16 (windows, N, 3 · heads · D), N up to 64, D a power of two:
            queries, keys, values of all heads.
        bias: float32 (heads, N, N); its gradient is summed up in the same order every time.
        mask: float32 (M, N, N), M a divisor of windows, or None; window i has mask i modulo M. It gets no gradient.
        scale: of the scores.

    Returns:
        (windows, N, heads · D), of qkv's type.

    Raises:
        ValueError: the shapes do not fit together.
    """
    from cifar_dist.models import triton_attention

    return triton_attention.window_forward(qkv.contiguous(), bias.contiguous(), _whole(mask), scale)


@torch.library.custom_op(
    "cifar_dist::window_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor bias, Tensor? mask, float scale) -> (Tensor, Tensor)",
)
def window_attention_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias."""
    from cifar_dist.models import triton_attention

    return triton_attention.window_backward(grad.contiguous(), qkv.contiguous(), bias.contiguous(), _whole(mask), scale)


@torch.library.custom_op(
    "cifar_dist::image_attention", mutates_args=(), schema="(Tensor qkv, int heads, float scale) -> (Tensor, Tensor)"
)
def image_attention(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each image's tokens to one another, softmax(q kᵀ · scale) v, for every head.

    Args:
        qkv: bf16 or fp16 (B, N, 3 · heads · D), N up to 256, D a power of two: queries, keys, values of
            all heads.
        heads: how many.
        scale: of the scores, above 0.

    Returns:
        (B, N, heads · D), of qkv's type, and for the gradient float32 (B, heads, N), the binary logarithm of the sum
        that a token's softmax divides by; it has no gradient.
    """
    from cifar_dist.models import triton_attention

    return triton_attention.image_forward(qkv.contiguous(), heads, scale)


@torch.library.custom_op(
    "cifar_dist::image_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor out, Tensor logs, float scale) -> Tensor",
)
def image_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, scale: float) -> Tensor:
    """The gradient of qkv."""
    from cifar_dist.models import triton_attention

    return triton_attention.image_backward(grad.contiguous(), qkv.contiguous(), out, logs, scale)


@window_attention.register_fake
def _(qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@window_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


@image_attention.register_fake
def _(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    images, tokens, width = qkv.shape
    return qkv.new_empty(images, tokens, width // 3), qkv.new_empty(images, heads, tokens, dtype=torch.float32)


@image_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_window(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _window_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *window_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def _keep_image(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, _, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _image_gradients(ctx: Any, grad: Tensor, of_logs: Tensor) -> tuple[Tensor | None, ...]:
    return image_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


window_attention.register_autograd(_window_gradients, setup_context=_keep_window)
image_attention.register_autograd(_image_gradients, setup_context=_keep_image)
