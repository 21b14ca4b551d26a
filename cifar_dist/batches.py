"""From a step number to this process's ready micro-batches, on the device.

This is the seam for other data paths: training only calls ``batches(step)`` and needs nothing
else of where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cifar_dist.config import Config, InputConfig
from cifar_dist.data.augment import Augment, Mixing
from cifar_dist.data.resident import ResidentSet
from cifar_dist.ordering import global_batch, micro_batch_slice
from cifar_dist.parallel import Replicated
from cifar_dist.plan import Plan


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one process.

    Attributes:
        images: (B, 3, H, W), augmented and normalised.
        targets: int64 (B,) or, under mixup and CutMix, float (B, K).
        labels: int64 (B,), the classes before mixing.
        weights: float32 (B,): 1 / (real rows of the global batch), or 0 for a filled row.
        last: whether it is the step's last one.
    """

    images: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    last: bool


class ResidentBatches:
    """Batches of a set that lives on the device.

    Args:
        data: the whole training set, on the accelerator's device.
        config: the run's configuration.
        plan: the run's plan.
        input: what the model expects.
        parallel: the engine; tells which slice is this process's, and the dtype its model takes.
    """

    def __init__(self, data: ResidentSet, config: Config, plan: Plan, input: InputConfig, parallel: Replicated):
        self._data, self._plan, self._seed = data, plan, config.run.seed
        self._ids = data.ids.cpu()  # what is drawn for groups of images is drawn on the host
        self._process = parallel.accelerator.process_index
        self._augment = Augment(config.augment, input, config.run.seed, data.images.device, parallel.input_dtype)
        mixes = config.augment.mixup or config.augment.cutmix
        self._mixing = Mixing(config.augment, config.run.seed, plan.num_classes) if mixes else None
        self._layout = torch.channels_last if config.model.channels_last else torch.contiguous_format

    def sample_ids(self, step: int) -> list[int]:
        """Ids of the rows of step `step`'s global batch, over all processes."""
        batch = global_batch(self._plan.num_train, self._plan.batch_size, self._seed, step)
        return self._ids[torch.from_numpy(batch.rows[batch.real])].tolist()

    def __call__(self, step: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of optimizer step `step`."""
        plan = self._plan
        batch = global_batch(plan.num_train, plan.batch_size, self._seed, step)
        weight = np.float32(1 / batch.real.sum())
        device, epoch = self._data.images.device, step // plan.steps_per_epoch
        for micro in range(plan.grad_accum_steps):
            part = micro_batch_slice(self._process, plan.num_processes, micro, plan.micro_batch_size)
            on_host = torch.from_numpy(batch.rows[part])
            rows, ids = on_host.to(device, non_blocking=True), self._ids[on_host]
            weights = torch.from_numpy(batch.real[part] * weight).to(device, non_blocking=True)
            labels = self._data.labels[rows]
            images = self._augment(self._data.images[rows], ids, epoch)
            images, targets = images.contiguous(memory_format=self._layout), labels
            if self._mixing is not None:
                images, targets = self._mixing(images, labels, ids, epoch)
            yield Batch(images, targets, labels, weights, last=micro == plan.grad_accum_steps - 1)
