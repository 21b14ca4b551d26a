"""First layers that are computed from the training images instead of trained."""

from __future__ import annotations

from typing import Any, cast

import torch

from cifar_dist.config import ModelConfig
from cifar_dist.data import TrainingData
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.errors import UsageError
from cifar_dist.models import input_config

IMAGES = 5000  # as many as the source of the method takes


def whiten(model: torch.nn.Module, data: TrainingData, config: ModelConfig) -> None:
    """Give a model with a whitening layer the first training images; others stay as they are.

    Every process does so from the same images, and its first process's weights are all's.

    Args:
        model: as built, on the CPU; ``model.whiten(images)`` takes normalised float images (N, 3, S, S).
        data: the training data.
        config: the model's configuration; with weights of its own there is nothing to compute.

    Raises:
        UsageError: the images are streamed.
    """
    if not hasattr(model, "whiten") or config.pretrained or config.init_weights:
        return
    if not isinstance(data.train, ResidentSet):
        raise UsageError(
            f"--model {config.model}: its first layer is computed from training images, which --data-mode stream does"
            " not keep; take --data-mode resident."
        )
    preprocess = Preprocess(input_config(model, config), torch.device("cpu"), torch.float32)
    cast(Any, model).whiten(preprocess(data.train.images[:IMAGES]))
