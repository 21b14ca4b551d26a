"""The layer at which a model still holds a map of the image, found by the shapes of what passes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.explain.frozen_in_eval import frozen_in_eval

ToMap = Callable[[Tensor], Tensor]
SMALLEST_SIDE = 4  # a coarser map says little about where; an earlier layer's is taken if it is finer


class Unexplained(Exception):
    """The model cannot be handled. The message is one sentence that says why, for the report."""


@dataclass(frozen=True)
class Target:
    """The layer whose output Grad-CAM weighs.

    Attributes:
        name: the layer's name in the model.
        layer: the module.
        to_map: its output as a map, (N, C, H, W).
    """

    name: str
    layer: nn.Module
    to_map: ToMap


def target_of(model: nn.Module, img_size: int) -> Target:
    """The layer that Grad-CAM looks at: the last one whose output is a map of at least 4 x 4, else the finest.

    Layers are those that follow each other from the images to the logits; what they give is found by passing an empty
    image through. Where a class token is classified it is the first normalisation of the last block, since what the
    patch tokens become behind its attention no longer reaches the logits (CaiT and XCiT bring the token in later; of
    small ones, trained, neither choice was clearly the better).

    Args:
        model: a classifier.
        img_size: pixels a side of the images.

    Raises:
        Unexplained: no layer's output is a map.
    """
    parameter = next(model.parameters())
    with frozen_in_eval(model):
        return choose(model, torch.zeros(1, 3, img_size, img_size, device=parameter.device, dtype=parameter.dtype))


def choose(model: nn.Module, image: Tensor) -> Target:
    """`target_of` for one image, (1, 3, S, S)."""
    layers = dict(model.named_modules())
    last = len(blocks_of(model)) - 1
    watched, token = [*_in_series(model)], has_class_token(model)
    if token:  # elsewhere a block's inner layers may see windows of the map
        watched += [f"blocks.{last}.norm1", f"blocks.{last}.attn"]
    outputs = _outputs(model, image, {name: layers[name] for name in watched if name in layers})
    found = _before_attention(model, last, outputs) if token else _last_map(model, outputs)
    if found is None:
        raise Unexplained(f"No layer of this {type(model).__name__} is known to give a map of the image.")
    name, to_map = found
    return Target(name, layers[name], to_map)


def has_class_token(model: nn.Module) -> bool:
    """Whether the logits come from a class token alone; some models have one and average the patches' tokens."""
    return getattr(model, "cls_token", None) is not None and getattr(model, "global_pool", "token") == "token"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A transformer's blocks, if it has them in one row as timm's ViTs do."""
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens (class, distillation, registers) stand before those of the patches."""
    return int(getattr(model, "num_prefix_tokens", 0))


def _before_attention(model: nn.Module, last: int, outputs: dict[str, Tensor]) -> tuple[str, ToMap] | None:
    """What the last attention takes its patch tokens from: the block's first normalisation, or the block before."""
    norm, attention, block_before = f"blocks.{last}.norm1", f"blocks.{last}.attn", f"blocks.{last - 1}"
    first = [name for name in outputs if name in (norm, attention)][:1]  # some blocks normalise after attention
    for name in (*first, block_before):
        if name in outputs and name != attention:
            # Some models append the class token behind these blocks.
            to_map = _reading(outputs[name], prefix_tokens(model)) or _reading(outputs[name])
            if to_map:
                return name, to_map
    return None


def _last_map(model: nn.Module, outputs: dict[str, Tensor]) -> tuple[str, ToMap] | None:
    """The last output that is a map of at least `SMALLEST_SIDE`, else the finest of all."""
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    found, finest = None, 1
    for name, output in reversed(outputs.items()):
        to_map = _reading(output, prefix_tokens(model), channels_last)
        side = to_map(output).shape[-1] if to_map else 0
        if to_map and side > finest:
            found, finest = (name, to_map), side
        tokens = output.ndim == 3 and output.shape[1] > 1
        if tokens or finest >= SMALLEST_SIDE:  # tokens before these may lie in another order
            break
    return found


def _in_series(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the modules that data pass one after the other: the children, or those within lists of them."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _in_series(child, f"{prefix}{name}.")
        elif not isinstance(child, nn.Identity):
            yield prefix + name


def _outputs(model: nn.Module, image: Tensor, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each layer that gives one tensor gives for one image, in the order of their ends."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.pop(name, None)
            found[name] = output

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _reading(output: Tensor, prefix: int = 0, channels_last: bool = False) -> ToMap | None:
    """How a layer's output becomes a map, (N, C, H, W) with H = W > 1, without its first `prefix` tokens; or None."""
    if output.ndim == 3:
        return partial(tokens_to_map, prefix) if _square_side(output.shape[1] - prefix) > 1 else None
    if output.ndim != 4:
        return None
    _, first, second, third = output.shape
    if second == third > 1 and not (channels_last and first == second):
        return _unchanged
    return _channels_first if first == second > 1 else None


def _unchanged(output: Tensor) -> Tensor:
    return output


def _channels_first(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def tokens_to_map(prefix: int, output: Tensor) -> Tensor:
    """Tokens (N, prefix + side * side, C) to (N, C, side, side)."""
    side = _square_side(output.shape[1] - prefix)
    return output[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def _square_side(count: int) -> int:
    """The side of a square of `count` cells, or 0."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0
