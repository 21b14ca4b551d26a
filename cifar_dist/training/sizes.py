"""How large a training is, counted for its plan before it runs."""

from __future__ import annotations

import torch

from cifar_dist.config import Config
from cifar_dist.data import TrainingData
from cifar_dist.models import count_parameters
from cifar_dist.models.sync_bn import has_batch_norm
from cifar_dist.optim import state_per_parameter
from cifar_dist.plan import Sizes


def measure(config: Config, data: TrainingData, model: torch.nn.Module) -> Sizes:
    """Count images, classes, parameters and resident bytes for the plan."""
    num_parameters, num_trainable = count_parameters(model)
    resident = [split for split in (data.train, data.val) if split is not None]
    return Sizes(
        num_train=len(data.train),
        num_val=0 if data.val is None else len(data.val),
        num_test=data.num_test,
        num_classes=len(data.class_names),
        data_bytes=sum(split.nbytes for split in resident),
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        state_per_parameter=state_per_parameter(config.optim),
        has_batch_norm=has_batch_norm(model),
    )
