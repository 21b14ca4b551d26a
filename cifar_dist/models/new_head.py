"""Heads that are not trained yet, and what they begin with."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from cifar_dist.models.factory import create
from cifar_dist.models.head import classifier_names

LARGEST_NORM = 1.0  # of a class's weights: the deviation of its logit where features have a variance of 1


def with_drawn_head(arguments: dict[str, Any]) -> nn.Module:
    """The model as timm draws it, but with a head that starts at zero where timm draws a much too large one.

    For few classes some families do: the first loss of an EfficientNet's ten classes is 7, where ln 10 is 2.3.
    """
    model = create(arguments)
    for layer in _last_layers(model, arguments):
        if not layer.weight.is_meta and layer.weight.flatten(1).norm(dim=1).mean() > LARGEST_NORM:
            _zero(layer)
    return model


def with_zero_head(arguments: dict[str, Any]) -> nn.Module:
    """The model with a head that starts at zero, so with all classes alike.

    As in BiT and the ViT paper (Kolesnikov 2020, Dosovitskiy 2021): what is drawn for a training from scratch may be
    much too large beside trained features.
    """
    model = create(arguments)
    for layer in _last_layers(model, arguments):
        _zero(layer)
    return model


def _last_layers(model: nn.Module, arguments: dict[str, Any]) -> list[nn.Linear | nn.Conv2d]:
    """Those that give logits: the classifiers of timm's description, and the last layer of each in the model itself."""
    names = {name.rpartition(".")[0] for name in head_names(arguments)}
    found = [layer for name, layer in model.named_modules() if name in names]
    classifier = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else ()
    for part in classifier if isinstance(classifier, (tuple, list)) else [classifier]:
        found += [layer for layer in part.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1:]
    return [layer for layer in found if isinstance(layer, nn.Linear | nn.Conv2d)]


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    for tensor in layer.state_dict().values():
        tensor.zero_()


def head_names(arguments: dict[str, Any]) -> set[str]:
    """Keys of the classifiers that the model's configuration in timm names."""
    return {f"{name}.{kind}" for name in classifier_names(arguments["pretrained_cfg"]) for kind in ("weight", "bias")}
