"""A model as it is while it is looked into: nothing of it changes, and all of it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_in_eval(model: nn.Module) -> Iterator[None]:
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
