"""The classifier of a model, and freezing everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def head_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of timm's ``get_classifier()``, and of every layer that its configuration calls one.

    A distilled model has two of the first, VOLO one beside it that only the configuration names.
    """
    classifier = cast(Any, model).get_classifier()
    modules = [*classifier] if isinstance(classifier, (tuple, list)) else [classifier]
    named = classifier_names(getattr(model, "pretrained_cfg", {}))
    modules += [layer for name, layer in model.named_modules() if name in named]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def classifier_names(pretrained_cfg: Mapping[str, Any]) -> list[str]:
    """What timm's configuration of a model calls its classifiers."""
    named = pretrained_cfg.get("classifier") or ()
    return [named] if isinstance(named, str) else list(named)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters there are in all, and how many of them train."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


class FrozenBackbone(nn.Module):
    """Mixed into a frozen model's class: its frozen BatchNorms stay in evaluation mode during training."""

    def train(self, mode: bool = True) -> FrozenBackbone:
        """As `nn.Module.train`, but a BatchNorm whose weight does not train keeps its statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the classifier to train, in place.

    The model keeps its keys and parameters, so its checkpoints fit an unfrozen model. (``timm.utils.freeze`` would
    turn the weights of each BatchNorm2d into buffers, and leave BatchNorm1d to drift.)
    """
    head = set(head_parameter_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    original = type(model)
    model.__class__ = type(original.__name__, (FrozenBackbone, original), {"__module__": original.__module__})
    model.train(model.training)
