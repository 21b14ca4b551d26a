"""Grad-CAM and attention rollout: one number a pixel that says how much it counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_dist.explain.frozen_in_eval import frozen_in_eval
from cifar_dist.explain.target import (
    Target,
    Unexplained,
    blocks_of,
    choose,
    has_class_token,
    prefix_tokens,
    tokens_to_map,
)

BATCH_SIZE = 8  # images that are held at a time


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391), by the library grad-cam, at the layer of `target_of`.

    Where a class token is classified, read it beside `attention_rollout`: its maps of small ViTs may miss what counts.
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
    with frozen_in_eval(model):
        target = choose(model, images[:1])
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
    if not has_class_token(model):
        return None
    prefix, maps = prefix_tokens(model), []
    with frozen_in_eval(model), torch.no_grad():
        for some in images.split(BATCH_SIZE):
            seen = _rolled_out(model, some)[:, 0, prefix:, None]
            maps.append(_enlarge(tokens_to_map(0, seen)[:, 0], images.shape[-1]))
    return torch.cat(maps)


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
        if not kept.gradients:
            raise Unexplained(f"The logits of this {type(model).__name__} do not depend on its layer {target.name}.")
        activations, gradients = kept.activations[-1].numpy(), kept.gradients[-1].numpy()
        found = cam.get_cam_image(images, target.layer, [], activations, gradients)
    finally:
        kept.release()
    return torch.from_numpy(found).clamp(min=0)


def _rolled_out(model: nn.Module, images: Tensor) -> Tensor:
    """The product of all layers' attention, (N, T, T) for T tokens; a row says where its token comes from."""
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks_of(model)]
    if not attentions or not all(hasattr(attention, "attn_drop") for attention in attentions):
        raise Unexplained(f"The attention of this {type(model).__name__} does not lie open.")
    fused = [(attention, attention.fused_attn) for attention in attentions if hasattr(attention, "fused_attn")]
    grid_of = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", lambda size: (0, 0))
    num_tokens = prefix_tokens(model) + math.prod(grid_of(images.shape[-2:]))
    seen: list[Tensor] = []

    def multiply(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.shape[-1] != num_tokens:
            raise Unexplained(f"The attention of this {type(model).__name__} is not one among class and patch tokens.")
        layer = (output.mean(dim=1) + torch.eye(output.shape[-1], device=output.device)) / 2
        seen[:] = [layer @ seen[0] if seen else layer]

    handles = [attention.attn_drop.register_forward_hook(multiply) for attention in attentions]
    try:
        for attention, _ in fused:
            attention.fused_attn = False  # the fused kernel never holds the attention itself
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for attention, was_fused in fused:
            attention.fused_attn = was_fused
    return seen[0]


def _enlarge(maps: Tensor, side: int) -> Tensor:
    """(N, H, W) of at least 0 to (N, side, side) on the CPU, bilinear, each over its maximum."""
    large = F.interpolate(maps.float().cpu()[:, None], size=(side, side), mode="bilinear")[:, 0]
    peaks = large.amax(dim=(1, 2), keepdim=True)
    return torch.where(peaks > 0, large / peaks, 0.0)
