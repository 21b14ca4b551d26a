"""From a step number to this process's ready micro-batches, on the device.

This is the seam for other data paths: training asks a `Batches` for steps, and knows nothing else of where rows come
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

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
        images: (B, 3, H, W), augmented and normalised; or features (B, F), see `features`.
        targets: int64 (B,) or, under mixup and CutMix, float (B, K).
        weights: float32 (B,): 1 / (real rows of the global batch), or 0 for a filled row.
        last: whether it is the step's last one.
        lost: whether there were no data for it; the step must not be made.
    """

    images: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    last: bool
    lost: bool = False


@dataclass(frozen=True)
class Part:
    """Rows of a micro-batch as they are in the set.

    Images uint8 (B,S,S,3), labels and weights (B,) are on the device; ids int64 (B,) on the host, which draws for them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Batches:
    """From a step to this process's micro-batches; where rows come from is for subclasses to say.

    Attributes:
        lost: why no further rows can be had, "" if they were not waited for any longer since the run is to stop, or
            None. Batches are empty then: all their weights are 0.

    Args:
        config: the run's configuration.
        plan: the run's plan.
        input: what the model expects.
        parallel: the engine; tells the device, which slice is this process's, and the dtype its model takes.
    """

    def __init__(self, config: Config, plan: Plan, input: InputConfig, parallel: Replicated):
        self.lost: str | None = None
        self._plan, self._seed = plan, config.run.seed
        self._process, self._device = parallel.accelerator.process_index, parallel.accelerator.device
        self._augment = Augment(config.augment, input, config.run.seed, self._device, parallel.input_dtype)
        self._mixing = Mixing(config.augment, config.run.seed, plan.num_classes) if config.augment.mixes else None
        self._looks_ahead = self._device.type == "cuda"
        self._ahead: tuple[int, Iterator[Batch]] = (-1, iter(()))
        self._layout = torch.channels_last if config.model.channels_last else torch.contiguous_format

    def sample_ids(self, step: int) -> list[int]:
        """Ids of the rows of step `step`'s global batch, over all processes."""
        raise NotImplementedError

    def _parts(self, step: int) -> Iterator[Part]:
        """This process's rows of step `step`, a micro-batch at a time."""
        raise NotImplementedError

    def _is_there(self, step: int) -> bool:
        """Whether the rows of step `step` can be had without waiting."""
        return True

    def __call__(self, step: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of optimizer step `step`.

        Who asks for one more than there are has the next step's first one made ahead. Training does, when a step's
        last backward pass is under way on the GPU and before it waits for it: so that the GPU need not wait in turn.
        That takes no memory which a step has not needed before, but keeps it through an evaluation.
        """
        known, ahead = self._ahead
        self._ahead = (-1, iter(()))
        micro_batches = ahead if known == step else self._micro_batches(step)
        yield from micro_batches
        if self._looks_ahead and step + 1 < self._plan.total_steps and self._is_there(step + 1):
            upcoming = self._micro_batches(step + 1)
            with suppress(Exception):  # it comes again when that step asks, and this one is not yet made
                self._ahead = (step + 1, chain([next(upcoming)], upcoming))

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        plan, epoch = self._plan, step // self._plan.steps_per_epoch
        for micro, part in enumerate(self._parts(step)):
            images, targets = self._input(part, epoch), part.labels
            if self._mixing is not None:
                images, targets = self._mixing(images, part.labels, part.ids, epoch)
            last = micro == plan.grad_accum_steps - 1
            yield Batch(images, targets, part.weights, last, lost=self.lost is not None)

    def _input(self, part: Part, epoch: int) -> torch.Tensor:
        """What the model is given for these rows, before mixing."""
        images = self._augment(part.images, part.ids, epoch)
        return images.contiguous(memory_format=self._layout)

    def _slice(self, micro: int) -> slice:
        return micro_batch_slice(self._process, self._plan.num_processes, micro, self._plan.micro_batch_size)

    def take_waits(self) -> list[float]:
        """Seconds that steps waited for data, and images that were damaged and skipped, since last asked."""
        return [0.0, 0.0]

    def close(self) -> None:
        """Stop reading ahead."""


class ResidentBatches(Batches):
    """Batches of a set that lives on the device.

    Args:
        data: the training set.
        others: see `Batches`.
    """

    def __init__(self, data: ResidentSet, config: Config, plan: Plan, input: InputConfig, parallel: Replicated):
        super().__init__(config, plan, input, parallel)
        self._data, self._ids = data.to(self._device), data.ids.cpu()

    def sample_ids(self, step: int) -> list[int]:
        """Ids of the rows of step `step`'s global batch, over all processes."""
        batch = global_batch(self._plan.num_train, self._plan.batch_size, self._seed, step)
        return self._ids[torch.from_numpy(batch.rows[batch.real])].tolist()

    def _parts(self, step: int) -> Iterator[Part]:
        batch = global_batch(self._plan.num_train, self._plan.batch_size, self._seed, step)
        weight = np.float32(1 / batch.real.sum())
        for micro in range(self._plan.grad_accum_steps):
            place = self._slice(micro)
            on_host = torch.from_numpy(batch.rows[place])
            rows = on_host.to(self._device, non_blocking=True)
            weights = torch.from_numpy(batch.real[place] * weight).to(self._device, non_blocking=True)
            yield Part(self._data.images[rows], self._data.labels[rows], self._ids[on_host], weights)
