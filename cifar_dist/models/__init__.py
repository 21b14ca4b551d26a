"""Build a classifier by name, with or without weights, and say what input it expects."""

from __future__ import annotations

from pathlib import Path

from timm.data import resolve_model_data_config
from torch import nn

from cifar_dist.config import INTERPOLATIONS, InputConfig, ModelConfig
from cifar_dist.errors import UsageError
from cifar_dist.models.factory import check_image_size, create, model_arguments
from cifar_dist.models.head import count_parameters, freeze_backbone, head_parameter_names
from cifar_dist.models.hub import require_config
from cifar_dist.models.names import ALIASES, NATIVE, resolve_name
from cifar_dist.models.new_head import with_drawn_head
from cifar_dist.models.packed_attention import pack_attention
from cifar_dist.models.patches import multiply_patches
from cifar_dist.models.weights import from_file, from_timm

__all__ = [
    "ALIASES",
    "NATIVE",
    "build_model",
    "count_parameters",
    "freeze_backbone",
    "head_parameter_names",
    "input_config",
    "resolve_name",
]


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the model of a configuration on the CPU in fp32, in training mode.

    The caller seeds; images (B, 3, S, S) go in, logits (B, num_classes) come out.

    Raises:
        UsageError: unknown model; weights that are not there, damaged or of another model; a rate or image size
            that the model does not take; both sources of weights at once.
    """
    if config.pretrained and config.init_weights:
        raise UsageError(f"--init-weights {config.init_weights}: not together with --pretrained; choose one.")
    name = resolve_name(config.model)
    require_config(name)
    arguments = model_arguments(name, config, num_classes)
    if config.init_weights:
        model = from_file(arguments, Path(config.init_weights))
    elif config.pretrained:
        model = from_timm(name, arguments)
    else:
        model = create(arguments) if name in NATIVE else with_drawn_head(arguments)
    if not hasattr(model, "get_classifier"):
        raise UsageError(f"--model {config.model}: it has no classifier (get_classifier()); take another.")
    if config.img_size is not None:
        check_image_size(model, name, config.img_size)
    if config.freeze == "backbone":
        freeze_backbone(model)
    multiply_patches(model)
    pack_attention(model)
    return model


def input_config(model: nn.Module, config: ModelConfig) -> InputConfig:
    """What the model expects of its images: its own timm data config, overridden by the configuration.

    An interpolation other than bilinear and bicubic becomes bicubic.

    Raises:
        UsageError: the model's own images are not square.
    """
    own = resolve_model_data_config(model)
    height, width = own["input_size"][-2:]
    if config.img_size is None and height != width:
        raise UsageError(
            f"--model {config.model}: it sees {height} x {width} images; give the side of a square: --img-size."
        )
    interpolation = config.interpolation or own["interpolation"]
    return InputConfig(
        img_size=config.img_size or width,
        mean=tuple(config.mean or own["mean"]),
        std=tuple(config.std or own["std"]),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bicubic",
    )
