"""Which parts of an image a classifier looks at: Grad-CAM and attention rollout, for any timm model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_SIZE = 32
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
    to_map: Callable[[Tensor], Tensor]


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), by the library grad-cam, at the layer of `target_of`.

    The model is left as it was: its mode, what trains, its gradients and hooks.

    Args:
        model: a classifier in fp32.
        images: float32 (N, 3, S, S), normalised, on the model's device.
        classes: int64 (N,), the class whose evidence is asked for in each image.

    Returns:
        float32 (N, S, S) in [0, 1] on the CPU. The maximum of every map is 1, unless nothing speaks for the class and
        all of it is 0, as may rightly happen in an untrained model.

    Raises:
        Unexplained: no layer's output is a map.
    """
    maps = []
    with _held_still(model):
        target = _choose(model, images[:1])
        for some, wanted in zip(images.split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True):
            maps.append(_enlarge(_weighted_activations(model, target, some, wanted), images.shape[-1]))
    return torch.cat(maps)


def attention_rollout(model: nn.Module, images: Tensor) -> Tensor | None:
    """How much the class token sees of each patch through all layers (Abnar & Zuidema 2020, arXiv:2005.00928).

    Attention is the mean over heads, averaged with the identity for the residual connection. The model is left as it
    was.

    Args:
        model: a classifier in fp32.
        images: float32 (N, 3, S, S), normalised, on the model's device.

    Returns:
        float32 (N, S, S) in [0, 1] on the CPU, the maximum of every map 1; None if the model does not classify by a
        class token.

    Raises:
        Unexplained: it has a class token, but its attention does not lie open as in timm's ViTs.
    """
    if getattr(model, "cls_token", None) is None or not str(getattr(model, "global_pool", "")).startswith("token"):
        return None
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    maps = []
    with _held_still(model), torch.no_grad():
        for some in images.split(BATCH_SIZE):
            seen = _rolled_out(model, some)[:, 0, prefix:]
            side = _square_side(seen.shape[1])
            if not side:
                raise Unexplained(f"The {seen.shape[1]} patch tokens of this {type(model).__name__} are no square map.")
            maps.append(_enlarge(seen.unflatten(1, (side, side)), images.shape[-1]))
    return torch.cat(maps)


def target_of(model: nn.Module, img_size: int | None = None) -> Target:
    """The layer that Grad-CAM looks at: the last one whose output is a map of at least 4 x 4, else the finest.

    Layers are those that follow each other from the images to the logits; what they give is found by passing an empty
    image through. In a ViT it is the first normalisation of the last block, since the patch tokens behind that block
    no longer reach a class token.

    Args:
        model: a classifier.
        img_size: pixels a side of the images; None: the model's own.

    Raises:
        Unexplained: no layer's output is a map.
    """
    parameter = next(model.parameters())
    side = img_size or _own_image_size(model)
    with _held_still(model):
        return _choose(model, torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype))


def _own_image_size(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[-1] if size else resolve_model_data_config(model)["input_size"][-1]


@contextmanager
def _held_still(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, in fp32, with no weight asking for a gradient; all of it put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device_type = next(model.parameters()).device.type
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def _weighted_activations(model: nn.Module, target: Target, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM at the layer's own resolution, float32 (N, H, W), at least 0.

    The library's own call would take each map's minimum off, and clear the gradients of the model.
    """
    from pytorch_grad_cam import GradCAM

    # A copy, since a layer behind the target may work in place.
    cam = GradCAM(model, [target.layer], lambda output: target.to_map(output).clone())
    kept = cam.activations_and_grads
    try:
        logits = kept(images.detach().clone().requires_grad_())
        logits.gather(1, classes.to(logits.device)[:, None]).sum().backward()
        activations, gradients = kept.activations[-1].numpy(), kept.gradients[-1].numpy()
        found = cam.get_cam_image(images, target.layer, [], activations, gradients)
    finally:
        kept.release()
    return torch.from_numpy(found).clamp(min=0)


def _enlarge(maps: Tensor, side: int) -> Tensor:
    """(N, H, W) of at least 0 to (N, side, side) on the CPU, bilinear, each over its maximum."""
    large = F.interpolate(maps.float().cpu()[:, None], size=(side, side), mode="bilinear")[:, 0]
    peaks = large.amax(dim=(1, 2), keepdim=True)
    return torch.where(peaks > 0, large / peaks, 0.0)


def _rolled_out(model: nn.Module, images: Tensor) -> Tensor:
    """The product of all layers' attention, (N, T, T) for T tokens; a row says where its token comes from."""
    attentions = [getattr(block, "attn", None) for block in cast(Any, model).blocks]
    fused = [(module, module.fused_attn) for module in attentions if hasattr(module, "fused_attn")]
    rollout: list[Tensor] = []

    def multiply(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        mean = output.mean(dim=1)
        layer = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rollout[:] = [layer @ rollout[0] if rollout else layer]

    handles = [module.attn_drop.register_forward_hook(multiply) for module in attentions if module is not None]
    try:
        for module, _ in fused:
            module.fused_attn = False  # the fused kernel never holds the attention itself
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_fused in fused:
            module.fused_attn = was_fused
    return rollout[0]


def _square_side(count: int) -> int:
    """The side of a square of `count` cells, or 0."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _choose(model: nn.Module, image: Tensor) -> Target:
    """`target_of` for one image, (1, 3, S, S)."""
    layers = dict(model.named_modules())
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    last = len(getattr(model, "blocks", ())) - 1
    watched = [*_in_series(model), f"blocks.{last}.norm1", f"blocks.{last}.attn"]
    outputs = _outputs(model, image, {name: layers[name] for name in watched if name in layers})
    for name in _before_attention(last, list(outputs)):
        to_map = _reading(outputs[name], prefix) or _reading(outputs[name], 0)
        if to_map:
            return Target(name, layers[name], to_map)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    best, finest = None, 1
    for name in reversed(outputs if not prefix else ()):  # behind a class token's last attention no patch counts
        to_map = _reading(outputs[name], 0, channels_last)
        side = to_map(outputs[name]).shape[-1] if to_map else 0
        if to_map and side > finest:
            best, finest = Target(name, layers[name], to_map), side
        if finest >= SMALLEST_SIDE:
            break
    if best is None:
        raise Unexplained(f"No layer of this {type(model).__name__} gives a map of the image.")
    return best


def _before_attention(last: int, ran: list[str]) -> list[str]:
    """What gives the last block's attention its tokens: that block's first normalisation, or the block before."""
    norm, attention, block_before = f"blocks.{last}.norm1", f"blocks.{last}.attn", f"blocks.{last - 1}"
    first = [name for name in ran if name in (norm, attention)][:1]
    return [name for name in (*first, block_before) if name in ran and name != attention]


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


def _reading(output: Tensor, prefix: int, channels_last: bool = False) -> Callable[[Tensor], Tensor] | None:
    """How a layer's output becomes a map, (N, C, H, W) with H = W > 1, without its first `prefix` tokens; or None."""
    if output.ndim == 3:
        return partial(_tokens_to_map, prefix) if _square_side(output.shape[1] - prefix) > 1 else None
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


def _tokens_to_map(prefix: int, output: Tensor) -> Tensor:
    side = _square_side(output.shape[1] - prefix)
    return output[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
