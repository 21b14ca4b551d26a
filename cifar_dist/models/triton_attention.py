"""The GPU kernels of `packed_attention`, in Triton; imported only where they run.

Queries, keys and values of all heads lie side by side in a token's row, as the layer before has computed them, and so
do their gradients. On one kind of GPU every sum is made in the same order each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 256  # share the windows, or one for each mask and head; the order of a bias's gradient depends on it
_LOG2_E = tl.constexpr(1.4426950408889634)
_FUSED = {"enable_fp_fusion": True}  # multiply and add at once; Triton's default is about to change


@triton.jit
def _window_bias(bias, mask, first, head, rows, MASKS: tl.constexpr, N: tl.constexpr):
    """What all windows of a program add to their scores; columns that are no token get none of the attention."""
    square = rows[:, None] * N + rows[None, :]
    inside = (rows < N)[:, None] & (rows < N)[None, :]
    found = tl.load(bias + head * N * N + square, mask=inside, other=0.0)
    if MASKS > 0:
        found += tl.load(mask + (first % MASKS) * N * N + square, mask=inside, other=0.0)
    return tl.where((rows < N)[None, :], found, float("-inf"))


@triton.jit
def _window_qkv(at, tokens, SIZE: tl.constexpr):
    """Queries, keys and values of a window's head, which lie so far from each other."""
    q = tl.load(at, mask=tokens, other=0.0)
    k = tl.load(at + SIZE, mask=tokens, other=0.0)
    v = tl.load(at + 2 * SIZE, mask=tokens, other=0.0)
    return q, k, v


@triton.jit
def _softmax(scores):
    raised = tl.exp(scores - tl.max(scores, 1)[:, None])
    return raised * (1.0 / tl.sum(raised, 1))[:, None]


@triton.jit
def _window_forward(
    qkv, bias, mask, out, windows, scale,
    MASKS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, head, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = tl.arange(0, ROWS), head * D + tl.arange(0, D)[None, :]
    tokens = (rows < N)[:, None]
    shared = _window_bias(bias, mask, first, head, rows, MASKS, N)
    for window in range(first, windows, programs):
        row = (rows.to(tl.int64) + window * N)[:, None] * (HEADS * D)
        q, k, v = _window_qkv(qkv + row * 3 + columns, tokens, HEADS * D)
        share = _softmax(tl.dot(q, tl.trans(k)) * scale + shared)
        tl.store(out + row + columns, tl.dot(share.to(v.dtype), v).to(v.dtype), mask=tokens)


@triton.jit
def _window_backward(
    grad, qkv, bias, mask, grad_qkv, grad_bias, windows, scale,
    MASKS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, head, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, columns = tl.arange(0, ROWS), head * D + tl.arange(0, D)[None, :]
    tokens = (rows < N)[:, None]
    shared = _window_bias(bias, mask, first, head, rows, MASKS, N)
    summed = tl.zeros((ROWS, ROWS), tl.float32)
    for window in range(first, windows, programs):
        row = (rows.to(tl.int64) + window * N)[:, None] * (HEADS * D)
        q, k, v = _window_qkv(qkv + row * 3 + columns, tokens, HEADS * D)
        g = tl.load(grad + row + columns, mask=tokens, other=0.0)
        share = _softmax(tl.dot(q, tl.trans(k)) * scale + shared)
        of_share = tl.dot(g, tl.trans(v))
        of_score = share * (of_share - tl.sum(share * of_share, 1)[:, None])
        summed += of_score
        rounded = of_score.to(q.dtype)
        dv = tl.dot(tl.trans(share.to(g.dtype)), g)
        dk = tl.dot(tl.trans(rounded), q) * scale
        dq = tl.dot(rounded, k) * scale
        tl.store(grad_qkv + row * 3 + columns, dq.to(q.dtype), mask=tokens)
        tl.store(grad_qkv + row * 3 + HEADS * D + columns, dk.to(q.dtype), mask=tokens)
        tl.store(grad_qkv + row * 3 + 2 * HEADS * D + columns, dv.to(q.dtype), mask=tokens)
    square = rows[:, None] * N + rows[None, :]
    own = grad_bias + (first * HEADS + head) * (N * N)
    tl.store(own + square, summed, mask=tokens & (rows < N)[None, :])


@triton.jit
def _image_forward(
    qkv, out, logs, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(0), tl.program_id(1)
    row_size: tl.constexpr = HEADS * D
    out += image.to(tl.int64) * (N * row_size) + head * D
    qkv += image.to(tl.int64) * (N * row_size * 3) + head * D
    logs += (image * HEADS + head) * N
    columns, keys = tl.arange(0, D)[None, :], tl.arange(0, KEYS)
    at = keys[:, None] * (3 * row_size) + columns
    k = tl.load(qkv + row_size + at, mask=keys[:, None] < N, other=0.0)
    v = tl.load(qkv + 2 * row_size + at, mask=keys[:, None] < N, other=0.0)
    beyond = tl.where(keys < N, 0.0, float("-inf"))[None, :]
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < N)[:, None]
        q = tl.load(qkv + rows[:, None] * (3 * row_size) + columns, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) + beyond
        top = tl.max(scores, 1) * (scale * _LOG2_E)
        raised = tl.exp2(scores * (scale * _LOG2_E) - top[:, None])
        total = tl.sum(raised, 1)
        o = tl.dot(raised.to(v.dtype), v) / total[:, None]
        tl.store(out + rows[:, None] * row_size + columns, o.to(v.dtype), mask=inside)
        tl.store(logs + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _image_backward(
    grad, qkv, out, logs, grad_qkv, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Scores stand on end, a column for each query: so the products take them from registers as they are.
    head, image = tl.program_id(0), tl.program_id(1)
    row_size: tl.constexpr = HEADS * D
    out += image.to(tl.int64) * (N * row_size) + head * D
    grad += image.to(tl.int64) * (N * row_size) + head * D
    qkv += image.to(tl.int64) * (N * row_size * 3) + head * D
    grad_qkv += image.to(tl.int64) * (N * row_size * 3) + head * D
    logs += (image * HEADS + head) * N
    columns, keys = tl.arange(0, D)[None, :], tl.arange(0, KEYS)[:, None]
    at = keys * (3 * row_size) + columns
    k = tl.load(qkv + row_size + at, mask=keys < N, other=0.0)
    v = tl.load(qkv + 2 * row_size + at, mask=keys < N, other=0.0)
    dk, dv = tl.zeros((KEYS, D), tl.float32), tl.zeros((KEYS, D), tl.float32)
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside, row = (rows < N)[:, None], rows[:, None] * row_size + columns
        q = tl.load(qkv + rows[:, None] * (3 * row_size) + columns, mask=inside, other=0.0)
        g = tl.load(grad + row, mask=inside, other=0.0)
        o = tl.load(out + row, mask=inside, other=0.0)
        log = tl.load(logs + rows, mask=rows < N, other=0.0)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        log_share = tl.dot(k, tl.trans(q)) * (scale * _LOG2_E) - log[None, :]
        share = tl.exp2(tl.where(keys < N, log_share, float("-inf")))
        dv += tl.dot(share.to(g.dtype), g)
        of_score = (share * (tl.dot(v, tl.trans(g)) - mean[None, :])).to(q.dtype)
        dk += tl.dot(of_score, q)
        dq = tl.trans(tl.dot(tl.trans(k), of_score)) * scale
        tl.store(grad_qkv + rows[:, None] * (3 * row_size) + columns, dq.to(q.dtype), mask=inside)
    tl.store(grad_qkv + row_size + at, (dk * scale).to(k.dtype), mask=keys < N)
    tl.store(grad_qkv + 2 * row_size + at, dv.to(k.dtype), mask=keys < N)


def _window_launch(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[tuple[int, int], dict[str, int]]:
    """How many programs, and what is compiled into them. All windows of a program have the same mask."""
    (windows, tokens, width), heads, masks = qkv.shape, bias.shape[0], 0 if mask is None else mask.shape[0]
    alike = max(1, masks)
    square = (tokens, tokens)
    if windows % alike or bias.shape[1:] != square or (mask is not None and mask.shape[1:] != square):
        shapes = [tuple(each.shape) for each in (qkv, bias, mask) if each is not None]
        raise ValueError(f"attention within windows does not fit together: qkv, bias and mask of {shapes}")
    programs = alike * min(max(1, _PROGRAMS // (heads * alike)), windows // alike)
    sizes = {"MASKS": masks, "HEADS": heads, "N": tokens, "D": width // (3 * heads)}
    rows = max(16, triton.next_power_of_2(tokens))
    return (programs, heads), sizes | {"ROWS": rows, "num_warps": 4, "num_stages": 3} | _FUSED


def window_forward(qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `packed_attention.window_attention`."""
    grid, sizes = _window_launch(qkv, bias, mask)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    with torch.cuda.device_of(qkv):
        _window_forward[grid](qkv, bias, bias if mask is None else mask, out, len(qkv), scale, **sizes)
    return out


def window_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias."""
    grid, sizes = _window_launch(qkv, bias, mask)
    grad_qkv, parts = torch.empty_like(qkv), bias.new_empty(grid[0], *bias.shape)
    with torch.cuda.device_of(qkv):
        _window_backward[grid](
            grad, qkv, bias, bias if mask is None else mask, grad_qkv, parts, len(qkv), scale, **sizes
        )
    return grad_qkv, parts.sum(0)


def _image_launch(qkv: Tensor, heads: int) -> tuple[tuple[int, int], dict[str, int]]:
    images, tokens, width = qkv.shape
    sizes = {"HEADS": heads, "N": tokens, "D": width // (3 * heads), "KEYS": triton.next_power_of_2(tokens)}
    return (heads, images), sizes | _FUSED


def image_forward(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `packed_attention.image_attention`."""
    grid, sizes = _image_launch(qkv, heads)
    images, tokens, width = qkv.shape
    out, logs = qkv.new_empty(images, tokens, width // 3), qkv.new_empty(images, heads, tokens, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _image_forward[grid](qkv, out, logs, scale, ROWS=64, num_warps=4, num_stages=2, **sizes)
    return out, logs


def image_backward(grad: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, scale: float) -> Tensor:
    """The gradient of qkv."""
    grid, sizes = _image_launch(qkv, logs.shape[1])
    grad_qkv = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        _image_backward[grid](grad, qkv, out, logs, grad_qkv, scale, ROWS=32, num_warps=8, num_stages=3, **sizes)
    return grad_qkv
