"""timm's model factory with its refusals turned into lines that name the flag."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath
from timm.models import resolve_model_input_args
from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.errors import UsageError, first_line

FLAG_OF_ARGUMENT = {"drop_path_rate": "--drop-path", "drop_rate": "--drop"}


def named(error: BaseException) -> str:
    """An exception's type and first line: a model's own code raises all sorts of things."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def model_arguments(name: str, config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for a resolved name, without weights.

    ``img_size`` is among them only for models of one input size (ViT, Swin, …); others take images of any size.

    Raises:
        UsageError: the model's own description (of ``hf-hub:`` or ``local-dir:``) cannot be used.
    """
    try:
        arguments = resolve_model_input_args(
            name,
            args={"img_size": config.img_size},
            num_classes=num_classes,
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
        )
    except Exception as error:  # anything a foreign config.json may cause
        raise UsageError(f"--model {name}: its description cannot be used ({named(error)}).") from error
    off = [argument for argument in FLAG_OF_ARGUMENT if arguments.get(argument) == 0]
    others = {key: value for key, value in arguments.items() if key not in off}
    return others | {argument: 0.0 for argument in off if _takes({**others, argument: 0.0}, argument)}


def _takes(arguments: dict[str, Any], argument: str) -> bool:
    """Whether the model knows a rate: some take none, which is as if it were 0."""
    try:
        with torch.device("meta"):
            timm.create_model(**arguments)
    except Exception as error:  # for other reasons, which `create` tells
        return f"'{argument}'" not in str(error)
    return True


def create(arguments: dict[str, Any]) -> nn.Module:
    """Build the model with random weights.

    Raises:
        UsageError: the model takes no ``--drop``, ``--drop-path`` or refuses ``--img-size``.
    """
    name = arguments["model_name"]
    try:
        return timm.create_model(**arguments)
    except Exception as error:  # timm's models refuse by assert, ValueError, TypeError, …
        for argument, flag in FLAG_OF_ARGUMENT.items():
            if argument in arguments and isinstance(error, TypeError) and f"'{argument}'" in str(error):
                raise UsageError(
                    f"{flag} {arguments[argument]}: {name} takes no such rate; leave {flag} out."
                ) from error
        size = arguments.get("img_size")
        asked = f"--img-size {size[0]}: {name}" if size else f"--model {name}: timm"
        raise UsageError(f"{asked} refuses to be built ({named(error)}).") from error


def drops_paths(model: nn.Module) -> bool:
    """Whether stochastic depth has an effect: the first MobileNet and LCNet take a rate, but have no shortcuts."""
    return any(
        isinstance(child, DropPath) and child.drop_prob and getattr(module, "has_skip", True)
        for module in model.modules()
        for child in module.children()
    )


def check_image_size(model: nn.Module, name: str, size: int) -> None:
    """Pass one empty image through the model, in evaluation mode.

    Raises:
        UsageError: the size is not a multiple of the model's patch, or the model fails at it.
    """
    patches = getattr(model, "patch_embed", None)
    patch, stride = getattr(patches, "patch_size", None), getattr(getattr(patches, "proj", None), "stride", None)
    sides = patch if isinstance(patch, tuple) and stride in (None, patch) else ()  # not of patches that overlap
    if any(size % side for side in sides):
        near = sides[0] * max(1, round(size / sides[0]))
        raise UsageError(f"--img-size {size}: {name} needs a multiple of its patch size {sides[0]}, such as {near}.")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except Exception as error:  # models refuse by assert or in any layer
        own = resolve_model_data_config(model)["input_size"][-1]
        cure = f"leave --img-size out, or take another (its own is {own})"
        raise UsageError(
            f"--img-size {size}: {name} cannot take images of this size ({named(error)}); {cure}."
        ) from error
    finally:
        model.train(was_training)
