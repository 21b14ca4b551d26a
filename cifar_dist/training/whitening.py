"""First layers that are computed from the training images instead of trained."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator

from cifar_dist.config import ModelConfig
from cifar_dist.data import TrainingData
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.group import on_main
from cifar_dist.errors import UsageError
from cifar_dist.models import input_config

IMAGES, AT_A_TIME = 5000, 500  # as many as the source of the method takes; a bound on memory


def whiten(model: torch.nn.Module, data: TrainingData, config: ModelConfig, accelerator: Accelerator) -> None:
    """Give a model with a whitening layer training images from all over the set; others stay as they are.

    The first process computes the layer for all: the signs of its directions may depend on the machine.

    Args:
        model: as built, on the CPU, with a layer ``whitening`` and a method ``whiten``; see `Airbench94.whiten`.
        data: the training data.
        config: the model's configuration; with weights of its own there is nothing to compute.
        accelerator: of this process.

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
    count = min(len(data.train), IMAGES)
    rows = torch.arange(count) * len(data.train) // count  # of all classes, also where they lie class by class
    network, images = cast(Any, model), data.train.images

    def computed() -> dict[str, torch.Tensor]:
        network.whiten(preprocess(images[part]) for part in rows.split(AT_A_TIME))
        return network.whitening.state_dict()

    network.whitening.load_state_dict(on_main(accelerator, computed))
